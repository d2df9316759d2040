"""A model in memory that is computed elsewhere, a module at a time: on a device that need not hold it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import cpu_offload
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_compress.anatomy.dispatch import all_tensors, is_dispatched, loading_hook, read_value, without_hook
from hf_compress.errors import UnsupportedModelError, one_line


@contextmanager
def computed_on(model: PreTrainedModel, device: torch.device) -> Iterator[None]:
    """Inside, a model in memory runs on `device`, which has one module's weights at a time.

    Afterwards it is in memory as before, with what has changed meanwhile; what has not is the very same parameters.

    Raises:
        UnsupportedModelError: it is dispatched already, or accelerate cannot do that with it.
    """
    if is_dispatched(model):
        raise UnsupportedModelError(
            f"device={str(device)!r} is for a model in memory; this one was dispatched when it was loaded: load it "
            "with a device_map that computes there, or without one"
        )
    before = _Tensors(model)
    home = model.device
    try:
        try:
            cpu_offload(model, device, state_dict=_parameters(model))
        except Exception as error:
            raise UnsupportedModelError(f"the model cannot be computed on {device}: {one_line(error)}") from error
        yield
    finally:
        _bring_back(model, home, before)


def _parameters(model: PreTrainedModel) -> dict[str, Tensor]:
    """All parameters by all of their names, without a copy."""
    return {name: parameter.data for name, parameter in model.named_parameters(remove_duplicate=False)}


class _Tensors:
    """The parameters and buffers that a model had in memory."""

    def __init__(self, model: nn.Module) -> None:
        self._own = {(module, name): tensor for module in model.modules() for _, name, tensor in all_tensors(module)}

    def in_place_of(self, module: nn.Module, name: str, value: Tensor) -> Tensor | None:
        """What a module had by this name, if it is that memory still."""
        old = self._own.get((module, name))
        return old if old is not None and old.data_ptr() == value.data_ptr() and old.shape == value.shape else None

    def like(self, module: nn.Module, name: str, value: Tensor) -> Tensor:
        """What a module had by this name, if it was the same; else the value."""
        old = self._own.get((module, name))
        same = old is not None and old.shape == value.shape and old.dtype == value.dtype and torch.equal(old, value)
        return old if same and old is not None else value


def _bring_back(model: nn.Module, home: torch.device, before: _Tensors) -> None:
    """Put every tensor into memory, and take the hooks off."""
    shared: dict[int, Tensor] = {}
    for module in model.modules():
        hook = loading_hook(module)
        for table, name, tensor in all_tensors(module):
            if tensor.is_meta and hook is not None:
                value = read_value(hook, name)
                old = before.in_place_of(module, name, value)
                table[name] = shared.setdefault(id(tensor), _like(tensor, value, home) if old is None else old)
            elif tensor.device != home:
                table[name] = before.like(module, name, _like(tensor, tensor, home))
    for module in model.modules():
        _without_hook(module)


def _like(away: Tensor, value: Tensor, home: torch.device) -> Tensor:
    """A value in memory of its own, a parameter if what stands for it is one."""
    here = value.to(home, away.dtype, copy=True)
    return nn.Parameter(here, away.requires_grad) if isinstance(away, nn.Parameter) else here


def _without_hook(module: nn.Module) -> None:
    """Take accelerate's hook off and leave the tensors; its own function would read them all once more."""
    forward = vars(module).get("_old_forward")
    without_hook(module)
    if forward is not None and getattr(forward, "__func__", None) is not type(module).forward:
        vars(module)["forward"] = forward  # the module's own, and not its class's
