"""Edits of linear maps: fewer bits, fewer weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from hf_compress.anatomy.parts import linear_widths
from hf_compress.errors import PlanError
from hf_compress.modules.packed import MAX_BITS, MixedPrecisionLinear, Packing, filled
from hf_compress.modules.sparse import SparseLinear, row_length
from hf_compress.plan.edits import ModuleEdit, Path, check_size, short
from hf_compress.rewrite.site import Site


@dataclass(frozen=True)
class StoreLinear(ModuleEdit, abstract=True):
    """A linear map is stored in another form."""

    module: Path

    def compact(self, inputs: int, outputs: int, bias: bool, dtype: torch.dtype) -> nn.Module:
        """The form of a linear map of these widths, on the meta device; ValueError where it has none such."""
        raise NotImplementedError

    def restructure(self, site: Site) -> None:
        linear = site.linear(self.module)
        try:
            new = self.compact(*linear_widths(linear), linear.bias is not None, next(linear.parameters()).dtype)
        except ValueError as error:
            raise PlanError(f"{self.module}: {error}") from None
        for name, parameter in new.named_parameters():  # trained where those of the map are
            parameter.requires_grad_(linear.get_parameter(name).requires_grad)
        site.replace(self.module, new)


@dataclass(frozen=True)
class PackLinear(StoreLinear):
    """A linear map is stored in few bits; see `Packing` for what the fields mean."""

    group_size: int
    planes: tuple[int, ...]
    symmetric: bool = True
    leaves: ClassVar = "packed"

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "planes", _planes(self.planes, 1))

    def describe(self) -> str:
        return _bits(self.planes, self.group_size)

    def compact(self, inputs: int, outputs: int, bias: bool, dtype: torch.dtype) -> nn.Module:
        row = filled(inputs, self.group_size)
        packing = Packing(outputs, row, self.group_size, self.planes, self.symmetric)
        return MixedPrecisionLinear(packing, bias, inputs, device="meta", dtype=dtype)


@dataclass(frozen=True)
class SparsifyLinear(StoreLinear):
    """A linear map stores but `kept` of its weights, or with `rest` the others behind them; see `SparseLinear`.

    In few bits where there are planes; see `Packing`.
    """

    kept: int
    planes: tuple[int, ...] = ()
    group_size: int = 64
    symmetric: bool = True
    rest: bool = False
    leaves: ClassVar = "sparse"

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "planes", _planes(self.planes, 0))

    def describe(self) -> str:
        bits = [_bits(self.planes, self.group_size)] if self.planes else []
        rest = ["the others stored behind them"] if self.rest else []
        return ", ".join([f"{self.kept:,} weights kept", *bits, *rest])

    def compact(self, inputs: int, outputs: int, bias: bool, dtype: torch.dtype) -> nn.Module:
        row = row_length(self.kept, inputs * outputs - self.kept if self.rest else 0, self.group_size)
        packing = Packing(1, row, self.group_size, self.planes, self.symmetric) if self.planes else None
        return SparseLinear(inputs, outputs, self.kept, bias, packing, self.rest, device="meta", dtype=dtype)


def _bits(planes: tuple[int, ...], group_size: int) -> str:
    return f"{sum(planes) / planes[0]:.4g} bits a weight, in groups of {group_size}"


def _planes(values: Any, least: int) -> tuple[int, ...]:
    """`values` as the numbers of groups in each plane of bits, or PlanError."""
    if not isinstance(values, (list, tuple)) or not least <= len(values) <= MAX_BITS:
        count = f"{least} to" if least else "up to"
        raise PlanError(f"planes must be {count} {MAX_BITS} numbers of groups; got {short(values)}")
    for groups in values:
        check_size("planes", groups)
    return tuple(values)
