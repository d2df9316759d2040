"""Models that accelerate has dispatched: over several devices, or offloaded and read anew whenever they run.

The parameters of an offloaded module are on the meta device. A hook of accelerate's on every module that has any reads
them before that module runs, and lets them go afterwards.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook
from accelerate.utils import OffloadedWeightsLoader, PrefixedDataset
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_compress.errors import OffloadError, UnsupportedModelError, one_line

_OF_HOOKS = ("_hf_hook", "_old_forward", "forward")  # what a hook leaves among a module's attributes


def aligning_hook(module: nn.Module) -> AlignDevicesHook | None:
    """Accelerate's hook on this module that moves inputs or weights to where it runs, if it has one."""
    hook = vars(module).get("_hf_hook")
    return hook if isinstance(hook, AlignDevicesHook) else None


def is_dispatched(model: nn.Module) -> bool:
    """Whether accelerate moves a model's inputs to where each of its parts is, and reads what is offloaded."""
    return aligning_hook(model) is not None


def loading_hook(module: nn.Module) -> AlignDevicesHook | None:
    """The hook on this module if it is one that reads weights, because the module's own are offloaded."""
    hook = aligning_hook(module)
    return hook if hook is not None and hook.weights_map is not None else None


def is_offloaded(module: nn.Module) -> bool:
    """Whether weights of a module are read whenever it runs."""
    return any(loading_hook(part) is not None for part in module.modules())


def without_hook(copied: nn.Module) -> nn.Module:
    """A copy of a module without the hook that was copied along: that one reads for, and runs, the original."""
    if "_hf_hook" in vars(copied):
        for name in _OF_HOOKS:
            vars(copied).pop(name, None)
    return copied


def computing_device(module: nn.Module) -> torch.device:
    """Where a model, or a part of one, takes its inputs: where accelerate runs it, or else where its weights are."""
    tensor = next(module.parameters(), None)
    if aligning_hook(module) is None and tensor is not None and not tensor.is_meta:
        return tensor.device
    for part in module.modules():
        hook = aligning_hook(part)
        if hook is not None and hook.execution_device is not None:
            return torch.device(hook.execution_device)
    return torch.device("cpu") if tensor is None else tensor.device


@dataclass(frozen=True)
class Place:
    """Where a part of a model is.

    Attributes:
        device: it runs there.
        offloaded: whether its weights are elsewhere until then.
        hook: on a module that is there, too; None in a model that is not dispatched.
    """

    device: torch.device
    offloaded: bool = False
    hook: AlignDevicesHook | None = None


def place_of(module: nn.Module) -> Place | None:
    """Where a module is, as the first of its parts tells that has weights and a hook; None if no part does."""
    for part in module.modules():
        hook = aligning_hook(part)
        if hook is not None and any(parameter is not None for parameter in part._parameters.values()):
            return Place(computing_device(part), hook.weights_map is not None, hook)
    return None


def place_at(model: nn.Module, path: str) -> Place:
    """Where the module at `path` is, or belongs if it is new and has no hook yet: with what is around it."""
    names = path.split(".") if path and is_dispatched(model) else []
    for end in range(len(names), 0, -1):
        if (place := place_of(model.get_submodule(".".join(names[:end])))) is not None:
            return place
    return place_of(model) or Place(computing_device(model))


def all_tensors(module: nn.Module) -> Iterator[tuple[dict[str, Any], str, Tensor]]:
    """A module's own parameters and buffers: the table that each is in, its name, and itself."""
    for table in (module._parameters, module._buffers):
        for name, tensor in list(table.items()):
            if tensor is not None:
                yield table, name, tensor


def own_tensors(module: nn.Module, buffers: bool = True) -> Iterator[tuple[dict[str, Any], str, Tensor]]:
    """Those of them that are stored: parameters and, if asked, persistent buffers."""
    for table, name, tensor in all_tensors(module):
        if table is module._parameters or (buffers and name not in module._non_persistent_buffers_set):
            yield table, name, tensor


def source(hook: AlignDevicesHook, name: str) -> tuple[str, Path | None]:
    """The full name under which a hook finds a tensor of its module, and the file where it is; None in memory.

    Raises:
        KeyError: the hook does not find it.
    """
    weights = hook.weights_map
    while isinstance(weights, PrefixedDataset):
        weights, name = weights.dataset, weights.prefix + name
    if isinstance(weights, OffloadedWeightsLoader) and name not in weights.state_dict:
        file = weights.index[name].get("safetensors_file")
        return name, Path(file) if file is not None else Path(weights.save_folder) / f"{name}.dat"
    if name not in weights:
        raise KeyError(name)
    return name, None


def read_value(hook: AlignDevicesHook, name: str) -> Tensor:
    """What a hook reads for a tensor of its module, wherever it puts that; of a file it may be mapped.

    Raises:
        OffloadError: it is not there, or cannot be read.
    """
    full, file = name, None
    try:
        full, file = source(hook, name)
        value: Tensor = hook.weights_map[name]
    except KeyError as error:
        raise OffloadError(f"{full} is offloaded, but not among the offloaded weights: load the model again") from error
    except (OSError, SafetensorError) as error:
        raise OffloadError(f"{full} cannot be read from {file}: {one_line(error)}") from error
    return value


def without_values(model: nn.Module) -> list[str]:
    """The names of parameters and persistent buffers on the meta device that no hook can read."""
    found = []
    for path, module in model.named_modules():
        hook = loading_hook(module)
        for _, name, tensor in own_tensors(module):
            if tensor.is_meta and (hook is None or not _known(hook, name)):
                found.append(f"{path}.{name}".lstrip("."))
    return found


def _known(hook: AlignDevicesHook, name: str) -> bool:
    try:
        source(hook, name)
    except KeyError:
        return False
    return True


def check_readable(model: nn.Module) -> None:
    """Raise where weights that are offloaded could not be read when they are wanted.

    Raises:
        UnsupportedModelError: they are read for several modules at once, or not offloaded but just not there.
        OffloadError: a file is gone.
    """
    if names := without_values(model):
        raise UnsupportedModelError(
            f"{len(names)} parameters, such as {names[0]}, are on the meta device, and no hook of accelerate's could "
            "read them from where they are offloaded: load the model with from_pretrained"
        )
    there: dict[Path, bool] = {}
    for path, module in model.named_modules():
        if (hook := loading_hook(module)) is None:
            continue
        if hook.place_submodules:
            raise UnsupportedModelError(f"{path} is read as a whole: dispatch it without preload_module_classes")
        for _, name, tensor in own_tensors(module):
            if not tensor.is_meta:
                continue
            full, file = source(hook, name)
            if file is not None and not there.setdefault(file, file.is_file()):
                raise OffloadError(f"{file} is gone, from which {full} is read: put it back, or load the model again")


def retie(model: nn.Module) -> None:
    """Make tied weights one Parameter again; accelerate leaves one each behind when it has run an offloaded model."""
    if not isinstance(model, PreTrainedModel) or not is_dispatched(model):
        return
    for target, origin in model.all_tied_weights_keys.items():
        try:
            first, second = model.get_parameter(origin), model.get_parameter(target)
        except AttributeError:  # one of them was taken out or replaced
            continue
        if first is second or first.shape != second.shape or not (first.is_meta or second.is_meta):
            continue
        for name in (origin, target):
            owner, _, last = name.rpartition(".")
            model.get_submodule(owner)._parameters[last] = second if first.is_meta and not second.is_meta else first
