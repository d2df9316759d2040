"""compress() and make_plan(): a model made smaller by a method, or by several stages; or what a method would do."""

from __future__ import annotations

from collections.abc import Sequence
from time import perf_counter
from typing import Any

from transformers import PreTrainedModel

from hf_compress.api.arguments import check_arguments, prepared
from hf_compress.api.one_method import compress_by, plan_by
from hf_compress.api.stages import StageSettings, check_stages, compress_in_stages, is_several
from hf_compress.calibration.compute import Compute
from hf_compress.calibration.data import DataOptions
from hf_compress.calibration.media import Processor
from hf_compress.calibration.processes import sharing
from hf_compress.methods.base.settings import CompressionConfig
from hf_compress.numerics.defaults import torch_defaults
from hf_compress.plan.plan import Plan


@sharing()
@torch_defaults()
def compress(
    model: PreTrainedModel,
    config: StageSettings | str | Sequence[StageSettings | str],
    calibration: Any = None,
    tokenizer: Processor | None = None,
    options: DataOptions | None = None,
    compute: Compute | None = None,
    teacher: PreTrainedModel | None = None,
    **settings: Any,
) -> PreTrainedModel:
    """Make `model` smaller by the method of `config`. **Changes the model it is given**, and returns it.

    Where torch.distributed has several processes, all of them have to call it alike; they share the work.

    Args:
        model: any Transformers model whose blocks can be found; not quantized. On one device, or dispatched by
            Transformers (`device_map=`) over several, the CPU and the disk.
        config: a method's settings, such as `MKAConfig(ratio=0.25)`; or its name, "mka". Or several of them, one after
            another, with `HealConfig(...)`, or "heal", where the model is to learn from what it was:
            `[MKAConfig(ratio=0.25), "heal", LRPConfig(bits=4.25)]`.
        calibration: texts, images, sounds, a `datasets.Dataset`, a DataLoader or other iterable of batches, a
            LongTensor of token ids, pixel values, or the name of a file, a folder or a dataset with texts, images or
            sounds; see `hf_compress.calibration.data.prepare`. Some methods need none.
        tokenizer: the model's own; needed for texts. Its image processor, feature extractor or processor for others.
        options: batch size, maximum length, and text column of the calibration data; how many samples to draw.
        compute: where it is done and within how much memory, and a folder from which a run that was killed goes on.
        teacher: whom "heal" learns from; a copy of `model` as it is now when not given.
        settings: of the method, where `config` is a name: `ratio=0.25`.

    Returns:
        `model`, smaller, with its history as its `compression_report`: a `CompressionReport` of this change and of all
        before it that are known (see `history_of`). It saves with `save_pretrained` and loads with `from_pretrained` to
        the same outputs, bit for bit; that was checked.

    Raises:
        ValueError, TypeError: bad settings, data, or model; stages that cannot follow each other, before anything is
            done. Each message names the value, the expectation, the remedy. In every case, on interruption too, the
            model is as it was, or as the last finished stage has left it; healing without adapters leaves it half
            trained.
        ProcessesError: of several processes one has failed, has ended, or has another model, settings or data.
    """
    if is_several(config):
        stages = check_stages(model, config, calibration, settings, teacher)
    else:
        method = check_arguments(model, config, settings)
        if teacher is not None:
            raise ValueError("teacher= is whom heal learns from, and a single method has no healing: leave it out")
    start = perf_counter()
    data = prepared(calibration, model, tokenizer, options)
    compute, preparing = compute or Compute(), perf_counter() - start
    if is_several(config):
        compress_in_stages(model, stages, data, compute, teacher, preparing)
    else:
        compress_by(model, method, data, compute, preparing)
    return model


@sharing()
@torch_defaults()
def make_plan(
    model: PreTrainedModel,
    config: CompressionConfig | str,
    calibration: Any = None,
    tokenizer: Processor | None = None,
    options: DataOptions | None = None,
    compute: Compute | None = None,
    **settings: Any,
) -> Plan:
    """What `compress` would do to `model` by one method, without doing it; arguments and errors are those of that."""
    method = check_arguments(model, config, settings)
    return plan_by(model, method, prepared(calibration, model, tokenizer, options), compute or Compute())
