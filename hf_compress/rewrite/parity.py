"""Fail closed: the model in memory must be the model that its own saved config and weights would give.

The rebuilt model goes through Transformers' own loader with the tensors of the live one, which it shares, so the check
costs a forward pass and no second copy of the weights. What accelerate has put on a disk both read from there, one
module at a time. What differs is named: a missing weight, a module's setting (a sliding window, a layer index), a
buffer, or at last the outputs.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from tempfile import TemporaryDirectory
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.parametrize import type_before_parametrizations
from transformers import PreTrainedConfig, PreTrainedModel

from hf_compress.anatomy.anatomy import Anatomy
from hf_compress.anatomy.dispatch import is_dispatched
from hf_compress.anatomy.layout import position_fields
from hf_compress.anatomy.offloaded import dispatch_like, loading_device, stand_ins
from hf_compress.calibration.capture import forward, hooked, inference
from hf_compress.errors import ParityError, UnsupportedModelError, one_line
from hf_compress.rewrite.probe import Outputs, Probe, outputs_on, quiet, same_outputs, same_tensor

_TRAINING_ONLY = re.compile("DropPath|StochasticDepth")  # their rates rise with the depth, and count in training alone
_PLAIN = (bool, int, float, str)
# What tells nothing of the structure. Transformers leaves `vocab_size` as it was when embeddings are resized.
_NOT_STRUCTURE = frozenset({"training", "name_or_path", "gradient_checkpointing", "vocab_size"})


def rebuild(model: PreTrainedModel) -> PreTrainedModel:
    """A second model from `model`'s config, as it would be saved, and its very tensors, by Transformers' own loader.

    Raises:
        ParityError: the config is refused, or the weights are not those that it asks for.
    """
    dispatched = is_dispatched(model)
    device = loading_device(model) if dispatched else model.device
    try:
        with quiet(), TemporaryDirectory() as folder:
            model.config.save_pretrained(folder)  # through the file: what is not in config.json is lost here too
            config = type(model.config).from_pretrained(folder)
            loader: Any = type(model).from_pretrained  # annotated as if it never gave the loading report
            rebuilt, info = loader(
                None,
                config=config,
                state_dict=stand_ins(model, device) if dispatched else model.state_dict(),
                dtype=model.dtype,
                device_map={"": device} if device.type != "cpu" else None,
                attn_implementation=attention_of(model.config),
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # reported below, by name
            )
    except Exception as error:
        raise ParityError(
            f"the config cannot express what is left of the model: {one_line(error)}{_position_hint(model)}"
        ) from error
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if keys := sorted(_key(entry) for entry in info[kind]):
            raise ParityError(
                f"a model rebuilt from the config would have {kind.replace('_', ' ')}: {', '.join(keys[:4])}"
                f"{_position_hint(model)}"
            )
    if dispatched:
        dispatch_like(rebuilt, model)
    if model.can_generate():
        rebuilt.generation_config = model.generation_config  # saved in a file of its own
    return rebuilt.train(model.training)


def attention_of(config: PreTrainedConfig) -> dict[str, str]:
    """The attention implementation of a config and of the configs inside it, as the loader takes them."""
    inner = {name: getattr(config, name, None) for name in config.sub_configs}
    chosen = {name: sub._attn_implementation for name, sub in inner.items() if isinstance(sub, PreTrainedConfig)}
    return {"": config._attn_implementation, **chosen}


def _key(entry: Any) -> str:
    """A weight's name in a loading report, where a mismatched one comes with its two shapes."""
    if isinstance(entry, str):
        return entry
    name, *shapes = entry
    return f"{name} ({' instead of '.join(str(tuple(shape)) for shape in reversed(shapes))})"


def check_parity(model: PreTrainedModel, probe: Probe) -> Outputs:
    """Raise unless `model` and its rebuilt copy are the same model.

    Returns:
        The outputs of both on the probe.

    Raises:
        UnsupportedModelError: the model itself does not run.
        ParityError: it runs, but its rebuilt copy is another model; the message names what differs.
    """
    rebuilt = rebuild(model)
    if difference := _difference(model, rebuilt, probe):
        raise ParityError(f"the config cannot express what is left of the model: {difference}{_position_hint(model)}")
    try:
        expected = outputs_on(model, probe)
    except Exception as error:
        raise UnsupportedModelError(
            f"the model does not run after the change: {one_line(error)}{_position_hint(model)}"
        ) from error
    if not same_outputs(expected, outputs_on(rebuilt, probe)):
        raise ParityError(f"a model rebuilt from the config gives other outputs{_position_hint(model)}")
    return expected


