"""Models that accelerate has spread over devices and disks: where their tensors are, and where they compute.

A parameter that is on the disk, or on the CPU while a GPU computes, is on meta in the model. A hook on its module, or
on one around it, knows where it is kept, and has it there while the module runs.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook, SequentialHook, add_hook_to_module
from accelerate.utils import OffloadedWeightsLoader, PrefixedDataset
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_compress.anatomy.dispatch import computing_device
from hf_compress.errors import UnsupportedModelError


def align_hooks(module: nn.Module) -> Iterator[AlignDevicesHook]:
    """The hooks on a module that place its tensors and inputs."""
    hook = vars(module).get("_hf_hook")
    for one in hook.hooks if isinstance(hook, SequentialHook) else (hook,):
        if isinstance(one, AlignDevicesHook):
            yield one


def stored(model: nn.Module, name: str) -> Tensor:
    """The values of a tensor that is on meta in `model`; on the CPU, mapped from their file where that can be.

    Raises:
        UnsupportedModelError: no hook knows them.
    """
    parts = name.split(".")
    for end in range(len(parts) - 1, -1, -1):
        for hook in align_hooks(model.get_submodule(".".join(parts[:end]))):
            if hook.offload and hook.weights_map is not None:
                return _on_cpu(hook.weights_map)[".".join(parts[end:])]
    raise UnsupportedModelError(f"{name} is on the meta device, and no hook of accelerate's knows its values")


def values_of(model: nn.Module) -> Iterator[Tensor]:
    """The values of all parameters, in the order of their names in the model, wherever they are."""
    for name, parameter in model.named_parameters():
        yield stored(model, name) if parameter.is_meta else parameter


def _on_cpu(weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The same tensors, left on the CPU where they would be read right to the device that computes."""
    if isinstance(weights, PrefixedDataset):
        return PrefixedDataset(_on_cpu(weights.dataset), weights.prefix)
    if isinstance(weights, OffloadedWeightsLoader):
        left = copy.copy(weights)
        left.device = None
        return left
    return weights


def whole_state(model: PreTrainedModel) -> dict[str, Tensor]:
    """`model.state_dict()` with the values of what is offloaded; tied weights are one tensor, as in a model in memory.

    Raises:
        UnsupportedModelError: as for `stored`.
    """
    state = model.state_dict()
    meta = {name for name, tensor in state.items() if isinstance(tensor, Tensor) and tensor.is_meta}
    state |= {name: stored(model, name).to(state[name].dtype) for name in meta}
    for name, source in model.all_tied_weights_keys.items():
        if {name, source} <= meta and torch.equal(state[name], state[source]):
            state[name] = state[source]
    return state


# --- a second model with the same tensors -----------------------------------------------------------------------------


def stand_ins(model: PreTrainedModel, device: torch.device) -> dict[str, Tensor]:
    """A state as that of `model` by names, shapes and dtypes, in which each tensor is one number, seen many times."""
    state: dict[str, Any] = model.state_dict()
    return {
        name: torch.empty(1, dtype=tensor.dtype, device=device).expand(tensor.shape)
        if isinstance(tensor, Tensor)
        else tensor
        for name, tensor in state.items()
    }


def loading_device(model: PreTrainedModel) -> torch.device:
    """Where Transformers made the tables of a dispatched model that no file has, such as rotary frequencies.

    On the CPU for parts on the disk, and there a power may be rounded differently than on a GPU.
    """
    placed: dict[str, Any] = getattr(model, "hf_device_map", {})
    path = next((path for path, module in model.named_modules() if module._non_persistent_buffers_set), None)
    around = [name for name in placed if path is not None and f"{path}.".startswith(f"{name}." if name else "")]
    if not around:
        return computing_device(model)
    device = placed[max(around, key=len)]
    return torch.device("cpu" if device == "disk" else device)


def dispatch_like(twin: PreTrainedModel, model: PreTrainedModel) -> None:
    """Have `twin`, loaded from `stand_ins` of `model`, compute with the very tensors of `model`, where that does.

    What is in memory is shared; what is offloaded `twin` reads from the same place when it is needed.
    """
    others = dict(twin.named_modules())
    for path, module in model.named_modules():
        if (other := others.get(path)) is None:
            continue
        _share(module, other)
        if "_hf_hook" in vars(module):
            add_hook_to_module(other, _copied(module._hf_hook))


def _share(module: nn.Module, other: nn.Module) -> None:
    """Give `other` the parameters and buffers of `module`, in its own dtypes; computed buffers it keeps."""
    for name, mine in other._parameters.items():
        theirs = module._parameters.get(name)
        if mine is not None and theirs is not None:
            tensor = theirs.detach().to(mine.dtype)
            other._parameters[name] = nn.Parameter(tensor, requires_grad=mine.requires_grad)
    for name, buffer in other._buffers.items():
        shown = module._buffers.get(name)
        if buffer is not None and shown is not None:
            computed = name in other._non_persistent_buffers_set
            other._buffers[name] = buffer.to(shown.device) if computed else shown.detach().to(buffer.dtype)


def _copied(hook: Any) -> Any:
    """A hook for another module that reads the same weights."""
    return SequentialHook(*map(copy.copy, hook.hooks)) if isinstance(hook, SequentialHook) else copy.copy(hook)
