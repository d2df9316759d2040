"""Drafts of plans with one edit each: what to change in words of the anatomy, and tensors in mathematical layout.

A method decides which units stay and what a map becomes; how a family stores that (transposed, fused, interleaved, with
experts in one tensor) is settled here. Drafts of the same model add up: `narrow_ffn(…) + linear_ffn(…)`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hf_compress.anatomy.anatomy import Block
from hf_compress.anatomy.experts import check_experts, expert_tables
from hf_compress.anatomy.heads import Heads, attention_heads, check_distances
from hf_compress.anatomy.parts import FFN, ExpertAxes, expert_axes, linear_map
from hf_compress.anatomy.undo import Undo
from hf_compress.errors import UnsupportedModelError
from hf_compress.modules.activation import Blend
from hf_compress.modules.bottleneck import BOTTLENECK, Bottleneck
from hf_compress.modules.packed import pack
from hf_compress.modules.sparse import GROUP, at_ones, pack_mask, pack_row
from hf_compress.numerics.factor import Factor
from hf_compress.plan.plan import Plan
from hf_compress.rewrite.edits.attention import NarrowAttention
from hf_compress.rewrite.edits.bottleneck import InsertBottleneck
from hf_compress.rewrite.edits.experts import NarrowExperts, SplitExperts
from hf_compress.rewrite.edits.ffn import LinearFFN, NarrowFFN, ReplaceActivation
from hf_compress.rewrite.edits.packed import PackLinear, SparsifyLinear
from hf_compress.rewrite.record import missing
from hf_compress.rewrite.site import Site

Affine = tuple[Tensor, Tensor | None]  # a matrix that multiplies from the right, and a bias


@torch.no_grad()
def narrow_ffn(block: Block, units: Sequence[int] | Tensor, writes: Affine | None = None) -> Plan:
    """Keep the hidden units `units` of a block's FFN, in this order.

    Args:
        writes: a new output projection, (units, hidden), and its bias (hidden) if it is to have another than it has.

    Raises:
        ValueError: units that it does not have, or a unit twice.
    """
    ffn = _ffn(block)
    kept = _checked(torch.as_tensor(units), ffn.width)
    down = linear_map(block.model.get_submodule(_dense(ffn, block)[1]))
    return _narrowed(block, ffn, lambda rows: rows[..., kept.to(rows.device)], writes or (down[kept], None))


@torch.no_grad()
def merge_units(block: Block, labels: Tensor, writes: Affine | None = None) -> Plan:
    """Make one hidden unit of each cluster: it reads the mean of what its members read, and writes the sum.

    Args:
        labels: the cluster of each hidden unit of the block's FFN, (width), numbered from 0, none empty.
        writes: as for `narrow_ffn`, in the place of the sums.

    Raises:
        ValueError: labels that are not one for each unit, or that leave a cluster empty.
    """
    ffn = _ffn(block)
    fits = labels.shape == (ffn.width,) and not labels.is_floating_point() and int(labels.min()) >= 0
    sizes = torch.bincount(labels) if fits else labels.new_zeros(1)
    if not bool(sizes.all()):
        raise ValueError(f"labels must give each of {ffn.width} hidden units a cluster, none of them empty")

    def added(rows: Tensor) -> Tensor:
        zeros = rows.new_zeros(*rows.shape[:-1], len(sizes), dtype=torch.float32)
        return zeros.index_add_(-1, labels.to(rows.device), rows.float())

    down = linear_map(block.model.get_submodule(_dense(ffn, block)[1]))
    return _narrowed(block, ffn, lambda rows: added(rows) / sizes.to(rows.device), writes or (added(down.T).T, None))


def _narrowed(block: Block, ffn: FFN, reduce: Callable[[Tensor], Tensor], writes: Affine) -> Plan:
    """An FFN with fewer hidden units: `reduce` turns (…, width) into (…, units) where they are read into."""
    model, (inputs, output) = block.model, _dense(ffn, block)
    halves = 2 if ffn.kind == "fused" else 1
    tensors: dict[str, Tensor] = {}

    def fewer(table: Tensor) -> Tensor:
        return torch.cat([reduce(part) for part in table.chunk(halves, -1)], -1)

    for name in inputs:
        module = model.get_submodule(name)
        bias = module._parameters.get("bias")
        tensors |= _linear(model, name, fewer(linear_map(module)), None if bias is None else fewer(bias))
    matrix, added = writes
    old = model.get_submodule(output)._parameters.get("bias")
    tensors |= _linear(model, output, matrix, old if added is None else added)
    return Plan((NarrowFFN(inputs, output, len(matrix), added is not None and old is None),), tensors)


@torch.no_grad()
def narrow_attention(block: Block, groups: Sequence[int] | Tensor, writes: Affine | None = None) -> Plan:
    """Keep the key and value heads `groups` of a block's attention, in this order, with the queries that read them.

    Args:
        writes: a new output projection, (heads left · width, hidden), and its bias if it is to have another one.

    Raises:
        UnsupportedModelError: heads that cannot be told apart.
        ValueError: heads that it does not have, or a head twice.
    """
    model, path, heads = block.model, block.path, heads_of(block)
    kept = _checked(torch.as_tensor(groups), heads.groups, "key and value heads")
    tensors: dict[str, Tensor] = {}
    for name, per_group in ((heads.query, heads.per_group), (heads.key, 1), (heads.value, 1)):
        module = model.get_submodule(f"{path}.{name}")
        table = linear_map(module)
        columns = heads.columns(kept, per_group).to(table.device)
        bias = module._parameters.get("bias")
        tensors |= _linear(model, f"{path}.{name}", table[:, columns], None if bias is None else bias[columns])
    last = model.get_submodule(f"{path}.{heads.output}")
    table = linear_map(last)
    matrix, added = writes or (table[heads.columns(kept, heads.per_group).to(table.device)], None)
    old = last._parameters.get("bias")
    if added is not None and old is None:
        raise ValueError(f"{path}.{heads.output} has no bias, and gets none: solve for the projection alone")
    tensors |= _linear(model, f"{path}.{heads.output}", matrix, old if added is None else added)
    query, key, value, output = (f"{path}.{name}" for name in (heads.query, heads.key, heads.value, heads.output))
    edit = NarrowAttention(query, key, value, output, len(kept) * heads.per_group, len(kept), heads.width)
    return Plan((edit,), tensors)


def heads_of(block: Block) -> Heads:
    """The heads of a block's attention; UnsupportedModelError where they cannot be told apart."""
    output = block.parts.attention_output
    if output is None:
        what = f"found no attention in {block.path} with projections whose heads could be told apart"
        raise missing(what, block.model, block.path)
    heads = attention_heads(block.module, output, block.path)
    check_distances(block.model, heads, block.path)
    return heads