def _difference(model: PreTrainedModel, rebuilt: PreTrainedModel, probe: Probe) -> str | None:
    """What tells the modules and buffers of two models apart, in words."""
    difference = next(module_differences(model, rebuilt, unset=()), None) or next(
        _buffer_differences(model, rebuilt), None
    )
    if difference or (difference := next(module_differences(model, rebuilt), None)) is None:
        return difference
    reached: set[str] = set()
    hooks = (
        module.register_forward_hook(lambda *_, path=path: reached.add(path))
        for path, module in rebuilt.named_modules()
    )
    try:  # a module may find out when it first runs (Gemma 4, how much to pad), and some do not on this probe
        with inference(rebuilt), hooked(hooks):
            forward(rebuilt, probe.batch)
            return next(module_differences(model, rebuilt, reached), None)
    except Exception:  # it does not run, being another model
        return difference


def module_differences(
    model: PreTrainedModel, rebuilt: PreTrainedModel, unset: Collection[str] | None = None
) -> Iterator[str]:
    """What tells the modules of a rebuilt model from the live one's, in words: classes and settings.

    Outside of the blocks, what only the live model has does no harm: a table for a kind of block of which none is left,
    or its name in a list. `unset`: the paths of modules of which settings count that are None in the rebuilt one; all
    modules' when None.
    """
    stacks = tuple(stack.path for stack in Anatomy(model).stacks)
    others = dict(rebuilt.named_modules())
    for path, module in model.named_modules():
        other = others.get(path)
        here, there = _class(module), _class(other)
        if _TRAINING_ONLY.search(f"{here} {there}"):
            continue
        if here != there:
            yield f"{path} would be {there} instead of {here}"
            continue
        for name, value in vars(module).items():
            if name in _NOT_STRUCTURE or name.startswith("_") or not _is_setting(value):
                continue
            if name not in vars(other) and not path.startswith(stacks):
                continue
            theirs = vars(other).get(name)
            if theirs is None and unset is not None and path not in unset:
                continue
            if not path.startswith(stacks) and isinstance(value, list) and isinstance(theirs, list):
                value = _in_order([kind for kind in value if kind in theirs])
                theirs = _in_order(theirs)
            if _listed(theirs) != _listed(value) and value == value:
                yield f"{path}.{name} would be {theirs!r} instead of {value!r}"


def _is_setting(value: Any) -> bool:
    """Whether an attribute is plain data: a word, a number, or a list of such."""
    return isinstance(value, _PLAIN) or (isinstance(value, (list, tuple)) and all(isinstance(v, _PLAIN) for v in value))


def _listed(value: Any) -> Any:
    """A tuple as the list that it is in config.json."""
    return list(value) if isinstance(value, tuple) else value


def _in_order(kinds: list[Any]) -> list[Any]:
    """Names of kinds in one order: a module that lists each once may have put them into a set, which has none."""
    named = all(isinstance(kind, str) for kind in kinds) and len(set(kinds)) == len(kinds)
    return sorted(kinds) if named else kinds


def _class(module: nn.Module | None) -> str:
    """A module's class; that of a parametrized module is made for it alone, and named by what it was before."""
    return "nothing" if module is None else type_before_parametrizations(module).__qualname__


def _buffer_differences(model: PreTrainedModel, rebuilt: PreTrainedModel) -> Iterator[str]:
    stacks = tuple(stack.path for stack in Anatomy(model).stacks)
    buffers = dict(rebuilt.named_buffers())
    for path, buffer in model.named_buffers():
        if path not in buffers and not path.startswith(stacks):
            continue
        if buffer.is_meta:  # offloaded: the rebuilt model reads the same one, if it is of this shape
            same = path in buffers and buffers[path].shape == buffer.shape and buffers[path].dtype == buffer.dtype
        else:
            same = path in buffers and same_tensor(buffer, buffers[path])
        if not same:
            yield f"the buffer {path} would have other values{_dtype_hint(buffer, buffers.get(path))}"


def _dtype_hint(here: Tensor, there: Tensor | None) -> str:
    """What to do about a model that was converted as a whole, which no checkpoint can say."""
    if there is None or here.dtype == there.dtype:
        return ""
    return (
        f" ({there.dtype} instead of {here.dtype}: load the model with dtype=, do not convert it with .to() or .half())"
    )


def _position_hint(model: PreTrainedModel) -> str:
    """The config's fields that place blocks, which are what is usually in the way."""
    fields: dict[str, Any] = {}
    for stack in Anatomy(model).stacks:
        for config, counts in stack.configs:
            if model.config.is_encoder_decoder:  # one side's count may be used for the other's cache
                fields |= {name: vars(config)[name] for name in counts}
            fields |= position_fields(config, len(stack))
    listed = ", ".join(
        name if isinstance(value, (list, tuple, str)) else f"{name}={value}" for name, value in fields.items()
    )
    return f" (the config places blocks by {listed})" if listed else ""
