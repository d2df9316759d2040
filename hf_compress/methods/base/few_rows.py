"""Ridge regression from fewer tokens than there are inputs: the same solutions, by the tokens (see `row_ridge`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hf_compress.methods.base.ridge import CAUTIOUS, PENALTIES, RidgeFit, lowest
from hf_compress.numerics.row_ridge import inner_products, products_between, scales_of, solve_dual, solve_rows


@dataclass
class HeldOutRows:
    """The rows of the regression of y (tokens, outputs) on x (tokens, inputs), as `HeldOutSums` has their sums.

    Attributes:
        parts: the widths of parts of x that share a penalty.
    """

    parts: Sequence[int]
    _x: dict[bool, list[Tensor]] = field(default_factory=lambda: {False: [], True: []})
    _y: dict[bool, list[Tensor]] = field(default_factory=lambda: {False: [], True: []})

    def update(self, x: Tensor, y: Tensor, *, held: bool) -> None:
        """Add the rows of a batch."""
        self._x[held].append(x)
        self._y[held].append(y.float())

    @property
    def energy(self) -> float:
        """Σ ‖y‖² over all batches."""
        return sum(_energy(y) for part in self._y.values() for y in part)

    def fit(self, penalties: Sequence[float] = PENALTIES) -> RidgeFit:
        """As `HeldOutSums.fit`, without a bias. ValueError where there are no rows at all."""
        x, y = ([one for part in rows.values() for one in part] for rows in (self._x, self._y))
        if not sum(map(len, x)):
            raise ValueError("no rows were seen; add batches before fitting")
        everything = torch.cat(x), torch.cat(y)
        if all(sum(map(len, part)) for part in self._x.values()):
            fitted, held = ((torch.cat(self._x[part]), torch.cat(self._y[part])) for part in (False, True))
            penalty, error = self._chosen(fitted, held, penalties)
        else:
            penalty, error = self._chosen(everything, everything, CAUTIOUS)
        return RidgeFit(solve_rows(*everything, penalty, self.parts), None, penalty, error)

    def _chosen(
        self, fitted: tuple[Tensor, Tensor], held: tuple[Tensor, Tensor], penalties: Sequence[float]
    ) -> tuple[float, float]:
        """The penalty that does best on the rows held out, and the share of ‖y‖² that is left there."""
        scales, target = scales_of(fitted[0], self.parts), held[1]
        inner = inner_products(fitted[0], self.parts, scales)
        across = products_between(held[0], fitted[0], self.parts, scales)

        def attempt(penalty: float) -> tuple[float, float]:
            error = _energy(across @ solve_dual(inner, fitted[1], penalty) - target)
            return error, error

        penalty, error = lowest(attempt, penalties)
        return penalty, error / _energy(target) if target.any() else 0.0


def _energy(y: Tensor) -> float:
    return float(y.square().sum(dtype=torch.float64))
