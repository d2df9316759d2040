"""Rounding of weights to few bits, and what the weights left over can do about the error.

A group of neighbouring weights shares a grid, step · (q − zero) with q in 0 … 2ᵇ − 1. Weights of a linear map are
rounded (or left out) column by column; each column's error is made up for by the columns that are still to come, as the
inputs' Gram matrix says: E. Frantar et al., "GPTQ" (arXiv 2210.17323), algorithm 1, and "SparseGPT" (arXiv 2301.00774).
What both do with the inverse of the Gram matrix is done here with a factor of itself (see `numerics.factor`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_compress.numerics.factor import Factor

_WIDTH = 128  # columns of which errors are put off, where nothing is rounded in groups


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
        return Grids.between(*limits(groups), bits, symmetric)

    @staticmethod
    def between(low: Tensor, high: Tensor, bits: Tensor, symmetric: bool) -> Grids:
        """Grids that reach from `low` to `high`, as `limits` gives them, (groups) float32; bits (groups) int32.

        Raises:
            ValueError: weights so large that no step can be stored.
        """
        top = (1 << bits) - 1
        if symmetric:
            zeros = 1 << (bits - 1)
            reach = torch.maximum(-low, high) / (zeros - 1).clamp(min=1)  # as far up as down: nothing is cut off
        else:
            reach = (high - low) / top
        # The upper half of a float32 is a bfloat16; rounded up, so that the largest weight is still within reach.
        steps = ((reach.view(torch.int32) + 0xFFFF) >> 16).to(torch.int16)
        grids = Grids(steps, torch.zeros_like(top) if not symmetric else zeros, top)
        if not torch.isfinite(grids.step).all():
            largest = float(torch.maximum(-low, high).max())
            raise ValueError(f"the weight reaches {largest:.3g}, for which no step can be stored")
        if symmetric:
            return grids
        return Grids(steps, (-low / grids._safe).round().int().clamp(min=0).minimum(top), top)

    @property
    def step(self) -> Tensor:
        """Steps as numbers, (groups) float32."""
        return self.steps.view(torch.bfloat16).float()

    @property
    def _safe(self) -> Tensor:
        step = self.step
        return torch.where(step > 0, step, 1.0)

    def round(self, weights: Tensor) -> Tensor:
        """The nearest q of weights (groups, any number), int32."""
        return self._whole(weights).int() + self.zeros[:, None]

    def nearest(self, weights: Tensor) -> Tensor:
        """What the nearest q of weights (groups, any number) stand for, float32."""
        return self._whole(weights).mul_(self.step[:, None])

    def value(self, q: Tensor) -> Tensor:
        """What q (groups, any number) stand for, float32."""
        return self.step[:, None] * (q - self.zeros[:, None])

    def _whole(self, weights: Tensor) -> Tensor:
        """The nearest q less the zero of weights (groups, any number), whole numbers in float32."""
        low, high = -self.zeros[:, None].float(), (self.top - self.zeros)[:, None].float()
        return (weights / self._safe[:, None]).round_().clamp_(low, high)


def limits(groups: Tensor) -> tuple[Tensor, Tensor]:
    """The least and the largest weight of each group (groups, group_size), or 0, (groups) each."""
    return groups.amin(1).clamp(max=0), groups.amax(1).clamp(min=0)


@torch.no_grad()
def compensated(
    weight: Tensor,
    gram: Tensor | Factor,
    kept: Tensor | None = None,
    bits: Tensor | None = None,
    group_size: int = 0,
    symmetric: bool = True,
) -> tuple[Tensor, Tensor | None, Grids | None]:
    """Leave weights out, round the others, and let what comes later make up for what came before.

    Args:
        weight: (outputs, inputs).
        gram: Σ x xᵀ of the inputs, (inputs, inputs), or its factor, where several weights have one.
        kept: bool, (outputs, inputs); None for all.
        bits: of each group, (outputs, inputs / group_size, rounded up); None to round nothing.
        group_size, symmetric: of the grids, where there are bits.

    Returns:
        The new weight, float32, 0 where it is not kept; its q (outputs, inputs), and the grids of all groups, row by
        row, where there are bits.

    Raises:
        ValueError: shapes that do not fit; numbers that are not finite.
    """
    outputs, inputs = weight.shape
    size = tuple(gram.upper.shape if isinstance(gram, Factor) else gram.shape)
    if size != (inputs, inputs) or (kept is not None and kept.shape != weight.shape):
        raise ValueError(
            f"a weight {tuple(weight.shape)} needs a gram ({inputs}, {inputs}) and kept of its shape; got "
            f"{size}, {None if kept is None else tuple(kept.shape)}"
        )
    upper = (gram if isinstance(gram, Factor) else Factor.of(gram)).upper
    # A row for each input, so that what one column of the weight needs lies in one piece.
    work = weight.detach().T.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    errors = torch.empty_like(work)
    width = group_size if bits is not None else min(_WIDTH, inputs)
    q = torch.zeros(weight.shape, dtype=torch.int32, device=weight.device) if bits is not None else None
    grids: list[Grids] = []
    for start in range(0, inputs, width):
        part = slice(start, min(start + width, inputs))
        shares = upper[: part.stop, part] / upper.diagonal()[part]
        owed = shares[:start].T @ errors[:start]
        own = None if kept is None else kept[:, part].T.float().contiguous()
        if bits is not None:  # by what the columns would be if none of them were rounded, or left out
            groups = work[part] + torch.linalg.solve_triangular(shares[start:].T, owed, upper=False)
            groups = (groups if own is None else groups.mul_(own)).T.contiguous()
            grids.append(Grids.of(groups, bits[:, start // width].int(), symmetric))
        wanted = owed.add_(work[part])
        whole = _round_columns(wanted, work[part], errors[part], shares[start:], own, grids[-1] if grids else None)
        if q is not None:
            q[:, part] = whole.T.int() + grids[-1].zeros[:, None]
        work[part] = wanted
    return work.T, q, _stacked(grids, outputs) if grids else None


def _round_columns(
    wanted: Tensor, old: Tensor, errors: Tensor, shares: Tensor, kept: Tensor | None, grids: Grids | None
) -> Tensor:
    """Round, or leave out, the columns of a block one by one.

    Args:
        wanted: what they had best be because of the errors before the block, (columns, outputs); written over by what
            they become.
        old: what they were.
        errors: the difference of both, to be filled.
        shares: R_ij / R_jj of the block, (columns, columns).

    Returns:
        q less the zero of the group, (columns, outputs) float32, where there are grids.
    """
    whole = torch.empty_like(wanted) if grids is not None else wanted
    if grids is not None:
        step, safe, zeros = grids.step, grids._safe, grids.zeros.float()
        low, high = -zeros, grids.top - zeros
    for column, value in enumerate(wanted):
        torch.addmv(value, errors[:column].T, shares[:column, column], out=value)
        if grids is not None:
            torch.div(value, safe, out=whole[column]).round_().clamp_(low, high)
            torch.mul(whole[column], step, out=value)
        if kept is not None:
            value.mul_(kept[column])
        torch.sub(old[column], value, out=errors[column])
    return whole


def _stacked(grids: list[Grids], outputs: int) -> Grids:
    """Grids of columns of groups as those of all groups, row by row."""
    steps, zeros, top = (
        torch.stack([getattr(grid, name) for grid in grids], dim=1).flatten() for name in ("steps", "zeros", "top")
    )
    return Grids(steps, zeros, top)
