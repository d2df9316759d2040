"""Rounding of weights to few bits, and what the weights left over can do about the error.

A group of neighbouring weights shares a grid, step · (q − zero) with q in 0 … 2ᵇ − 1. Weights of a linear map are
rounded (or left out) column by column; each column's error is made up for by the columns that are still to come, as the
inputs' Gram matrix says: E. Frantar et al., "GPTQ" (arXiv 2210.17323), algorithm 1, and "SparseGPT" (arXiv 2301.00774).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_DAMPING = 0.01  # of the mean diagonal, as in both papers


@dataclass(frozen=True)
class Grids:
    """Grids of groups of weights.

    Attributes:
        steps: (groups) int16, the upper halves of float32 numbers, that is bfloat16.
        zeros: (groups) int32.
        top: the largest q, (groups) int32.
    """

    steps: Tensor
    zeros: Tensor
    top: Tensor

    @staticmethod
    def of(groups: Tensor, bits: Tensor, symmetric: bool) -> Grids:
        """Grids that reach as far as the weights (groups, group_size) float32 do; bits (groups) int32.

        Raises:
            ValueError: weights so large that no step can be stored.
        """
        top = (1 << bits) - 1
        if symmetric:
            zeros = 1 << (bits - 1)
            reach = groups.abs().amax(1) / (zeros - 1).clamp(min=1)  # as far up as down, so that nothing is cut off
        else:
            low, high = groups.amin(1).clamp(max=0), groups.amax(1).clamp(min=0)
            reach = (high - low) / top
        # The upper half of a float32 is a bfloat16; rounded up, so that the largest weight is still within reach.
        steps = ((reach.view(torch.int32) + 0xFFFF) >> 16).to(torch.int16)
        grids = Grids(steps, torch.zeros_like(top) if not symmetric else zeros, top)
        if not torch.isfinite(grids.step).all():
            raise ValueError(f"the weight reaches {float(groups.abs().max()):.3g}, for which no step can be stored")
        if symmetric:
            return grids
        return Grids(steps, (-low / grids._safe).round().int().clamp(min=0).minimum(top), top)

    @property
    def step(self) -> Tensor:
        """Steps as numbers, (groups) float32."""
        return self.steps.view(torch.bfloat16).float()

    @property
    def _safe(self) -> Tensor:
        return torch.where(self.step > 0, self.step, 1.0)

    def round(self, weights: Tensor) -> Tensor:
        """The nearest q of weights (groups, any number), int32."""
        values = (weights / self._safe[:, None]).round().int() + self.zeros[:, None]
        return values.clamp(min=0).minimum(self.top[:, None])

    def value(self, q: Tensor) -> Tensor:
        """What q (groups, any number) stand for, float32."""
        return self.step[:, None] * (q - self.zeros[:, None])


@torch.no_grad()
def compensated(
    weight: Tensor,
    gram: Tensor,
    kept: Tensor | None = None,
    bits: Tensor | None = None,
    group_size: int = 0,
    symmetric: bool = True,
) -> tuple[Tensor, Tensor | None, Grids | None]:
    """Leave weights out, round the others, and let what comes later make up for what came before.

    Args:
        weight: (outputs, inputs).
        gram: Σ x xᵀ of the inputs, (inputs, inputs).
        kept: bool, (outputs, inputs); None for all.
        bits: of each group, (outputs, inputs / group_size); None to round nothing.
        group_size, symmetric: of the grids, where there are bits.

    Returns:
        The new weight, float32, 0 where it is not kept; its q (outputs, inputs), and the grids of all groups, row by
        row, where there are bits.

    Raises:
        ValueError: shapes that do not fit; numbers that are not finite.
    """
    outputs, inputs = weight.shape
    if gram.shape != (inputs, inputs) or (kept is not None and kept.shape != weight.shape):
        raise ValueError(
            f"a weight {tuple(weight.shape)} needs a gram ({inputs}, {inputs}) and kept of its shape; got "
            f"{tuple(gram.shape)}, {None if kept is None else tuple(kept.shape)}"
        )
    work = weight.detach().float().clone()
    factor = _inverse_factor(gram).to(work)
    width = group_size if bits is not None else min(128, inputs)
    q = torch.zeros(weight.shape, dtype=torch.int32, device=weight.device) if bits is not None else None
    grids: list[Grids] = []
    for start in range(0, inputs, width):
        end = min(start + width, inputs)
        part, errors = work[:, start:end], torch.zeros_like(work[:, start:end])
        if bits is not None:
            of = part if kept is None else torch.where(kept[:, start:end], part, 0.0)
            grids.append(Grids.of(of.contiguous(), bits[:, start // width].int(), symmetric))
        for column in range(end - start):
            old = part[:, column].clone()
            if q is not None:
                q[:, start + column] = grids[-1].round(old[:, None])[:, 0]
                part[:, column] = grids[-1].value(q[:, start + column, None])[:, 0]
            if kept is not None:
                part[:, column] *= kept[:, start + column]
            own = factor[start + column, start:end]
            errors[:, column] = (old - part[:, column]) / own[column]
            part[:, column + 1 :] -= torch.outer(errors[:, column], own[column + 1 :])
        work[:, end:] -= errors @ factor[start:end, end:]
    return work, q, _stacked(grids, outputs) if grids else None


def unexplained(gram: Tensor) -> Tensor:
    """What of each input's energy those after it cannot make up for, (inputs) float32.

    An error e in the weight of input j costs e² times that, once `compensated` has gone on to the end.
    """
    left = 1 / _inverse_factor(gram).diagonal().square()
    return torch.where(gram.diagonal() > 0, left, 0.0).float()


def _inverse_factor(gram: Tensor) -> Tensor:
    """The upper Cholesky factor of the inverse of a damped Gram matrix, float64."""
    gram = gram.detach().double()
    if not bool(torch.isfinite(gram).all()):
        raise ValueError("the gram matrix holds NaN or infinity: run the calibration in float32 or bfloat16")
    diagonal = gram.diagonal()
    ridge = _DAMPING * diagonal.mean().clamp(min=torch.finfo(torch.float64).tiny)
    damped = gram + torch.diag((diagonal == 0).to(gram) + ridge)  # an input that is always 0 is free
    return torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True)


def _stacked(grids: list[Grids], outputs: int) -> Grids:
    """Grids of columns of groups as those of all groups, row by row."""
    steps, zeros, top = (
        torch.stack([getattr(grid, name) for grid in grids], dim=1).flatten() for name in ("steps", "zeros", "top")
    )
    return Grids(steps, zeros, top)
