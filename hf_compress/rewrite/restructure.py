"""Carries out edits of modules: on a live model, or on one that is being loaded and has no memory yet.

New tensors are made on the meta device, so nothing is allocated before everything is checked. The loader fills them
from the checkpoint, `apply` from the plan.
"""

from __future__ import annotations

import copy
import re
from collections import Counter, OrderedDict
from dataclasses import dataclass
from functools import cached_property, singledispatch
from itertools import chain, takewhile

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hf_compress.anatomy.experts import check_experts, expert_tables
from hf_compress.anatomy.parts import expert_axes, is_linear, linear_widths
from hf_compress.anatomy.undo import Undo
from hf_compress.errors import PlanError, UnsupportedModelError
from hf_compress.modules.activation import BlendedActivation
from hf_compress.modules.bottleneck import BOTTLENECK, Bottleneck, through_bottleneck
from hf_compress.modules.experts import SeparateExperts
from hf_compress.modules.packed import MixedPrecisionLinear, Packing, filled
from hf_compress.modules.sealed import Sealed
from hf_compress.modules.sparse import SparseLinear, row_length
from hf_compress.plan.edits import (
    Edit,
    InsertBottleneck,
    LinearFFN,
    NarrowAttention,
    NarrowExperts,
    NarrowFFN,
    PackLinear,
    ReplaceActivation,
    Seal,
    SparsifyLinear,
    SplitExperts,
)

# What attention calls its heads, those of keys and values, and the width of all heads.
_HEADS = re.compile(r"(num_|n_)(attention_)?heads?")
GROUP_NAMES = re.compile(r"num_(key_value|kv)_heads")
_ALL = re.compile(r"all_head_size|inner_dim")
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


@singledispatch
def restructure(edit: Edit, site: Site) -> None:
    """Change the modules that `edit` names.

    Raises:
        PlanError: the model has no such modules, they are of another kind or shared, or sizes do not fit.
    """
    raise PlanError(f"{type(edit).__name__} is no edit of modules")


