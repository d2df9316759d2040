"""compress(): anatomy and calibration data in, a plan, the plan carried out and checked, a stage of its history."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import fields
from difflib import get_close_matches
from functools import partial
from time import perf_counter
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_compress.anatomy.adapters import check_no_adapters
from hf_compress.anatomy.dispatch import check_readable, is_dispatched, is_offloaded, retie
from hf_compress.anatomy.residency import check_finite
from hf_compress.api.identity import identity_of, known_in_memory, tensors_of
from hf_compress.calibration.compute import Compute, bytes_of
from hf_compress.calibration.data import Calibration, DataOptions, prepare
from hf_compress.calibration.processes import agree, by_one, from_one, here, sharing
from hf_compress.calibration.workdir import check_room, worked_in
from hf_compress.errors import CalibrationError, UnsupportedModelError
from hf_compress.methods.base.context import CalibrationContext
from hf_compress.methods.base.journal import Journal
from hf_compress.methods.base.registry import plan_for, work_for
from hf_compress.methods.base.settings import CompressionConfig, config_class, settings_of
from hf_compress.methods.base.work import Work
from hf_compress.modules.kernels import check_no_kernels
from hf_compress.numerics.defaults import check_not_inference, torch_defaults
from hf_compress.numerics.fingerprint import fingerprint
from hf_compress.plan.plan import Plan
from hf_compress.report.edits import log_decisions
from hf_compress.report.history import add_stage, history_of, model_size
from hf_compress.report.stages import Size, Stage, Step
from hf_compress.rewrite.apply import Change
from hf_compress.rewrite.probe import Probe


@sharing()
@torch_defaults()
def compress(
    model: PreTrainedModel,
    config: CompressionConfig | str,
    calibration: Any = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    options: DataOptions | None = None,
    compute: Compute | None = None,
    **settings: Any,
) -> PreTrainedModel:
    """Make `model` smaller by the method of `config`. **Changes the model it is given**, and returns it.

    Where torch.distributed has several processes, all of them have to call it alike; they share the work.

    Args:
        model: any Transformers model whose blocks can be found; not quantized. On one device, or dispatched by
            Transformers (`device_map=`) over several, the CPU and the disk.
        config: a method's settings, such as `MKAConfig(ratio=0.25)`; or its name, "mka".
        calibration: texts, a `datasets.Dataset`, a DataLoader or other iterable of batches, a LongTensor of token ids,
            pixel values, or the name of a file, a folder or a dataset with texts; see
            `hf_compress.calibration.data.prepare`. Some methods need none.
        tokenizer: the model's own; needed for texts.
        options: batch size, maximum length, and text column of the calibration data.
        compute: where it is done and within how much memory, and a folder from which a run that was killed goes on.
        settings: of the method, where `config` is a name: `ratio=0.25`.

    Returns:
        `model`, smaller, with its history as its `compression_report`: a `CompressionReport` of this change and of all
        before it that are known (see `history_of`). It saves with `save_pretrained` and loads with `from_pretrained` to
        the same outputs, bit for bit; that was checked.

    Raises:
        ValueError, TypeError: bad settings, data, or model; each message names the value, the expectation, the remedy.
            In every case, on interruption too, the model is as it was.
        ProcessesError: of several processes one has failed, has ended, or has another model, settings or data.
    """
    config = check_arguments(model, config, settings)
    start = perf_counter()
    data = _prepare(calibration, model, tokenizer, options)
    _check_alike(model, config, data, compute)
    context = CalibrationContext(model, data, {"prepare calibration data": perf_counter() - start} if data else {})
    history, before = history_of(model), model_size(model)
    with _computing(compute or Compute(), config, context), Change(model) as change:
        start = perf_counter()
        probe = Probe.of(model, data.batches[0] if data else None)
        probing = perf_counter() - start
        context.change = change
        plan = _plan(config, context)
        with context.step("apply and check"):
            change.finish(plan, probe)
        agree(compressed_model=lambda: known_in_memory(model))
        context.seconds["apply and check"] += probing
    add_stage(model, stage_of(config, plan, context, before, model_size(model)), history)
    return model


@sharing()
@torch_defaults()
def make_plan(
    model: PreTrainedModel,
    config: CompressionConfig | str,
    calibration: Any = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    options: DataOptions | None = None,
    compute: Compute | None = None,
    **settings: Any,
) -> Plan:
    """What `compress` would do to `model`, without doing it. Arguments and errors are those of `compress`."""
    config = check_arguments(model, config, settings)
    data = _prepare(calibration, model, tokenizer, options)
    _check_alike(model, config, data, compute)
    context = CalibrationContext(model, data)
    with _computing(compute or Compute(), config, context):
        return _plan(config, context)


@contextmanager
def _computing(compute: Compute, config: CompressionConfig, context: CalibrationContext) -> Iterator[None]:
    """Inside, work is done as `compute` says, and its results are kept where that says."""
    with ExitStack() as held:
        if compute.folder is not None:
            held.enter_context(by_one(worked_in)(compute.folder))
            with context.step("look for an earlier run"):
                known_by = partial(identity_of, context.model, config, context.data, compute.device, here()[1])
                identity = from_one(known_by)
                context.journal = Journal(compute.folder, identity)
                needed = disk_needed(context, work_for(config, context))
                from_one(partial(check_room, compute.folder, needed))
        held.enter_context(compute.applied(context.model))
        yield


def disk_needed(context: CalibrationContext, work: Work | None) -> int:
    """Bytes of the results that a workdir keeps at most: of blocks that get new weights."""
    if work is not None and not work.rewrites:
        return 0
    blocks = sum(bytes_of(stack.blocks) for stack in context.anatomy.stacks)
    return blocks * (2 if is_offloaded(context.model) else 1)  # what is finished, and what the model reads


def _plan(config: CompressionConfig, context: CalibrationContext) -> Plan:
    with context.naming_failures():
        plan = plan_for(config, context)
    log_decisions(config.method, plan.to_list())
    return plan


def _prepare(
    data: Any, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, options: DataOptions | None
) -> Calibration | None:
    return None if data is None else prepare(data, model, tokenizer, options)


def _check_alike(
    model: PreTrainedModel, config: CompressionConfig, data: Calibration | None, compute: Compute | None
) -> None:
    """Raise where several processes are not to do the same, or have too few batches to share."""
    agree(
        settings=lambda: repr(config),
        compute=lambda: repr(compute and (compute.max_memory, compute.workdir is None)),
        calibration_data=lambda: fingerprint(tensors_of(data)),
        model=lambda: known_in_memory(model),
    )
    if data is not None and len(data) < here()[1]:
        raise CalibrationError(
            f"{len(data)} batches are too few for {here()[1]} processes to share: give at least as many batches as "
            "processes, by more data or a smaller batch_size"
        )


def check_arguments(model: Any, config: Any, settings: Mapping[str, Any]) -> CompressionConfig:
    """A method's settings; raises unless they are some, and the model is one that can be compressed."""
    _check_words(config, settings)
    config = settings_of(config, settings)
    if not isinstance(config, CompressionConfig):
        raise TypeError(
            f"config must be a method's settings, such as MKAConfig(ratio=0.25), or its name; got {config!r}"
        )
    check_model(model)
    return config


