"""Running a model on calibration batches and watching the residual stream at its blocks."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedConfig, PreTrainedModel

from hf_compress.anatomy.dispatch import computing_device, retie
from hf_compress.anatomy.stacks import Stack, reachable_configs
from hf_compress.anatomy.state import State
from hf_compress.anatomy.undo import Undo
from hf_compress.calibration.data import Batch
from hf_compress.calibration.decoder import default_input, has_decoder, one_later
from hf_compress.errors import CalibrationError, UnsupportedModelError

# index of the block, its input and its output, each (samples, positions, width)
BlockWatcher = Callable[[int, Tensor, Tensor], None]
Key = TypeVar("Key", bound=Hashable)


# Fields of configs, also that for generating, that say what an output holds, and in what form. Router logits of blocks
# that are left out for a while, for instance, could not be given.
_OUTPUTS = {
    "return_dict": True,
    "return_dict_in_generate": False,
    "output_hidden_states": False,
    "_output_attentions": False,
    "output_attentions": False,
    "output_router_logits": False,
}


class StopForward(Exception):
    """Raised by a watcher to end the forward pass: what it wanted has been seen."""


@contextmanager
def inference(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients, in the model's own dtype, with outputs in one form.

    Afterwards every module is as it was, and what the config says of outputs; see `State` for what a pass may change.
    """
    retie(model)
    with State(model).kept(), torch.no_grad(), Undo() as undo:
        model.eval()
        if "_original_forward" in vars(model):  # Accelerate's, from a training in mixed precision
            undo.unset(model, "forward")
        for config in {id(config): config for config in _configs(model)}.values():
            for name, value in _OUTPUTS.items():
                if name in vars(config):
                    undo.set(config, name, value)
        yield


def _configs(model: nn.Module) -> Iterator[object]:
    """Those of a model, for generating too, and of its parts, which have copies of their own in some families."""
    for module in model.modules():
        if isinstance(config := vars(module).get("config"), PreTrainedConfig):
            yield from reachable_configs(config)
        if (generation := vars(module).get("generation_config")) is not None:
            yield generation


def forward(model: PreTrainedModel, batch: Batch) -> Any:
    """The model's output on a batch, without a cache; None when a watcher ended the pass."""
    device, dtype = computing_device(model), next(model.parameters()).dtype
    inputs: dict[str, Any] = {}
    for name, value in batch.inputs.items():
        if value.is_floating_point():
            inputs[name] = value.to(device, dtype)
        else:
            inputs[name] = value.to(device, torch.long if value.dtype == torch.int32 else value.dtype)
    if has_decoder(model) and "decoder_input_ids" not in inputs:
        inputs["decoder_input_ids"] = default_input(model, inputs)
    if not {"use_cache", "past_key_values"}.isdisjoint(inspect.signature(model.forward).parameters):
        inputs["use_cache"] = False  # some hand it on without naming it
    try:
        return model(**inputs)
    except StopForward:
        return None


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


@contextmanager
def watch_arguments(modules: Mapping[Key, nn.Module]) -> Iterator[dict[Key, list[tuple[Any, ...]]]]:
    """What modules are given while a batch runs, by their keys: for each call all arguments, those with names last."""
    given: dict[Key, list[tuple[Any, ...]]] = {key: [] for key in modules}

    def keep(key: Key) -> Callable[..., None]:
        return lambda module, args, kwargs: given[key].append((*args, *kwargs.values()))

    with hooked(module.register_forward_pre_hook(keep(key), with_kwargs=True) for key, module in modules.items()):
        yield given


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
    return _fitting(batch.real, stream)


def decoder_tokens(batch: Batch, stream: Tensor) -> Tensor:
    """`real_tokens` of a stream of an encoder-decoder's decoder."""
    return _fitting(_decoded(batch), stream)


def stream_tokens(stack: Stack, batch: Batch, stream: Tensor) -> Tensor:
    """`real_tokens` of the stream of a stack."""
    return _fitting(tokens_of(stack, batch), stream)


def tokens_of(stack: Stack, batch: Batch) -> Tensor | None:
    """Mask (samples, positions) of the tokens that a stack reads and that count; None where all do."""
    configs = [config for config, _ in stack.configs]
    if any(getattr(config, "add_cross_attention", False) for config in configs):  # made a decoder, such as BERT
        return batch.real if batch.decoded is None else batch.decoded
    two_sides = any(config.is_encoder_decoder for config in configs)
    return _decoded(batch) if stack.side == "decoder" and two_sides else batch.real


def _decoded(batch: Batch) -> Tensor | None:
    if batch.decoded is not None or batch.real is None or "decoder_input_ids" in batch.inputs:
        return batch.decoded
    return one_later(batch.real)


def _fitting(real: Tensor | None, stream: Tensor) -> Tensor:
    if real is not None and real.shape == stream.shape[:2]:
        return real.to(stream.device)
    return torch.ones(stream.shape[:2], dtype=torch.bool, device=stream.device)


@contextmanager
def watch_encoded(stack: Stack) -> Iterator[list[Tensor]]:
    """While a batch runs, what a decoder's blocks are given of the encoder's stream, which cross attention reads."""
    found: list[Tensor] = []

    def note(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        own = stream_of(args, kwargs)
        given = [one for one in (*args, *kwargs.values()) if isinstance(one, Tensor) and one is not own]
        found[:] = [one for one in given if one.ndim == 3 and one.is_floating_point()]

    with hooked(block.register_forward_pre_hook(note, with_kwargs=True) for block in stack.blocks):
        yield found


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
