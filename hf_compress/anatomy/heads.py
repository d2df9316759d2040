"""The heads of a block's attention, and which rows and columns of its projections are theirs."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hf_compress.anatomy.parts import is_linear, linear_widths
from hf_compress.errors import UnsupportedModelError

ROLES = {
    role: re.compile(rf"^({role}|{role[0]})(_?(proj|lin|linear))?$", re.IGNORECASE)
    for role in ("query", "key", "value")
}
_HEAD_WIDTH = ("head_dim", "attention_head_size", "head_size", "key_value_proj_dim")
_HEAD_COUNT = ("num_heads", "num_attention_heads", "n_heads", "n_head")


@dataclass(frozen=True)
class Heads:
    """Attention with projections of their own for queries, keys and values. Paths are relative to the block.

    Query heads that share a key and a value head are a group; they are kept or taken out together.

    Attributes:
        query, key, value, output: the projections.
        groups: key and value heads.
        per_group: query heads for each of them.
        width: of one head.
    """

    query: str
    key: str
    value: str
    output: str
    groups: int
    per_group: int
    width: int

    def columns(self, groups: Tensor, per_group: int) -> Tensor:
        """Where the heads of `groups` are along an axis that has `per_group` heads for each."""
        block = per_group * self.width
        return (groups[:, None] * block + torch.arange(block)).flatten()


def attention_heads(block: nn.Module, output: str | None, name: str) -> Heads:
    """Find the heads of a block's attention; `output` is its output projection, `name` the block's, for messages.

    Raises:
        UnsupportedModelError: queries, keys and values in one matrix, or parts that belong to single heads besides.
    """
    linears = {path: linear_widths(module) for path, module in block.named_modules() if is_linear(module)}
    found = {
        role: [path for path in linears if pattern.match(path.rpartition(".")[2])] for role, pattern in ROLES.items()
    }
    if output is None or any(len(paths) != 1 for paths in found.values()):
        raise UnsupportedModelError(
            f"the heads of {name} cannot be told apart: it has no projections of its own for queries, keys and values"
        )
    query, key, value = (found[role][0] for role in ROLES)
    owner = block.get_submodule(query.rpartition(".")[0])
    wide, narrow = linears[query][1], linears[key][1]
    width = _head_width(owner, wide)
    if width is None or wide % width or narrow % width or wide % narrow:
        raise UnsupportedModelError(f"{name}: found no width of a head that {wide} and {narrow} are multiples of")
    if linears[value][1] != narrow or linears[output][0] != wide:
        raise UnsupportedModelError(f"{name}: its heads have values of another width than keys")
    heads = Heads(query, key, value, output, narrow // width, wide // narrow, width)
    _check_other_parts(owner, heads, name)
    return heads


def _head_width(owner: nn.Module, wide: int) -> int | None:
    for attribute in _HEAD_WIDTH:
        if type(value := getattr(owner, attribute, None)) is int:
            return value
    count = next((value for a in _HEAD_COUNT if type(value := getattr(owner, a, None)) is int), None)
    return None if count is None else wide // count


def _check_other_parts(owner: nn.Module, heads: Heads, name: str) -> None:
    """Refuse attention with a norm over all heads, a sink for each head, or heads that are combined with each other."""
    own = {path.rpartition(".")[2] for path in (heads.query, heads.key, heads.value, heads.output)}
    count = heads.groups * heads.per_group
    theirs = {count * heads.width, heads.groups * heads.width, count} - {heads.width}
    for path, parameter in owner.named_parameters():
        if path.split(".")[0] not in own and theirs.intersection(parameter.shape):
            raise UnsupportedModelError(
                f"{name}: {path} of its attention, {tuple(parameter.shape)}, has entries for each head, too"
            )
    for path in owner._parameters:
        raise UnsupportedModelError(f"{name}: {path} of its attention may tie heads to each other: it is no projection")


def check_distances(model: nn.Module, heads: Heads, name: str) -> None:
    """Refuse a bias by distance with a column for each head; one block may hold it for all, or the model."""
    for path, module in model.named_modules():
        if isinstance(module, nn.Embedding) and module.embedding_dim == heads.groups * heads.per_group:
            raise UnsupportedModelError(f"{name}: {path} has a column for each head of the attention, too")
