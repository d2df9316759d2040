"""Inputs that tell two models apart, and what a model makes of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from hf_compress.anatomy.dispatch import computing_device, is_offloaded
from hf_compress.anatomy.stacks import find_stacks
from hf_compress.calibration.capture import forward, hooked, inference
from hf_compress.calibration.data import Batch, prepare
from hf_compress.calibration.vocabulary import special_ids
from hf_compress.errors import UnsupportedModelError, one_line
from hf_compress.modules.compact import ROOM, kept_dense
from hf_compress.numerics.aside import give_back

_NEW_TOKENS = 3
_SAMPLES, _LEAST, _POSITIONS = 8, 2, 256  # of a probe: samples at most and at least, and about as many tokens
_KEPT = "_compression_probe"  # what a model calls the inputs that its last change was checked with
_CONTINUATION = "continuation"

Outputs = dict[str, Tensor]


@dataclass(frozen=True)
class Probe:
    """Inputs that tell two models apart.

    Attributes:
        batch: inputs of a forward pass.
        generates: whether the model, before any change, could continue these inputs with its cache.
    """

    batch: Batch
    generates: bool

    @staticmethod
    def of(model: PreTrainedModel, inputs: Batch | Mapping[str, Any] | None = None) -> Probe:
        """A probe for `model`.

        Args:
            model: as it is before any change.
            inputs: a calibration batch, of which whole samples are taken, as few as will do; or keyword arguments of
                the model's forward. When None, what `model` was last checked with, or else made up.

        Raises:
            UnsupportedModelError: the model does not run on them, or none can be made up for a model of its kind.
        """
        failure: Exception | None = None
        for batch in _candidates(model, inputs):
            try:
                with inference(model):
                    forward(model, batch)
            except (torch.OutOfMemoryError, MemoryError):
                raise
            except Exception as error:
                failure = error
                continue
            return Probe(batch, generates=_can_generate(model, batch))
        assert failure is not None
        raise UnsupportedModelError(
            f"{type(model).__name__} does not run on the inputs it would be checked with; pass calibration data "
            f"that it runs on ({one_line(failure)})"
        ) from failure

    def keep(self, model: PreTrainedModel) -> None:
        """Have `model` bring this probe along: what it was changed with, it is checked with when it is saved."""
        vars(model)[_KEPT] = self.batch


def _candidates(model: PreTrainedModel, inputs: Batch | Mapping[str, Any] | None) -> Iterator[Batch]:
    """Batches to check with, the best first; the later ones are for models that do not run on the earlier."""
    if inputs is None:
        if (kept := vars(model).get(_KEPT)) is not None:
            yield kept
        yield Batch(_made_up_inputs(model), None)
        return
    batch = inputs if isinstance(inputs, Batch) else prepare([inputs], model, None).batches[0]
    yield batch.few(_POSITIONS, _LEAST, _SAMPLES)
    yield batch


def _made_up_inputs(model: PreTrainedModel) -> dict[str, Tensor]:
    """Two random texts of eight tokens or two random images, from a generator of their own, or what a model offers."""
    generator = torch.Generator().manual_seed(0)
    config = model.config
    if model.main_input_name == "pixel_values":
        vision = getattr(config, "vision_config", config)
        size = getattr(vision, "image_size", 224)
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        channels = getattr(vision, "num_channels", 3)
        return {"pixel_values": torch.randn((2, channels, height, width), generator=generator)}
    vocabulary = getattr(config.get_text_config(), "vocab_size", None)
    if model.main_input_name != "input_ids" and model.main_input_name in model.dummy_inputs:
        return dict(model.dummy_inputs)
    if model.main_input_name != "input_ids" or not isinstance(vocabulary, int):
        raise UnsupportedModelError(
            f"{type(model).__name__} takes {model.main_input_name}: pass calibration data, so that it can be checked"
        )
    special = set(special_ids(config, None).tolist())
    ids = torch.tensor([i for i in range(min(vocabulary, 1000)) if i not in special])
    return {"input_ids": ids[torch.randint(len(ids), (2, 8), generator=generator)]}


def outputs_on(model: PreTrainedModel, probe: Probe, room: int | None = None) -> Outputs:
    """Every tensor of the model's output on the probe, by its name, and the tokens it continues it with.

    Args:
        room: bytes for what packed and sparse maps unpack, once for all passes; `dense_room` of the model when None.
    """
    with kept_dense(model, dense_room(model) if room is None else room):
        outputs = named_outputs(model, probe.batch)
        if probe.generates:
            outputs[_CONTINUATION] = _generate(model, probe.batch)
    return outputs


def dense_room(model: PreTrainedModel) -> int:
    """Bytes that unpacked weights may take beside a model: none where it is offloaded, for want of memory."""
    return 0 if is_offloaded(model) else ROOM


@contextmanager
def _running(model: PreTrainedModel) -> Iterator[None]:
    """Inside, a model runs the same every time, and gives back what each block has freed."""
    try:
        blocks = [block for stack in find_stacks(model) for block in stack.blocks]
    except UnsupportedModelError:  # to be saved, it needs none
        blocks = []
    given_back = hooked(block.register_forward_hook(lambda *_: give_back()) for block in blocks)
    with inference(model), torch.random.fork_rng(), given_back:
        torch.manual_seed(0)
        yield


def named_outputs(model: PreTrainedModel, batch: Batch) -> Outputs:
    """Every tensor of the model's output on a batch, by its name: "logits", or "hidden_states.3" of a tuple."""
    with _running(model):
        return dict(_tensors(forward(model, batch)))


def _can_generate(model: PreTrainedModel, batch: Batch) -> bool:
    try:
        _generate(model, batch)
    except Exception:  # whatever keeps the whole model from generating is no fault of compression
        return False
    return True


def _generate(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Greedy continuation with the cache, (samples, positions)."""
    if not model.can_generate():
        raise UnsupportedModelError(f"{type(model).__name__} does not generate")
    device = computing_device(model)
    inputs = {
        name: value.to(device, torch.long if not value.is_floating_point() else model.dtype)
        for name, value in batch.inputs.items()
    }
    with _running(model), quiet():
        generator: Any = model
        return generator.generate(
            **inputs,
            max_new_tokens=_NEW_TOKENS,
            min_new_tokens=_NEW_TOKENS,
            do_sample=False,
            return_dict_in_generate=False,
        )


def _tensors(value: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors in a model's output, in order, and their names."""
    if isinstance(value, Tensor):
        yield name, value
        return
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, (list, tuple)) else ()
    for key, entry in entries:
        yield from _tensors(entry, f"{name}.{key}".lstrip("."))


def same_outputs(first: Outputs, second: Outputs) -> bool:
    """Whether two outputs are the same bit for bit (NaN where NaN)."""
    return first.keys() == second.keys() and all(same_tensor(tensor, second[name]) for name, tensor in first.items())


def same_tensor(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors, wherever they are, have the same shape, dtype and bits (NaN where NaN)."""
    if first.shape != second.shape or first.dtype != second.dtype:
        return False
    second = second.to(first.device)
    return torch.equal(first, second) or bool(((first == second) | (first.isnan() & second.isnan())).all())


@contextmanager
def quiet() -> Iterator[None]:
    """Keep Transformers from logging configs and loading reports while a copy is built."""
    level = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()
