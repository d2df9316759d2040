"""Edits of mixtures of experts."""

from __future__ import annotations

import copy
from dataclasses import dataclass

from hf_compress.anatomy.dispatch import without_hook
from hf_compress.anatomy.experts import check_experts, expert_tables
from hf_compress.anatomy.parts import expert_axes
from hf_compress.errors import PlanError, UnsupportedModelError
from hf_compress.modules.experts import SeparateExperts
from hf_compress.plan.edits import ModuleEdit, Path
from hf_compress.rewrite.site import Site, empty, set_width


@dataclass(frozen=True)
class NarrowExperts(ModuleEdit):
    """Every expert of a mixture has fewer hidden units: `width` are left. `experts` holds their tensors."""

    experts: Path
    width: int

    def describe(self) -> str:
        return f"{self.width} hidden units in each expert"

    def restructure(self, site: Site) -> None:
        experts = site.module(self.experts)
        tables = {name: table for name, table in experts.named_parameters(recurse=False) if table.ndim >= 2}
        if not tables:
            raise PlanError(f"{self.experts} is no module that holds the tensors of all experts")
        axes = expert_axes(experts)
        if self.width > axes.width:
            raise PlanError(
                f"the experts of {self.experts} have {axes.width} hidden units; the plan asks for {self.width}"
            )
        new = without_hook(copy.copy(experts))
        new._parameters = dict(experts._parameters)
        for name, (axis, times) in axes.of.items():
            shape = list(tables[name].shape)
            shape[axis] = self.width * times
            new._parameters[name] = empty(shape, tables[name])
        site.replace(self.experts, new)
        set_width(site, self.experts, axes.width, self.width)


@dataclass(frozen=True)
class SplitExperts(ModuleEdit):
    """Every expert of a mixture has linear maps of its own; see `SeparateExperts`. `experts` held their tensors."""

    experts: Path

    def describe(self) -> str:
        return "linear maps of its own for each expert"

    def restructure(self, site: Site) -> None:
        experts = site.module(self.experts)
        try:
            check_experts(experts, self.experts)
            tables = expert_tables(experts)
        except UnsupportedModelError as error:
            raise PlanError(f"the plan takes {self.experts} apart: {error}") from None
        up, down = tables["up.weight"], tables["down.weight"]
        count, up_width, hidden = up.shape
        sizes = (hidden, up_width, down.shape[2], "up.bias" in tables)
        new = SeparateExperts(experts, count, sizes, device="meta", dtype=up.dtype)
        for expert in new.experts:
            for name, table in tables.items():
                expert.get_parameter(name).requires_grad_(table.requires_grad)
        site.replace(self.experts, new)
