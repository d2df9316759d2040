"""Edits of linear maps: fewer bits, fewer weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from hf_compress.anatomy.parts import linear_widths
from hf_compress.errors import PlanError
from hf_compress.modules.packed import MAX_BITS, MixedPrecisionLinear, Packing, filled
from hf_compress.modules.sparse import SparseLinear, row_length
from hf_compress.plan.edits import ModuleEdit, check_bool, check_size, short
from hf_compress.rewrite.site import Site


@dataclass(frozen=True)
class PackLinear(ModuleEdit):
    """A linear map is stored in few bits; see `Packing` for what the fields mean."""

    module: str
    group_size: int
    planes: tuple[int, ...]
    symmetric: bool = True
    path_fields: ClassVar = ("module",)
    leaves: ClassVar = "packed"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_size("group_size", self.group_size)
        object.__setattr__(self, "planes", _planes(self.planes, 1))
        check_bool("symmetric", self.symmetric)

    def describe(self) -> str:
        return _bits(self.planes, self.group_size)

    def restructure(self, site: Site) -> None:
        linear = site.linear(self.module)
        inputs, outputs = linear_widths(linear)
        try:
            row = filled(inputs, self.group_size)
            packing = Packing(outputs, row, self.group_size, self.planes, self.symmetric)
        except ValueError as error:
            raise PlanError(f"{self.module}: {error}") from None
        bias, dtype = linear.bias is not None, next(linear.parameters()).dtype
        new = MixedPrecisionLinear(packing, bias, inputs, device="meta", dtype=dtype)
        site.replace(self.module, _trained_as(linear, new))


@dataclass(frozen=True)
class SparsifyLinear(ModuleEdit):
    """A linear map stores but `kept` of its weights, or with `rest` the others behind them; see `SparseLinear`.

    In few bits where there are planes; see `Packing`.
    """

    module: str
    kept: int
    planes: tuple[int, ...] = ()
    group_size: int = 64
    symmetric: bool = True
    rest: bool = False
    path_fields: ClassVar = ("module",)
    leaves: ClassVar = "sparse"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_size("kept", self.kept)
        check_size("group_size", self.group_size)
        object.__setattr__(self, "planes", _planes(self.planes, 0))
        check_bool("symmetric", self.symmetric)
        check_bool("rest", self.rest)

    def describe(self) -> str:
        parts = [f"{self.kept:,} weights kept", *([_bits(self.planes, self.group_size)] if self.planes else [])]
        return ", ".join([*parts, *(["the others stored behind them"] if self.rest else [])])

    def restructure(self, site: Site) -> None:
        linear = site.linear(self.module)
        inputs, outputs = linear_widths(linear)
        dtype = next(linear.parameters()).dtype
        try:
            row = row_length(self.kept, inputs * outputs - self.kept if self.rest else 0, self.group_size)
            packing = Packing(1, row, self.group_size, self.planes, self.symmetric) if self.planes else None
            bias = linear.bias is not None
            new = SparseLinear(inputs, outputs, self.kept, bias, packing, self.rest, device="meta", dtype=dtype)
        except ValueError as error:
            raise PlanError(f"{self.module}: {error}") from None
        site.replace(self.module, _trained_as(linear, new))


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


def _trained_as(linear: nn.Module, new: nn.Module) -> nn.Module:
    """What takes the place of a linear map, with its parameters trained where those of the map are."""
    for name, parameter in new.named_parameters():
        parameter.requires_grad_(linear.get_parameter(name).requires_grad)
    return new
