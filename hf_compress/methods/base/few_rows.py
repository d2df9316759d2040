"""Ridge regression from fewer tokens than there are inputs, by the tokens' Gram matrix: the same solutions for less.

With rows X (T, inputs), B = Xᵀ (X Xᵀ + λ)⁻¹ Y is what (Xᵀ X + λ)⁻¹ Xᵀ Y is, and takes T² in the place of inputs².

Source: C. Saunders, A. Gammerman and V. Vovk, "Ridge regression learning algorithm in dual variables", 1998.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hf_compress.methods.base.ridge import CAUTIOUS, PENALTIES, RidgeFit, lowest

_TINY = 1e-12


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
        return sum(float(y.square().sum(dtype=torch.float64)) for part in self._y.values() for y in part)

    def fit(self, penalties: Sequence[float] = PENALTIES) -> RidgeFit:
        """As `HeldOutSums.fit`, without a bias. ValueError where there are no rows at all."""
        fitted, held = (_Rows.of(self._x[part], self._y[part], self.parts) for part in (False, True))
        whole = [x for part in self._x.values() for x in part], [y for part in self._y.values() for y in part]
        everything = _Rows.of(*whole, self.parts)
        if everything is None:
            raise ValueError("no rows were seen; add batches before fitting")
        if fitted is None or held is None:
            fitted, held, penalties = everything, everything, CAUTIOUS
        penalty, error = _chosen(fitted, held, penalties)
        weights = everything.solved(everything.products(everything), penalty)
        weight = (everything.scaled().T @ weights).mul_(everything.scales[:, None])
        return RidgeFit(weight, None, penalty, error)


def _chosen(fitted: _Rows, held: _Rows, penalties: Sequence[float]) -> tuple[float, float]:
    """The penalty that does best on the rows held out, and the share of ‖y‖² that is left there."""
    inner, across = fitted.products(fitted), held.products(fitted)

    def attempt(penalty: float) -> tuple[float, float]:
        gap = across @ fitted.solved(inner, penalty) - held.y
        error = float(gap.square().sum(dtype=torch.float64))
        return error, error

    penalty, error = lowest(attempt, penalties)
    energy = float(held.y.square().sum(dtype=torch.float64))
    return penalty, error / energy if energy else 0.0


@dataclass
class _Rows:
    x: Tensor
    y: Tensor
    scales: Tensor  # that the inputs are multiplied by, so that all parts are alike in the mean square

    @staticmethod
    def of(x: Sequence[Tensor], y: Sequence[Tensor], parts: Sequence[int]) -> _Rows | None:
        """None where there are none."""
        if not sum(map(len, x)):
            return None
        rows = torch.cat([*x])
        means = [part.float().square().mean() for part in rows.split([*parts], dim=1)]
        scales = [mean.clamp(min=_TINY).rsqrt().expand(width) for mean, width in zip(means, parts, strict=True)]
        return _Rows(rows, torch.cat([*y]), torch.cat(scales))

    def scaled(self, scales: Tensor | None = None) -> Tensor:
        return self.x.float() * (self.scales if scales is None else scales)

    def products(self, other: _Rows) -> Tensor:
        """Of all rows with those of another, (rows, other's rows), in the other's scales."""
        return self.scaled(other.scales) @ other.scaled().T

    def solved(self, inner: Tensor, penalty: float) -> Tensor:
        """(X Xᵀ + λ)⁻¹ Y, λ being the penalty times the number of rows; in float64, for it may be near singular."""
        system = inner.double()
        system.diagonal().add_(penalty * len(self.x))
        return torch.cholesky_solve(self.y.double(), torch.linalg.cholesky(system)).float()