@torch.no_grad()
def narrow_experts(block: Block, units: Tensor, writes: Tensor | None = None) -> Plan:
    """Keep the hidden units `units` (experts, width) of each expert, in this order.

    `writes`, (experts, units, hidden), are new output projections, if there are to be other ones.

    Transformers' grouped kernels want rows of whole 16 bytes: a width that is a multiple of 4 in float32, of 8 in half
    precision. What they cannot run is refused by `apply`.

    Raises:
        ValueError: units that an expert does not have, or a unit twice.
    """
    ffn = _ffn(block)
    if ffn.experts is None:
        raise UnsupportedModelError(f"{block} has no experts")
    name = f"{block.path}.{ffn.experts}"
    experts = block.module.get_submodule(ffn.experts)
    axes = expert_axes(experts)
    if units.ndim != 2:
        raise ValueError(f"units must be whole numbers, a list for each FFN (experts, width); got {tuple(units.shape)}")
    units = torch.stack([_checked(of_one, axes.width) for of_one in units])
    tensors = {}
    for tensor, (axis, times) in axes.of.items():
        table = experts.get_parameter(tensor)
        if len(table) != len(units):
            raise UnsupportedModelError(f"{name}.{tensor} holds {len(table)} experts; units name {len(units)}")
        rows = _entries(units, times, axes)
        shape = [1] * table.ndim
        shape[0], shape[axis] = rows.shape
        picked = (
            rows.to(table.device).view(shape).expand([*table.shape[:axis], rows.shape[1], *table.shape[axis + 1 :]])
        )
        tensors[f"{name}.{tensor}"] = table.gather(axis, picked)
    if writes is not None:
        down, (axis, _) = next(iter(axes.of.items()))
        tensors[f"{name}.{down}"] = writes if axis == 1 else writes.transpose(1, 2)
    return Plan((NarrowExperts(name, units.shape[1]),), tensors)


