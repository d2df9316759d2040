"""Running a model on calibration batches and watching the residual stream at its blocks."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from hf_compress.anatomy.stacks import Stack
from hf_compress.anatomy.state import State
from hf_compress.anatomy.undo import Undo
from hf_compress.calibration.data import Batch
from hf_compress.errors import CalibrationError, UnsupportedModelError

# index of the block, its input and its output, each (samples, positions, width)
BlockWatcher = Callable[[int, Tensor, Tensor], None]


class StopForward(Exception):
    """Raised by a watcher to end the forward pass: what it wanted has been seen."""


@contextmanager
def inference(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients, in the model's own dtype; afterwards every module is as it was.

    See `State` for what a pass may change besides a module's mode.
    """
    state = State(model)
    model.eval()
    try:
        with torch.no_grad(), Undo() as undo:
            if "_original_forward" in vars(model):  # Accelerate's, from a training in mixed precision
                undo.unset(model, "forward")
            yield
    finally:
        state.restore()


def forward(model: PreTrainedModel, batch: Batch) -> Any:
    """The model's output on a batch, without a cache; None when a watcher ended the pass."""
    parameter = next(model.parameters())
    inputs: dict[str, Any] = {}
    for name, value in batch.inputs.items():
        if value.is_floating_point():
            inputs[name] = value.to(parameter.device, parameter.dtype)
        else:
            inputs[name] = value.to(parameter.device, torch.long if value.dtype == torch.int32 else value.dtype)
    accepted = inspect.signature(model.forward).parameters
    if model.config.is_encoder_decoder and "decoder_input_ids" in accepted and "decoder_input_ids" not in inputs:
        inputs["decoder_input_ids"] = _decoder_input(model, inputs)
    if "use_cache" in accepted:
        inputs["use_cache"] = False
    try:
        return model(**inputs)
    except StopForward:
        return None


def _decoder_input(model: PreTrainedModel, inputs: dict[str, Any]) -> Tensor:
    """The text itself, one place to the right, as when an encoder-decoder learns to repeat its input."""
    config = model.config
    ids = inputs.get("input_ids")
    start = getattr(config, "decoder_start_token_id", None)
    start = start if start is not None else (getattr(config, "bos_token_id", None) or 0)
    if ids is None:
        first = next(iter(inputs.values()))
        return torch.full((len(first), 1), start, dtype=torch.long, device=first.device)
    return torch.cat([torch.full_like(ids[:, :1], start), ids[:, :-1]], dim=1)


@contextmanager
def watch_blocks(stack: Stack, watcher: BlockWatcher) -> Iterator[None]:
    """Call `watcher` with every block's input and output. The hooks come off on every way out."""
    handles = []
    for index, block in enumerate(stack.blocks):

        def hook(module: nn.Module, args: tuple, kwargs: dict, output: Any, index: int = index) -> None:
            watcher(index, stream_of(args, kwargs), stream_of_output(output))

        handles.append(block.register_forward_hook(hook, with_kwargs=True))
    with hooked(handles):
        yield


@contextmanager
def hooked(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """Take hooks off again on every way out, also when not all of them could be put on."""
    on: list[RemovableHandle] = []
    try:
        on.extend(handles)
        yield
    finally:
        for handle in on:
            handle.remove()


@dataclass
class Seen:
    """What a module was given last (its first argument), and what it made of it."""

    given: Tensor | None = None
    gave: Tensor | None = None


@contextmanager
def watch_module(module: nn.Module) -> Iterator[Seen]:
    """Have a module keep what it reads and writes."""
    seen = Seen()

    def keep(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        seen.given, seen.gave = args[0], output

    with hooked([module.register_forward_hook(keep)]):
        yield seen


def stream_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The residual stream among a block's arguments: the first positional one, or `hidden_states`."""
    value = args[0] if args else kwargs.get("hidden_states")
    if value is None:
        value = next((v for v in kwargs.values() if isinstance(v, Tensor) and v.is_floating_point()), None)
    if not isinstance(value, Tensor):
        raise TypeError(f"a block was called without a tensor for the residual stream; got {type(value).__name__}")
    return value


def stream_of_output(output: Any) -> Tensor:
    """The residual stream in what a block returns: a tensor, or the first entry of a tuple or list."""
    value = output if isinstance(output, Tensor) else output[0]
    if not isinstance(value, Tensor):
        raise TypeError(f"a block returned no tensor for the residual stream; got {type(value).__name__}")
    return value


def with_stream(output: Any, stream: Tensor | None) -> Any:
    """What a block returned, with another residual stream in it."""
    if not isinstance(output, (tuple, list)):
        return stream
    make: Any = getattr(type(output), "_make", type(output))  # the first where the tuple is a named one
    return make((stream, *output[1:]))


def streams_beside(output: Any, kwargs: dict[str, Any], stream: Tensor) -> dict[str, Tensor]:
    """What came in for the other streams of a block that has several (Reformer's two), by their names in its output."""
    found: dict[str, Tensor] = {}
    for field in getattr(output, "_fields", ())[1:]:
        for name, value in kwargs.items():
            if name.endswith(field) and isinstance(value, Tensor) and value.shape == stream.shape:
                found[field] = value
    return found


def real_tokens(batch: Batch, stream: Tensor) -> Tensor:
    """Mask (samples, positions) of the positions of `stream` that may enter a statistic."""
    if batch.real is not None and batch.real.shape == stream.shape[:2]:
        return batch.real.to(stream.device)
    return torch.ones(stream.shape[:2], dtype=torch.bool, device=stream.device)


def stream_tokens(stack: Stack, batch: Batch, stream: Tensor) -> Tensor:
    """`real_tokens` of the stream of a stack; `forward` gives a decoder the text one place to the right."""
    real = real_tokens(batch, stream)
    shifted = stack.side == "decoder" and any(config.is_encoder_decoder for config, _ in stack.configs)
    if not shifted or batch.real is None or "decoder_input_ids" in batch.inputs:
        return real
    return torch.cat([torch.zeros_like(real[:, :1]), real[:, :-1]], dim=1)


def check_stream(stack: Stack, index: int, before: Tensor, stream: Tensor) -> None:
    """Raise where a block's output is no stream like its input, or holds NaN or infinity, naming the block."""
    if stream.ndim != 3 or stream.shape != before.shape:
        raise UnsupportedModelError(
            f"block {stack.path}.{index} turns a stream of shape {tuple(before.shape)} into {tuple(stream.shape)}; "
            "only a residual stream (samples, positions, width) that stays as wide and as long can be compared and cut"
        )
    if not torch.isfinite(stream).all():
        raise CalibrationError(
            f"block {stack.path}.{index} gives NaN or infinite activations on the calibration data; "
            "load the model in float32 or bfloat16, or look for the sample that causes it"
        )
