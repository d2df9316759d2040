"""Fail closed: the model in memory must be the model that its own saved config and weights would give.

The rebuilt model goes through Transformers' own loader with the tensors of the live one, which it shares, so the check
costs a forward pass and no second copy of the weights. What differs is named: a missing weight, a module's setting (a
sliding window, a layer index), a buffer, or at last the outputs.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import type_before_parametrizations
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from hf_compress.anatomy.anatomy import Anatomy
from hf_compress.anatomy.layout import position_fields
from hf_compress.calibration.capture import forward, inference
from hf_compress.calibration.data import Batch, special_ids
from hf_compress.errors import ParityError, UnsupportedModelError, one_line

_NEW_TOKENS = 3
_TRAINING_ONLY = re.compile("DropPath|StochasticDepth")  # their rates rise with the depth, and count in training alone
_NOT_STRUCTURE = frozenset({"training", "name_or_path", "gradient_checkpointing"})


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
    def of(model: PreTrainedModel, batch: Batch | None = None) -> Probe:
        """A probe for `model` from a calibration batch (its first eight samples, 16 positions), or made up.

        Raises:
            UnsupportedModelError: no inputs can be made up for a model of this kind.
        """
        batch = _shorten(batch) if batch is not None else Batch(_made_up_inputs(model), None)
        try:
            with inference(model):
                forward(model, batch)
        except Exception as error:
            raise UnsupportedModelError(
                f"{type(model).__name__} does not run on the inputs it would be checked with; pass calibration data "
                f"that it runs on ({one_line(error)})"
            ) from error
        try:
            _generate(model, batch)
        except Exception:  # whatever keeps the whole model from generating is no fault of compression
            return Probe(batch, generates=False)
        return Probe(batch, generates=True)


def _shorten(batch: Batch) -> Batch:
    ids = batch.inputs.get("input_ids")
    positions = None if ids is None else ids.shape[1]
    inputs = {
        name: value[:8, :16] if value.ndim >= 2 and value.shape[1] == positions else value[:8]
        for name, value in batch.inputs.items()
    }
    return Batch(inputs, None if batch.real is None else batch.real[:8, :16])


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


def rebuild(model: PreTrainedModel) -> PreTrainedModel:
    """A second model from `model`'s config, as it would be saved, and its very tensors, by Transformers' own loader.

    Raises:
        ParityError: the config is refused, or the weights are not those that it asks for.
    """
    try:
        with quiet(), TemporaryDirectory() as folder:
            model.config.save_pretrained(folder)  # through the file: what is not in config.json is lost here too
            config = type(model.config).from_pretrained(folder)
            loader: Any = type(model).from_pretrained  # annotated as if it never gave the loading report
            rebuilt, info = loader(
                None,
                config=config,
                state_dict=model.state_dict(),
                dtype=model.dtype,
                device_map={"": model.device} if model.device.type != "cpu" else None,
                attn_implementation=_attention(model.config),
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
    if model.can_generate():
        rebuilt.generation_config = model.generation_config  # saved in a file of its own
    return rebuilt.train(model.training)


def _attention(config: PreTrainedConfig) -> dict[str, str]:
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


def check_parity(model: PreTrainedModel, probe: Probe) -> None:
    """Raise unless `model` and its rebuilt copy are the same model.

    Raises:
        UnsupportedModelError: the model itself does not run.
        ParityError: it runs, but its rebuilt copy is another model; the message names what differs.
    """
    rebuilt = rebuild(model)
    difference = next(module_differences(model, rebuilt), None) or next(_buffer_differences(model, rebuilt), None)
    if difference:
        raise ParityError(f"the config cannot express what is left of the model: {difference}{_position_hint(model)}")
    try:
        expected = outputs_on(model, probe)
    except Exception as error:
        raise UnsupportedModelError(
            f"the model does not run after the change: {one_line(error)}{_position_hint(model)}"
        ) from error
    if not same_outputs(expected, outputs_on(rebuilt, probe)):
        raise ParityError(f"a model rebuilt from the config gives other outputs{_position_hint(model)}")


def module_differences(model: PreTrainedModel, rebuilt: PreTrainedModel) -> Iterator[str]:
    """What tells the modules of a rebuilt model from the live one's, in words: classes and settings.

    Outside of the blocks, what only the live model has does no harm: a table for a kind of block of which none is left.
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
            if name in _NOT_STRUCTURE or name.startswith("_") or not isinstance(value, (bool, int, float, str)):
                continue
            if name not in vars(other) and not path.startswith(stacks):
                continue
            if (theirs := vars(other).get(name)) != value and value == value:
                yield f"{path}.{name} would be {theirs!r} instead of {value!r}"


def _class(module: nn.Module | None) -> str:
    """A module's class; that of a parametrized module is made for it alone, and named by what it was before."""
    return "nothing" if module is None else type_before_parametrizations(module).__qualname__


def _buffer_differences(model: PreTrainedModel, rebuilt: PreTrainedModel) -> Iterator[str]:
    stacks = tuple(stack.path for stack in Anatomy(model).stacks)
    buffers = dict(rebuilt.named_buffers())
    for path, buffer in model.named_buffers():
        if path not in buffers and not path.startswith(stacks):
            continue
        if path not in buffers or not same_tensor(buffer, buffers[path]):
            yield f"the buffer {path} would have other values{_dtype_hint(buffer, buffers.get(path))}"


def _dtype_hint(here: Tensor, there: Tensor | None) -> str:
    """What to do about a model that was converted as a whole, which no checkpoint can say."""
    if there is None or here.dtype == there.dtype:
        return ""
    return (
        f" ({there.dtype} instead of {here.dtype}: load the model with dtype=, do not convert it with .to() or .half())"
    )


def outputs_on(model: PreTrainedModel, probe: Probe) -> list[Tensor]:
    """Every tensor of the model's output on the probe, and the tokens it continues it with."""
    with inference(model), torch.random.fork_rng():
        torch.manual_seed(0)
        outputs = list(_tensors(forward(model, probe.batch)))
    if probe.generates:
        outputs.append(_generate(model, probe.batch))
    return outputs


def _generate(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Greedy continuation with the cache, (samples, positions)."""
    if not model.can_generate():
        raise UnsupportedModelError(f"{type(model).__name__} does not generate")
    inputs = {
        name: value.to(model.device, torch.long if not value.is_floating_point() else model.dtype)
        for name, value in batch.inputs.items()
    }
    with inference(model), torch.random.fork_rng(), quiet():
        torch.manual_seed(0)
        generator: Any = model
        return generator.generate(**inputs, max_new_tokens=_NEW_TOKENS, min_new_tokens=_NEW_TOKENS, do_sample=False)


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in a model's output, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for entry in value.values():
            yield from _tensors(entry)
    elif isinstance(value, (list, tuple)):
        for entry in value:
            yield from _tensors(entry)


def same_outputs(first: list[Tensor], second: list[Tensor]) -> bool:
    """Whether two outputs are the same bit for bit (NaN where NaN)."""
    return len(first) == len(second) and all(same_tensor(a, b) for a, b in zip(first, second, strict=True))


def same_tensor(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors have the same shape, dtype and bits (NaN where NaN)."""
    if first.shape != second.shape or first.dtype != second.dtype:
        return False
    return torch.equal(first, second) or bool(((first == second) | (first.isnan() & second.isnan())).all())


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