def _entries(units: Tensor, times: int, axes: ExpertAxes) -> Tensor:
    """Where `units` (experts, n) are along an axis that has `times` entries for each: (experts, times · n).

    Gate and up of a unit are neighbours, or all gates come before all ups.
    """
    shifts = torch.arange(times)
    if axes.interleaved:
        return (units[..., None] * times + shifts).flatten(1)
    return (units[:, None] + shifts[:, None] * axes.width).flatten(1)


def split_experts(model: PreTrainedModel, path: str) -> Plan:
    """Give every expert of the mixture at `path` linear maps of its own; the plan's tensors are views of theirs.

    Raises:
        UnsupportedModelError: experts that do not say how they compute.
    """
    experts = model.get_submodule(path)
    check_experts(experts, path)
    tensors = {
        f"{path}.{number}.{name}": table[number].detach()
        for name, table in expert_tables(experts).items()
        for number in range(len(table))
    }
    return Plan((SplitExperts(path),), tensors)


def linear_ffn(block: Block, maps: Sequence[Tensor], bias: Tensor | None = None) -> Plan:
    """Put a linear map in the place of a block's FFN.

    Args:
        maps: one matrix (hidden, hidden) that multiplies from the right, or the two factors (hidden, rank) and
            (rank, hidden) of one.
        bias: (hidden).
    """
    if len(maps) not in (1, 2):
        raise ValueError(f"maps must be one matrix, or the two factors of one; got {len(maps)}")
    model, ffn = block.model, _ffn(block)
    inputs, output = _dense(ffn, block)
    rank = maps[0].shape[1] if len(maps) == 2 else None
    activation = f"{block.path}.{ffn.activation}" if ffn.activation else None
    edit = LinearFFN(inputs, output, rank, bias is not None, activation)
    tensors: dict[str, Tensor] = {}
    paths = edit.map_paths(Site(model, Undo()))
    for name, like, matrix in zip(paths, (inputs[-1], output) if rank else (output,), maps, strict=True):
        tensors |= _linear(model, name, matrix, bias if like == output else None, like)
    return Plan((edit,), tensors)


def insert_bottleneck(block: Block, bottleneck: Bottleneck) -> Plan:
    """Have what comes out of a block pass through a bottleneck like this one; its tensors are not copied."""
    hidden, width = bottleneck.encoder.shape
    edit = InsertBottleneck(block.path, hidden, width, **asdict(bottleneck.form))
    inside = f"{block.path}.{BOTTLENECK}"
    return Plan((edit,), {f"{inside}.{name}": tensor for name, tensor in bottleneck.state_dict().items()})


def replace_activation(block: Block, blend: Blend, alpha: float = 0.0, constant: Tensor | None = None) -> Plan:
    """Blend the activation of a block's FFN, by `alpha`, with what a linear map can absorb; see `BlendedActivation`."""
    activation = _ffn(block).activation
    if activation is None:
        raise UnsupportedModelError(f"the activation of {block} is no module that can be replaced")
    name = f"{block.path}.{activation}"
    width = None if constant is None else len(constant)
    tensors = {f"{name}.alpha": torch.tensor([alpha], dtype=torch.float32)} | (
        {} if constant is None else {f"{name}.constant": constant}
    )
    return Plan((ReplaceActivation(name, blend, width),), tensors)


