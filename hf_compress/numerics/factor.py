"""The damped Gram matrix of inputs, and its factor, which says what later inputs can make up for."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_compress.numerics.cholesky import factorise
from hf_compress.numerics.symmetric import turn_round
from hf_compress.numerics.team import ALONE, Team

DAMPING = 0.01  # of the mean diagonal, as in GPTQ and SparseGPT


def damped(gram: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """G / s + 0.01 · I, s being the mean of G's diagonal: so the unit of the inputs does not matter.

    Args:
        gram: G = Σ x xᵀ of the inputs, (inputs, inputs), of any real dtype.

    Raises:
        ValueError: a gram that is not finite.
    """
    scaled = torch.empty(gram.shape, dtype=dtype, device=gram.device)
    gram = gram.detach()
    torch.div(gram, scale_of(gram), out=scaled)
    if not bool(torch.isfinite(scaled.sum())):  # no entry exceeds the number of inputs, so no sum is too large
        raise ValueError("the gram matrix holds NaN or infinity: run the calibration in float32 or bfloat16")
    scaled.diagonal().add_(DAMPING)
    return scaled


def scale_of(gram: Tensor) -> Tensor:
    """The mean of the diagonal, float64; 1 where that is 0."""
    mean = gram.diagonal().double().mean()
    return torch.where(mean == 0, 1.0, mean)


@dataclass(frozen=True)
class Factor:
    """R, upper triangular, with R Rᵀ = G / s + 0.01 · I, as `damped` makes it.

    The error of a linear map whose weights (outputs, inputs) are off by E is then |E R|², and column j of E R hangs on
    the first j columns of E alone. So the best that input j can do about the errors of those before it is to be off by
    −Σ_{i<j} E_i R_ij / R_jj. If it is off by e more, that costs (e R_jj)², whatever those after it do about it.

    Attributes:
        upper: R, (inputs, inputs) float32, column by column.
        scale: s.
        silent: which inputs are always 0, bool (inputs); in R they are damped by 1, and cost nothing.
    """

    upper: Tensor
    scale: float
    silent: Tensor

    @staticmethod
    def of(gram: Tensor, together: Team = ALONE) -> Factor:
        """By Cholesky's method from the last input to the first; in float32, unless it turns out not to be enough.

        No entry of R's diagonal is below the root of the damping. Where one comes out so, or the method breaks off, the
        gram is too ill-conditioned for float32, and float64 is taken.

        Args:
            gram: Σ x xᵀ, (inputs, inputs), of several processes in each the whole of it.
            together: how they factorise it together.

        Raises:
            ValueError: a gram that is not finite, or no sum of x xᵀ.
        """
        gram = gram.detach()
        silent = gram.diagonal() == 0
        upper, enough = _upper(gram, silent, torch.float32, together)
        if not enough:
            upper, enough = _upper(gram, silent, torch.float64, together)
        if not enough:
            raise ValueError("the gram matrix is no sum of x xᵀ: it has an eigenvalue below 0")
        return Factor(upper.float(), float(scale_of(gram)), silent)

    @property
    def unexplained(self) -> Tensor:
        """What of each input's energy those after it cannot make up for, (inputs) float32.

        An error e in the weight of input j costs e² times that, once `compensated` has gone on to the end.
        """
        return (self.upper.diagonal().double().square() * self.scale).masked_fill(self.silent, 0.0).float()


def _upper(gram: Tensor, silent: Tensor, dtype: torch.dtype, together: Team = ALONE) -> tuple[Tensor, bool]:
    """R, and whether it can be right. Made in the memory of one matrix."""
    system = damped(gram, dtype)
    turn_round(system)
    system.diagonal().add_(silent.flip(0).to(dtype))
    done = factorise(system, together)
    least = float(system.diagonal().square().min())
    turn_round(system)  # and with it the factor, which is a lower triangle from now on
    return system.mT, done and least >= DAMPING / 2