def _check_words(config: Any, settings: Mapping[str, Any]) -> None:
    """Raise TypeError for what is no setting but nearly an argument, or a field of one."""
    own = {field.name for field in fields(config_class(config))} if isinstance(config, str) else set()
    for name in settings.keys() - own:
        for argument, kind in (("options", DataOptions), ("compute", Compute)):
            if name in {field.name for field in fields(kind)}:
                raise TypeError(f"{name} belongs inside {argument}=, as {argument}={kind.__name__}({name}=…)")
        if close := get_close_matches(name, ("calibration", "tokenizer", "options", "compute"), n=1):
            raise TypeError(f"there is no argument {name!r} (did you mean {close[0]!r}?)")


def check_model(model: Any) -> None:
    """Raise unless `model` is a plain Transformers model, in one place or dispatched, whose weights can be had.

    Offloaded weights are looked at when they are read.
    """
    if isinstance(model, torch.nn.Module):
        check_no_adapters(model)
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model must be a transformers.PreTrainedModel; got {type(model).__name__}")
    if getattr(model, "hf_quantizer", None) is not None:
        raise UnsupportedModelError("the model is quantized: compress it first, quantize it afterwards")
    check_no_kernels(model)
    check_not_inference(model)
    check_readable(model)
    retie(model)
    devices = {str(p.device) for p in model.parameters()}
    if len(devices) > 1 and not is_dispatched(model):
        raise UnsupportedModelError(f"the model is spread over {sorted(devices)}: put it on one device with model.to()")
    for name, parameter in model.named_parameters():
        if not parameter.is_meta:
            check_finite(name, parameter)


def stage_of(config: CompressionConfig, plan: Plan, context: CalibrationContext, before: Size, after: Size) -> Stage:
    """The stage of a model's history that a plan was which has been carried out and checked."""
    return Stage(
        method=config.method,
        config=config.to_dict(),
        before=before,
        after=after,
        edits=plan.to_list(),
        notes=plan.notes,
        steps=[Step(name, seconds) for name, seconds in context.seconds.items()],
        calibration=context.data.describe() if context.data else {},
        parity=True,  # apply() raises otherwise
    )
