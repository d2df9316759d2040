"""Ridge regression from calibration batches, every fourth of them held out: to choose a penalty, and to judge by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_compress.numerics.ridge import LeastSquares

HELD_OUT = 4
PENALTIES = (1e-4, 1e-3, 1e-2, 0.03, 0.1, 0.3, 1.0, 3.0)  # worth trying, relative to the mean variance of the inputs
_CAUTIOUS = (0.1,)  # where there is nothing to choose a penalty by


def is_held_out(batch: int) -> bool:
    """Whether a batch of this number, counted from 0, is one to choose or judge by, not to fit: every fourth."""
    return batch % HELD_OUT == HELD_OUT - 1


@dataclass(frozen=True, eq=False)
class RidgeFit:
    """A solution whose penalty was chosen on rows held out.

    Attributes:
        weight: (inputs, outputs) float64.
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
    def empty(inputs: int, outputs: int, device: torch.device | str = "cpu") -> HeldOutSums:
        """Before the first batch; the sums live on `device`."""
        return HeldOutSums(LeastSquares(inputs, outputs, device), LeastSquares(inputs, outputs, device))

    @property
    def all(self) -> LeastSquares:
        """The sums over all batches."""
        return self.fitted.merge(self.held)

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
        """Solve for every penalty, take the one that does best on the rows held out, and solve with it on all rows.

        Where either has no rows, the penalty is a cautious one, and the error that of the fit on its own rows.

        Args:
            prior: (inputs, outputs) that the weight is penalised for leaving; None means 0.
            affine: with a bias, which is not penalised.
            parts: where it is not affine, the widths of parts of x that share a penalty (see `LeastSquares.solve`).

        Raises:
            ValueError: no rows at all; no penalties.
        """

        def solve(sums: LeastSquares, penalty: float) -> tuple[Tensor, Tensor | None]:
            return sums.solve_affine(penalty, prior) if affine else (sums.solve(penalty, prior, parts), None)

        penalties = PENALTIES if penalties is None else penalties
        fitted, held, everything = self.fitted, self.held, self.all
        if fitted.count == 0 or held.count == 0:
            fitted, held, penalties = everything, everything, _CAUTIOUS
        if not penalties:
            raise ValueError("penalties is empty; expected at least one, e.g. 1e-3")
        errors = {penalty: held.error(*solve(fitted, penalty)) for penalty in penalties}
        best = min(errors, key=errors.__getitem__)
        scale = held.energy / held.count
        return RidgeFit(*solve(everything, best), best, errors[best] / scale if scale else 0.0)