def pack_linear(
    model: PreTrainedModel,
    path: str,
    bits: Tensor,
    group_size: int,
    symmetric: bool = True,
    gram: Tensor | Factor | None = None,
) -> Plan:
    """Store the linear map at `path` in few bits.

    Args:
        bits: of every group of weights, (outputs, groups of a row).
        group_size, symmetric, gram: see `pack`; rounded to nearest without a gram.
    """
    module = model.get_submodule(path)
    packing, tensors = pack(linear_map(module).T, bits, group_size, symmetric, gram)
    edit = PackLinear(path, group_size, packing.planes, symmetric)
    return Plan((edit,), _named(path, module, tensors))


def sparsify_linear(
    model: PreTrainedModel,
    path: str,
    mask: Tensor,
    weight: Tensor | None = None,
    bits: Tensor | None = None,
    group_size: int = GROUP,
    symmetric: bool = True,
    rest: bool = False,
) -> Plan:
    """Store only some weights of the linear map at `path`; the others become 0, or are stored behind them.

    Args:
        mask: bool, (outputs, inputs): the weights to keep.
        weight: new values, (outputs, inputs); as they are when None.
        bits: of every group of the weights kept, in the order of the rows, (ceil(kept / group_size)), and with `rest`
            of those of the others; None to pack nothing.
        group_size, symmetric: see `Packing`.
        rest: whether the other weights are stored, too.
    """
    module = model.get_submodule(path)
    weight = linear_map(module).T if weight is None else weight
    ones = mask.to(weight.device)
    parts = [at_ones(weight.detach(), which) for which in ([ones, ~ones] if rest else [ones])]
    tensors = {"mask": pack_mask(mask)}
    planes: tuple[int, ...] = ()
    if bits is None:
        tensors["weight"] = torch.cat(parts)
    else:
        packing, packed = pack_row(parts, bits, group_size, symmetric)
        planes = packing.planes
        tensors |= packed
    edit = SparsifyLinear(path, len(parts[0]), planes, group_size, symmetric, rest)
    return Plan((edit,), _named(path, module, tensors))


def _named(path: str, module: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a module by their names in the model, with the bias that there was."""
    bias = module._parameters.get("bias")
    return {
        f"{path}.{name}": tensor for name, tensor in (tensors if bias is None else tensors | {"bias": bias}).items()
    }


def _ffn(block: Block) -> FFN:
    ffn = block.parts.ffn
    if ffn is None:
        raise missing(f"found no FFN in {block}", block.model, block.path, ffn=True)
    return ffn


def _dense(ffn: FFN, block: Block) -> tuple[tuple[str, ...], str]:
    """The paths of an FFN's projections in the model."""
    if ffn.output is None:
        raise UnsupportedModelError(f"the FFN of {block.path} is a mixture of experts; use narrow_experts")
    return tuple(f"{block.path}.{name}" for name in ffn.inputs), f"{block.path}.{ffn.output}"


def _checked(units: Tensor, width: int, what: str = "hidden units") -> Tensor:
    if units.ndim != 1 or not len(units) or units.is_floating_point() or units.dtype == torch.bool:
        raise ValueError(f"units must be whole numbers, a list for each FFN; got {units.dtype}, {tuple(units.shape)}")
    if units.min() < 0 or units.max() >= width or len(units.unique()) < len(units):
        raise ValueError(f"units must be different numbers of {width} {what}, counted from 0; got {units.tolist()[:8]}")
    return units.long()


def _linear(
    model: PreTrainedModel, path: str, matrix: Tensor, bias: Tensor | None = None, like: str | None = None
) -> dict[str, Tensor]:
    """The tensors of a linear map at `path` from its matrix (inputs, outputs), as the module at `like` stores them."""
    transposed = isinstance(model.get_submodule(like or path), Conv1D)
    if bias is None and transposed:  # it cannot do without one
        bias = matrix.new_zeros(matrix.shape[1])
    return {f"{path}.weight": matrix if transposed else matrix.T} | ({} if bias is None else {f"{path}.bias": bias})
