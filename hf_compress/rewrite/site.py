"""Where module edits are carried out: on a live model, or on one that is being loaded and has no memory yet.

New tensors are made on the meta device, so nothing is allocated before everything is checked. The loader fills them
from the checkpoint, `apply` from the plan.
"""

from __future__ import annotations

import copy
import re
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from itertools import takewhile

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hf_compress.anatomy.dispatch import without_hook
from hf_compress.anatomy.parts import is_linear
from hf_compress.anatomy.undo import Undo
from hf_compress.errors import PlanError

_WIDTH_NAMES = re.compile(r"intermediate|inner|ffn|ff_dim|dim_ff|d_ff|expert_dim")


@dataclass(frozen=True)
class Site:
    """A model that is being changed: finds its modules by path and replaces them, each step recorded in `undo`."""

    model: PreTrainedModel
    undo: Undo

    def module(self, path: str) -> nn.Module:
        module: nn.Module = self.model
        for name in path.split("."):
            child = module._modules.get(name)
            if child is None:
                raise PlanError(f"{type(self.model).__name__} has no module {path}, which the plan changes")
            module = child
        return module

    def linear(self, path: str) -> nn.Module:
        """The linear map at `path`, which nobody else uses."""
        module = self.module(path)
        if not is_linear(module) or is_parametrized(module):
            raise PlanError(f"the plan takes {path} for a plain linear map, but it is {type(module).__name__}")
        if self._users[module] > 1 or self._users[module.weight] > 1:
            users = [p for p, m in self.model.named_modules(remove_duplicate=False) if m is module]
            weights = [n for n, p in self.model.named_parameters(remove_duplicate=False) if p is module.weight]
            raise PlanError(
                f"{path} is shared ({', '.join(users if len(users) > 1 else weights)}) and cannot be changed"
            )
        return module

    @cached_property
    def _users(self) -> Counter[nn.Module | Tensor]:
        """How many names each module and parameter has at first; what is put in later is nobody else's."""
        modules = (module for _, module in self.model.named_modules(remove_duplicate=False))
        parameters = (parameter for _, parameter in self.model.named_parameters(remove_duplicate=False))
        return Counter([*modules, *parameters])

    def replace(self, path: str, new: nn.Module) -> None:
        """Put another module in the place of the one at `path`."""
        old = self.module(path)
        owner, _, name = path.rpartition(".")
        new.train(old.training)
        self.undo.put((self.module(owner) if owner else self.model)._modules, name, new)

    def tensors(self, path: str) -> set[Tensor]:
        """Every parameter and buffer in the module at `path`."""
        module = self.module(path)
        return {*module.parameters(), *module.buffers()}


def resized(linear: nn.Module, inputs: int, outputs: int, bias: bool | None = None) -> nn.Module:
    """A linear map like `linear`, of other widths, without memory. `bias`: with or without one; as it was when None."""
    new = without_hook(copy.copy(linear))
    new._parameters = dict(linear._parameters)
    weight, old_bias = linear._parameters["weight"], linear._parameters.get("bias")
    assert weight is not None
    transposed = isinstance(linear, Conv1D)
    new._parameters["weight"] = empty([inputs, outputs] if transposed else [outputs, inputs], weight)
    # Conv1D cannot do without a bias.
    has_bias = transposed or (old_bias is not None if bias is None else bias)
    new._parameters["bias"] = empty([outputs], old_bias if old_bias is not None else weight) if has_bias else None
    names = ("nx", "nf") if transposed else ("in_features", "out_features")
    vars(new).update(zip(names, (inputs, outputs), strict=True))
    return new


def empty(shape: list[int], like: Tensor) -> nn.Parameter:
    """A parameter without memory, of the dtype of another and trained if that one is."""
    return nn.Parameter(torch.empty(shape, dtype=like.dtype, device="meta"), requires_grad=like.requires_grad)


def shared_scope(paths: tuple[str, ...]) -> str:
    """The path of the innermost module around all of `paths`."""
    columns = zip(*(path.split(".")[:-1] for path in paths), strict=False)
    return ".".join(column[0] for column in takewhile(lambda column: len(set(column)) == 1, columns))


def set_width(site: Site, path: str, old: int, new: int) -> None:
    """Tell a module that keeps the number of hidden units by a telling name."""
    owner = site.module(path)
    for name, value in list(vars(owner).items()):
        if value == old and type(value) is int and _WIDTH_NAMES.search(name):
            site.undo.set(owner, name, new)