@restructure.register
def _(edit: NarrowFFN, site: Site) -> None:
    output = site.linear(edit.output)
    old, hidden = linear_widths(output)
    linears = {path: site.linear(path) for path in edit.inputs}
    if edit.width > old:
        raise PlanError(f"the FFN of {edit.output} has {old} hidden units; the plan asks for {edit.width}")
    _refuse_other_parts(site, edit, old, hidden)
    for path, linear in linears.items():
        inputs, outputs = linear_widths(linear)
        if inputs != hidden or outputs not in (old, 2 * old):
            raise PlanError(f"{path} maps {inputs} to {outputs} and is no input of an FFN {hidden} → {old} → {hidden}")
        site.replace(path, resized(linear, inputs, edit.width * (outputs // old)))
    bias = edit.bias or output.bias is not None
    site.replace(edit.output, resized(output, edit.width, hidden, bias))
    for owner in {path.rpartition(".")[0] for path in (*edit.inputs, edit.output)}:
        _set_width(site, owner, old, edit.width)


def _refuse_other_parts(site: Site, edit: NarrowFFN, width: int, hidden: int) -> None:
    """An FFN with, say, a norm of its hidden units cannot be narrowed by its projections alone."""
    paths = (*edit.inputs, edit.output)
    scope = shared_scope(paths)
    if not scope or width == hidden:  # then nothing tells such parts from those of the stream
        return
    for name, tensor in site.module(scope).named_parameters():
        if width in tensor.shape and not f"{scope}.{name}".startswith(tuple(f"{path}." for path in paths)):
            raise PlanError(f"{scope}.{name} is {tuple(tensor.shape)}: it, too, has an entry for each hidden unit")


@restructure.register
def _(edit: NarrowAttention, site: Site) -> None:
    query, key, value, output = (site.linear(path) for path in edit.paths)
    (hidden, wide), (_, narrow) = linear_widths(query), linear_widths(key)
    if linear_widths(value)[1] != narrow or linear_widths(output)[0] != wide:
        raise PlanError(f"{edit.query}, {edit.key}, {edit.value} and {edit.output} are not those of one attention")
    heads, groups = wide // edit.width, narrow // edit.width
    if wide % edit.width or narrow % edit.width or edit.heads * groups != edit.groups * heads or edit.heads > heads:
        raise PlanError(
            f"the attention of {edit.query} has {heads} heads on {groups} of {edit.width}; the plan asks for "
            f"{edit.heads} on {edit.groups}"
        )
    kept, shared = edit.heads * edit.width, edit.groups * edit.width
    site.replace(edit.query, resized(query, hidden, kept))
    site.replace(edit.key, resized(key, linear_widths(key)[0], shared))
    site.replace(edit.value, resized(value, linear_widths(value)[0], shared))
    site.replace(edit.output, resized(output, kept, linear_widths(output)[1]))
    owner = site.module(edit.query.rpartition(".")[0])
    for name, number in list(vars(owner).items()):
        for pattern, old, new in ((_HEADS, heads, edit.heads), (GROUP_NAMES, groups, edit.groups), (_ALL, wide, kept)):
            if type(number) is int and number == old and pattern.fullmatch(name):
                site.undo.set(owner, name, new)


@restructure.register
def _(edit: NarrowExperts, site: Site) -> None:
    experts = site.module(edit.experts)
    tables = {name: table for name, table in experts.named_parameters(recurse=False) if table.ndim >= 2}
    if not tables:
        raise PlanError(f"{edit.experts} is no module that holds the tensors of all experts")
    axes = expert_axes(experts)
    if edit.width > axes.width:
        raise PlanError(f"the experts of {edit.experts} have {axes.width} hidden units; the plan asks for {edit.width}")
    new = copy.copy(experts)
    new._parameters = dict(experts._parameters)
    for name, (axis, times) in axes.of.items():
        shape = list(tables[name].shape)
        shape[axis] = edit.width * times
        new._parameters[name] = _empty(shape, tables[name])
    site.replace(edit.experts, new)
    _set_width(site, edit.experts, axes.width, edit.width)


@restructure.register
def _(edit: SplitExperts, site: Site) -> None:
    experts = site.module(edit.experts)
    try:
        check_experts(experts, edit.experts)
        tables = expert_tables(experts)
    except UnsupportedModelError as error:
        raise PlanError(f"the plan takes {edit.experts} apart: {error}") from None
    up, down = tables["up.weight"], tables["down.weight"]
    count, up_width, hidden = up.shape
    sizes = (hidden, up_width, down.shape[2], "up.bias" in tables)
    new = SeparateExperts(experts, count, sizes, device="meta", dtype=up.dtype)
    for expert in new.experts:
        for name, table in tables.items():
            expert.get_parameter(name).requires_grad_(table.requires_grad)
    site.replace(edit.experts, new)


@restructure.register
def _(edit: LinearFFN, site: Site) -> None:
    output = site.linear(edit.output)
    inner, hidden = linear_widths(output)
    for path in edit.inputs:
        if linear_widths(site.linear(path))[0] != hidden:
            raise PlanError(f"{path} does not read a stream of width {hidden}, to which {edit.output} writes")
    if edit.rank is not None and edit.rank > min(inner, hidden):
        raise PlanError(
            f"the FFN of {edit.output} is {hidden} → {inner} → {hidden}; the plan asks for rank {edit.rank}"
        )
    last = resized(output, edit.rank or hidden, hidden, edit.bias)
    first = resized(site.linear(edit.inputs[-1]), hidden, edit.rank, False) if edit.rank else None
    paths = linear_ffn_paths(edit, site)
    if scope := _scope_of(site, (*edit.inputs, edit.output)):
        layers = [first, last] if first else [last]
        named = zip((_name(path) for path in paths), layers, strict=True)
        site.replace(scope, nn.Sequential(OrderedDict(named)))
        return
    site.replace(edit.output, last)
    if scope := _scope_of(site, edit.inputs):
        site.replace(scope, nn.Sequential(OrderedDict([(_name(paths[0]), first)] if first else [])))
    elif len(edit.inputs) == 1 and edit.activation is not None:
        if not isinstance(site.module(edit.activation), BlendedActivation):
            _activation(site, edit.activation)
        site.replace(edit.inputs[0], first or nn.Identity())
        site.replace(edit.activation, nn.Identity())
    else:
        raise PlanError(f"the FFN of {edit.output} stands among other parts of its block and cannot be one linear map")


def linear_ffn_paths(edit: LinearFFN, site: Site) -> tuple[str, ...]:
    """Where the maps stand that a linear FFN is left with: with a rank, the first factor, and the last map.

    They take the places and names of the last input projection and of the output projection. Where all that holds
    those is replaced, a name tells the way that there was to it.
    """
    first, last = edit.inputs[-1], edit.output
    if whole := _scope_of(site, (*edit.inputs, edit.output)):
        first, last = _directly_in(whole, first), _directly_in(whole, last)
    elif scope := _scope_of(site, edit.inputs):
        first = _directly_in(scope, first)
    return (first, last) if edit.rank else (last,)


def _directly_in(scope: str, path: str) -> str:
    return f"{scope}.{path[len(scope) + 1 :].replace('.', '_')}"


@restructure.register
def _(edit: InsertBottleneck, site: Site) -> None:
    block = site.module(edit.block)
    there = block._modules.get(BOTTLENECK)
    if there is not None and not (isinstance(there, Bottleneck) and there.form.gated):
        raise PlanError(f"{edit.block} has a bottleneck already; put it behind another block")
    example = next((p for p in block.parameters() if p.ndim == 1 and len(p) == edit.hidden), None)
    example = example if example is not None else next((p for p in block.parameters() if edit.hidden in p.shape), None)
    if example is None:
        raise PlanError(f"nothing in {edit.block} is {edit.hidden} wide, as the plan says of its residual stream")
    bottleneck = Bottleneck(edit.hidden, edit.width, edit.form, device="meta", dtype=example.dtype)
    site.undo.put(block._modules, BOTTLENECK, bottleneck.train(block.training))
    if there is None:
        # First of all hooks: those by which Transformers collects hidden states, on a model that has been asked for
        # them, would otherwise see what the block gave. On a model that is loaded there are none yet.
        site.undo.later(block.register_forward_hook(through_bottleneck, prepend=True).remove)


@restructure.register
def _(edit: PackLinear, site: Site) -> None:
    linear = site.linear(edit.module)
    inputs, outputs = linear_widths(linear)
    try:
        row = filled(inputs, edit.group_size)
        packing = Packing(outputs, row, edit.group_size, edit.planes, edit.symmetric)
    except ValueError as error:
        raise PlanError(f"{edit.module}: {error}") from None
    bias, dtype = linear.bias is not None, next(linear.parameters()).dtype
    new = MixedPrecisionLinear(packing, bias, inputs, device="meta", dtype=dtype)
    site.replace(edit.module, _trained_as(linear, new))


@restructure.register
def _(edit: SparsifyLinear, site: Site) -> None:
    linear = site.linear(edit.module)
    inputs, outputs = linear_widths(linear)
    dtype = next(linear.parameters()).dtype
    try:
        row = row_length(edit.kept, inputs * outputs - edit.kept if edit.rest else 0, edit.group_size)
        packing = Packing(1, row, edit.group_size, edit.planes, edit.symmetric) if edit.planes else None
        bias = linear.bias is not None
        new = SparseLinear(inputs, outputs, edit.kept, bias, packing, edit.rest, device="meta", dtype=dtype)
    except ValueError as error:
        raise PlanError(f"{edit.module}: {error}") from None
    site.replace(edit.module, _trained_as(linear, new))


@restructure.register
def _(edit: ReplaceActivation, site: Site) -> None:
    activation = _activation(site, edit.activation)
    dtype = next(site.model.parameters()).dtype
    site.replace(edit.activation, BlendedActivation(activation, edit.blend, edit.width, device="meta", dtype=dtype))


@restructure.register
def _(edit: Seal, site: Site) -> None:
    module = site.module(edit.module)
    if module._parameters.get("weight") is None:
        raise PlanError(f"{edit.module} has no weight to seal")
    site.replace(edit.module, Sealed(module))


def resized(linear: nn.Module, inputs: int, outputs: int, bias: bool | None = None) -> nn.Module:
    """A linear map like `linear`, of other widths, without memory. `bias`: with or without one; as it was when None."""
    new = copy.copy(linear)
    new._parameters = dict(linear._parameters)
    weight, old_bias = linear._parameters["weight"], linear._parameters.get("bias")
    assert weight is not None
    transposed = isinstance(linear, Conv1D)
    new._parameters["weight"] = _empty([inputs, outputs] if transposed else [outputs, inputs], weight)
    # Conv1D cannot do without a bias.
    has_bias = transposed or (old_bias is not None if bias is None else bias)
    new._parameters["bias"] = _empty([outputs], old_bias if old_bias is not None else weight) if has_bias else None
    names = ("nx", "nf") if transposed else ("in_features", "out_features")
    vars(new).update(zip(names, (inputs, outputs), strict=True))
    return new


def _empty(shape: list[int], like: Tensor) -> nn.Parameter:
    """A parameter without memory, of the dtype of another and trained if that one is."""
    return nn.Parameter(torch.empty(shape, dtype=like.dtype, device="meta"), requires_grad=like.requires_grad)


def _trained_as(linear: nn.Module, new: nn.Module) -> nn.Module:
    """What takes the place of a linear map, with its parameters trained where those of the map are."""
    for name, parameter in new.named_parameters():
        parameter.requires_grad_(linear.get_parameter(name).requires_grad)
    return new


def _name(path: str) -> str:
    return path.rpartition(".")[2]


def _scope_of(site: Site, paths: tuple[str, ...]) -> str:
    """The innermost module that holds all of `paths` and has no tensors but theirs; "" where there is none."""
    scope = shared_scope(paths)
    if not scope:
        return ""
    inside = set().union(*(site.tensors(path) for path in paths))
    blended = [path for path, module in site.module(scope).named_modules() if isinstance(module, BlendedActivation)]
    inside = inside.union(*(site.tensors(f"{scope}.{path}") for path in blended))  # which goes with the FFN
    # The other parts of the module are gone with it, so an FFN with a norm or a convolution inside is no such module.
    module = site.module(scope)  # of which one tensor is seldom looked at: it may be all of the model
    return scope if all(tensor in inside for tensor in chain(module.parameters(), module.buffers())) else ""


def shared_scope(paths: tuple[str, ...]) -> str:
    """The path of the innermost module around all of `paths`."""
    columns = zip(*(path.split(".")[:-1] for path in paths), strict=False)
    return ".".join(column[0] for column in takewhile(lambda column: len(set(column)) == 1, columns))


def _activation(site: Site, path: str) -> nn.Module:
    module = site.module(path)
    if any(True for _ in module.children()) or any(True for _ in module.parameters()):
        raise PlanError(f"the plan takes {path} for an activation, but it is {type(module).__name__} with parts")
    return module


def _set_width(site: Site, path: str, old: int, new: int) -> None:
    """Tell a module that keeps the number of hidden units by a telling name."""
    owner = site.module(path)
    for name, value in list(vars(owner).items()):
        if value == old and type(value) is int and _WIDTH_NAMES.search(name):
            site.undo.set(owner, name, new)
