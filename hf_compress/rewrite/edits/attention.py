"""The edit of attention: fewer heads."""

from __future__ import annotations

import re
from dataclasses import dataclass

from hf_compress.anatomy.parts import linear_widths
from hf_compress.errors import PlanError
from hf_compress.plan.edits import ModuleEdit, Path
from hf_compress.rewrite.site import Site, resized

# What attention calls its heads, those of keys and values, and the width of all heads.
_HEADS = re.compile(r"(num_|n_)(attention_)?heads?")
GROUP_NAMES = re.compile(r"num_(key_value|kv)_heads")
_ALL = re.compile(r"all_head_size|inner_dim")


@dataclass(frozen=True)
class NarrowAttention(ModuleEdit):
    """An attention has fewer heads.

    Attributes:
        query, key, value, output: its projections.
        heads: query heads left.
        groups: key and value heads left.
        width: of one head, which stays.
    """

    query: Path
    key: Path
    value: Path
    output: Path
    heads: int
    groups: int
    width: int

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.heads % self.groups:
            raise PlanError(f"heads must be a multiple of groups; got {self.heads} and {self.groups}")

    def describe(self) -> str:
        return f"{self.heads} heads of {self.width}, keys and values for {self.groups}"

    def restructure(self, site: Site) -> None:
        query, key, value, output = (site.linear(path) for path in self.paths)
        (hidden, wide), (_, narrow) = linear_widths(query), linear_widths(key)
        if linear_widths(value)[1] != narrow or linear_widths(output)[0] != wide:
            raise PlanError(f"{self.query}, {self.key}, {self.value} and {self.output} are not those of one attention")
        heads, groups = wide // self.width, narrow // self.width
        if wide % self.width or narrow % self.width or self.heads * groups != self.groups * heads or self.heads > heads:
            raise PlanError(
                f"the attention of {self.query} has {heads} heads on {groups} of {self.width}; the plan asks for "
                f"{self.heads} on {self.groups}"
            )
        kept, shared = self.heads * self.width, self.groups * self.width
        site.replace(self.query, resized(query, hidden, kept))
        site.replace(self.key, resized(key, linear_widths(key)[0], shared))
        site.replace(self.value, resized(value, linear_widths(value)[0], shared))
        site.replace(self.output, resized(output, kept, linear_widths(output)[1]))
        owner = site.module(self.query.rpartition(".")[0])
        counts = ((_HEADS, heads, self.heads), (GROUP_NAMES, groups, self.groups), (_ALL, wide, kept))
        for name, number in list(vars(owner).items()):
            for pattern, old, new in counts:
                if type(number) is int and number == old and pattern.fullmatch(name):
                    site.undo.set(owner, name, new)
