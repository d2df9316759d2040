"""Ridge regression from calibration batches, every fourth of them held out: to choose a penalty, and to judge by."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from hf_compress.numerics.ridge import LeastSquares, Ridge, Solver

HELD_OUT = 4
PENALTIES = (1e-4, 1e-3, 1e-2, 0.03, 0.1, 0.3, 1.0, 3.0)  # worth trying, relative to the mean variance of the inputs
CAUTIOUS = (0.1,)  # where there is nothing to choose a penalty by
_T = TypeVar("_T")
_NARROW = 1024  # inputs: what a factorisation costs up to there is nothing to speak of
_MIXTURES = 64  # of the outputs, that a penalty is chosen by


def is_held_out(batch: int) -> bool:
    """Whether a batch of this number, counted from 0, is one to choose or judge by, not to fit: every fourth."""
    return batch % HELD_OUT == HELD_OUT - 1


@dataclass(frozen=True, eq=False)
class RidgeFit:
    """A solution whose penalty was chosen on rows held out.

    Attributes:
        weight: (inputs, outputs), of the dtype of the sums.
        bias: (outputs); None where none was solved for.
        penalty: the one that did best on the held-out rows.
        error: squared error there as a share of the mean ||y||^2.
    """

    weight: Tensor
    bias: Tensor | None
    penalty: float
    error: float


@dataclass
class HeldOutSums:
    """Sums of the regression of y (tokens, outputs) on x (tokens, inputs).

    Attributes:
        fitted, held: over most batches, and over those held out.
    """

    fitted: LeastSquares
    held: LeastSquares

    @staticmethod
    def empty(
        inputs: int,
        outputs: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float64,
        origin: tuple[Tensor, Tensor] | None = None,
    ) -> HeldOutSums:
        """Before the first batch; see `LeastSquares`."""
        fitted, held = (LeastSquares(inputs, outputs, device, dtype, origin) for _ in range(2))
        return HeldOutSums(fitted, held)

    @staticmethod
    def like(x: Tensor, y: Tensor, affine: bool) -> HeldOutSums:
        """Before the first batch, which has the rows x and y: in float32, unless those are float64.

        With a penalty as small as the smallest of `PENALTIES` the rounding of float32 sums costs nothing to speak of.
        They are kept about the means of these rows where they are for an affine fit: only that is about the means.
        """
        origin = (x.mean(dim=0, dtype=torch.float64), y.mean(dim=0, dtype=torch.float64)) if affine and len(x) else None
        return HeldOutSums.empty(x.shape[1], y.shape[1], x.device, torch.promote_types(x.dtype, torch.float32), origin)

    @property
    def inputs(self) -> int:
        return self.fitted.inputs

    @property
    def all(self) -> LeastSquares:
        """The sums over all batches."""
        return self.fitted.merge(self.held)

    @property
    def energy(self) -> float:
        """Mean ||y||^2 over all batches."""
        return (self.fitted.energy + self.held.energy) / (self.fitted.count + self.held.count)

    def normal_gram(self, affine: bool) -> Tensor:
        """X^T X over all batches, (inputs, inputs), as a new tensor; about the mean if `affine`."""
        point, _ = self._points(affine)
        return self.held.gram_about(point, onto=self.fitted.gram_about(point))

    def normal_cross(self, affine: bool) -> Tensor:
        """X^T Y over all batches, (inputs, outputs); about the means if `affine`."""
        points = self._points(affine)
        return self.fitted.cross_about(*points).add_(self.held.cross_about(*points))

    def _points(self, affine: bool) -> tuple[Tensor, Tensor]:
        """The means of x and y over all batches, or zeros. ValueError where there are no rows at all."""
        count = self.fitted.count + self.held.count
        if count == 0:
            self.fitted.require_rows()
        share = 1 / count if affine else 0.0
        return share * (self.fitted.x_sum + self.held.x_sum), share * (self.fitted.y_sum + self.held.y_sum)

    def update(self, x: Tensor, y: Tensor, weights: Tensor | None = None, *, held: bool) -> None:
        """Add the rows of a batch; `weights` (tokens) count a row as so many."""
        (self.held if held else self.fitted).update(x, y, weights)

    def fit(
        self,
        prior: Tensor | None = None,
        affine: bool = False,
        penalties: Sequence[float] | None = None,
        parts: Sequence[int] | None = None,
    ) -> RidgeFit:
        """Choose the penalty that does best on the rows held out, and solve with it on all rows.

        Where inputs are many, penalties are tried from the middle outwards for as long as they do better (`downhill`):
        each costs a factorisation, and the error has one minimum but for noise. Where outputs are many, the error to
        choose by is that of a few random mixtures of them, an unbiased estimate. The one reported is that of them all.

        Where either has no rows, the penalty is a cautious one, and the error that of the fit on its own rows.

        Args:
            prior: (inputs, outputs) that the weight is penalised for leaving; None means 0.
            affine: with a bias, which is not penalised.
            penalties: to choose among, in rising order.
            parts: where it is not affine, the widths of parts of x that share a penalty (see `LeastSquares.solve`).

        Raises:
            ValueError: no rows at all; no penalties.
        """
        penalties = PENALTIES if penalties is None else penalties
        if not penalties:
            raise ValueError("penalties is empty; expected at least one, e.g. 1e-3")
        if self.fitted.count == 0 or self.held.count == 0:
            everything = self.all
            penalty, error = HeldOutSums(everything, everything)._choose(CAUTIOUS, prior, affine, parts)
        else:
            penalty, error = self._choose(penalties, prior, affine, parts)
            everything = self.all
        ridge = Ridge(everything, affine, parts)
        weight, bias = ridge.solution(ridge.solver(penalty), everything, prior)
        return RidgeFit(weight, bias, penalty, error)

    def _choose(
        self, penalties: Sequence[float], prior: Tensor | None, affine: bool, parts: Sequence[int] | None
    ) -> tuple[float, float]:
        """The penalty that does best on the rows held out, and the error there of the fit on the others."""
        ridge = Ridge(self.fitted, affine, parts)
        fitted, held, start = self.fitted, self.held, prior
        if (mix := _mixtures(fitted.outputs)) is not None:
            fitted, held, start = fitted.mix(mix), held.mix(mix), None if prior is None else prior.to(mix) @ mix

        def attempt(penalty: float) -> tuple[float, Solver]:
            solver = ridge.solver(penalty)
            return held.excess(*ridge.solution(solver, fitted, start)), solver

        search = downhill if self.inputs > _NARROW else lowest
        penalty, solver = search(attempt, penalties)
        scale = self.held.energy / self.held.count
        error = self.held.error(*ridge.solution(solver, self.fitted, prior))
        return penalty, error / scale if scale else 0.0


def lowest(attempt: Callable[[float], tuple[float, _T]], values: Sequence[float]) -> tuple[float, _T]:
    """Of values, the first where a function is lowest, and what came with it there."""
    tried = [attempt(value) for value in values]
    place = min(range(len(values)), key=lambda number: tried[number][0])
    return values[place], tried[place][1]


def downhill(attempt: Callable[[float], tuple[float, _T]], values: Sequence[float]) -> tuple[float, _T]:
    """Of values in order, one where a function is lower than at its neighbours, and what came with it there."""
    place = len(values) // 2
    at, found = attempt(values[place])
    for step in (1, -1):
        start = place
        while 0 <= place + step < len(values):
            next_at, next_found = attempt(values[place + step])
            if next_at >= at:
                break
            place, at, found = place + step, next_at, next_found
        if place != start:  # downhill on this side: the other is uphill
            break
    return values[place], found


def _mixtures(outputs: int) -> Tensor | None:
    """Random signs, (outputs, mixtures), scaled so that mixtures have the outputs' energy in the mean; None for few."""
    if outputs <= _MIXTURES:
        return None
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, (outputs, _MIXTURES), generator=generator, dtype=torch.float32) * 2 - 1
    return signs / _MIXTURES**0.5
