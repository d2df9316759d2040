"""The rows of a regression, in the place of their sums: where they are few, they take less memory, and less time."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .halves import bfloat16_factors
from .moments import about, column_sums, pieces
from .ridge import LeastSquares, check_rows
from .symmetric import add_products, mirror


class RowPart(NamedTuple):
    """Some rows: x [T, p], y [T, q], and how much each counts, [T] float64, or None for once."""

    x: Tensor
    y: Tensor
    weights: Tensor | None


@dataclass
class RegressionRows:
    """Rows x [T, p] and y [T, q] that are kept as they come, and what `LeastSquares` would say of their sums.

    Attributes:
        inputs, outputs: p, q.
        dtype: what is worked in, float32 or float64.
        origin, y_origin: points near the means, [p] and [q], that products are taken about.
        parts: the rows.
    """

    inputs: int
    outputs: int
    dtype: torch.dtype
    origin: Tensor
    y_origin: Tensor
    parts: list[RowPart]

    @staticmethod
    def like(sums: LeastSquares) -> RegressionRows:
        """None as yet, for what such sums are made of."""
        return RegressionRows(sums.inputs, sums.outputs, sums.dtype, sums.origin, sums.y_origin, [])

    def update(self, x: Tensor, y: Tensor, weights: Tensor | None = None) -> None:
        """Add rows, as `LeastSquares.update` does. They are not copied where they lie on the same device."""
        check_rows(x, y, weights, self.inputs, self.outputs)
        if len(x):
            counts = None if weights is None else weights.detach().to(self.origin.device, torch.float64)
            y = y.detach().to(self.origin.device, self.dtype)
            self.parts.append(RowPart(x.detach().to(self.origin.device), y, counts))

    @property
    def nbytes(self) -> int:
        """Of all rows."""
        return sum(part.x.nbytes + part.y.nbytes for part in self.parts)

    @property
    def count(self) -> float:
        """Rows, or the sum of their weights."""
        return sum((len(part.x) if part.weights is None else float(part.weights.sum()) for part in self.parts), 0.0)

    @property
    def x_sum(self) -> Tensor:
        """Sum of x, [p] float64."""
        return self._sum(self.inputs, lambda part: part.x)

    @property
    def y_sum(self) -> Tensor:
        """Sum of y, [q] float64."""
        return self._sum(self.outputs, lambda part: part.y)

    @property
    def y_mean(self) -> Tensor:
        """[q] float64"""
        return self.y_sum / self.count

    @property
    def energy(self) -> float:
        """Sum of ||y||^2."""
        return self.energy_about(torch.zeros_like(self.y_origin))

    def energy_about(self, point: Tensor) -> float:
        """Sum of ||y - point||^2."""
        return sum((_weighed(about(part.y, point, self.dtype), part.weights) for part in self._pieces()), 0.0)

    def gram_about(self, point: Tensor, onto: Tensor, rows: Sequence[slice] | None = None) -> Tensor:
        """Sum of (x - point)(x - point)^T, [p, p], added to what is there, which is symmetric.

        Where `rows` are given, only these of the upper triangle are added to; the lower triangle is wrong then.
        """
        for part in self._pieces():
            x = about(part.x, point.to(self.origin), onto.dtype)
            halves = part.x.dtype == torch.bfloat16 and part.weights is None and not bool(point.any())
            with bfloat16_factors(halves):
                weighted = x if part.weights is None else x * part.weights.to(x)[:, None]
                add_products(onto, weighted, x, rows=rows)
        if rows is None:
            mirror(onto)
        return onto

    def cross_about(self, x_point: Tensor, y_point: Tensor) -> Tensor:
        """Sum of (x - x_point)(y - y_point)^T, [p, q], as a new tensor."""
        cross = torch.zeros(self.inputs, self.outputs, dtype=self.dtype, device=self.origin.device)
        for part in self._pieces():
            y = about(part.y, y_point.to(self.origin), self.dtype)
            y = y if part.weights is None else y * part.weights.to(y)[:, None]
            cross.addmm_(about(part.x, x_point.to(self.origin), self.dtype).T, y)
        return cross

    def excess(self, weight: Tensor, bias: Tensor | None = None) -> float:
        """The squared error of x B (+ bias) summed over rows; B = weight [p, q], bias [q].

        All of it: what `LeastSquares` gives is less by a constant.

        Raises:
            ValueError: no rows were seen, or an error that is not finite.
        """
        if not self.parts:
            raise ValueError("no rows were seen; expected at least one: call update(x, y) with calibration activations")
        weight = weight.to(self.origin.device, self.dtype)
        offset = -self.y_origin if bias is None else bias.to(self.y_origin) - self.y_origin
        if bool(self.origin.any()):
            offset = offset + self.origin @ weight.double()
        offset = offset.to(self.dtype)
        total = 0.0
        for part in self._pieces():
            left = about(part.y, self.y_origin, self.dtype) - offset
            total += _weighed(left.addmm_(about(part.x, self.origin, self.dtype), weight, beta=-1), part.weights)
        if not math.isfinite(total):
            raise ValueError(f"the squared error is {total}; expected finite entries in weight and bias")
        return total

    def error(self, weight: Tensor, bias: Tensor | None = None) -> float:
        """Mean over rows of ||x B (+ bias) - y||^2. Raises as `excess` does."""
        return self.excess(weight, bias) / self.count

    def take(self, features: Tensor) -> RegressionRows:
        """With none of x but `features` [n], in that order."""
        some = copy.copy(self)
        features = features.to(self.origin.device)
        some.inputs, some.origin = len(features), self.origin[features]
        some.parts = [part._replace(x=part.x[:, features]) for part in self.parts]
        return some

    def of_outputs(self, outputs: slice) -> RegressionRows:
        """With some of y alone; x is shared."""
        some = copy.copy(self)
        some.y_origin = self.y_origin[outputs]
        some.outputs, some.parts = len(some.y_origin), [part._replace(y=part.y[:, outputs]) for part in self.parts]
        return some

    def mix(self, outputs: Tensor) -> RegressionRows:
        """With y M in the place of y, M = outputs [q, n]; x is shared."""
        mixed = copy.copy(self)
        mixed.outputs, mixed.y_origin = outputs.shape[1], self.y_origin @ outputs.to(self.y_origin)
        mixed.parts = [part._replace(y=part.y @ outputs.to(part.y)) for part in self.parts]
        return mixed

    def summed(self) -> LeastSquares:
        """Their sums."""
        device, origin = self.origin.device, (self.origin, self.y_origin)
        sums = LeastSquares(self.inputs, self.outputs, device, self.dtype, origin)
        for part in self.parts:
            sums.update(*part)
        return sums

    def joined(self) -> RowPart | None:
        """All of them as one part; None without any."""
        if not self.parts:
            return None
        x, y, weights = zip(*self.parts, strict=True)
        if all(one is None for one in weights):
            return RowPart(torch.cat(x), torch.cat(y), None)
        counts = (y_part.new_ones(len(y_part), dtype=torch.float64) for y_part in y)
        given = [ones if one is None else one for one, ones in zip(weights, counts, strict=True)]
        return RowPart(torch.cat(x), torch.cat(y), torch.cat(given))

    def replace_by(self, parts: Iterable[RowPart | None]) -> None:
        """Have these rows instead, brought to where the others were."""
        device = self.origin.device
        self.parts = [
            RowPart(x.to(device), y.to(device), None if weights is None else weights.to(device))
            for x, y, weights in (part for part in parts if part is not None)
        ]

    def _pieces(self) -> Iterator[RowPart]:
        """The rows, a few at a time."""
        for part in self.parts:
            for rows in pieces(len(part.x)):
                yield RowPart(*(None if one is None else one[rows] for one in part))  # type: ignore[arg-type]

    def _sum(self, size: int, of: Callable[[RowPart], Tensor]) -> Tensor:
        total = torch.zeros(size, dtype=torch.float64, device=self.origin.device)
        for part in self._pieces():
            rows = of(part) if part.weights is None else of(part).to(self.dtype) * part.weights.to(self.dtype)[:, None]
            total += column_sums(rows)
        return total


def _weighed(rows: Tensor, weights: Tensor | None) -> float:
    """Sum of the squares of rows [T, q], each as often as it counts."""
    if weights is None:
        return float(rows.square().sum(dim=1).sum(dtype=torch.float64))
    return float(rows.square().sum(dim=1).double() @ weights)
