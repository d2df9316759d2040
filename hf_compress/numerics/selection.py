"""The best of many numbers, without sorting them; of equal ones, those that come first."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

_HALF = 16  # bits of a float32 that are counted at a time
_PIECE = 2**20  # numbers that are looked at together, so that what is made of them takes little memory


def best(values: Tensor, count: int) -> Tensor:
    """A mask of the `count` best of each row, (rows, any number), of equal ones the first."""
    if len(values) == 1:
        return next(best_of_all([values], count))
    rows = values.split(max(1, _PIECE // max(1, values.shape[1])))
    return torch.cat([_best_of_rows(some, count) for some in rows])


def _best_of_rows(values: Tensor, count: int) -> Tensor:
    length = values.shape[1]
    if not 0 < count < length:
        return torch.full(values.shape, count > 0, dtype=torch.bool, device=values.device)
    least = values.kthvalue(length - count + 1, dim=1, keepdim=True).values
    mask = values >= least
    more = mask.sum(dim=1) > count
    if bool(more.any()):
        tied, low = values[more], least[more]
        above, equal = tied > low, tied == low
        room = count - above.sum(dim=1, keepdim=True)
        mask[more] = above | (equal & (equal.cumsum(dim=1, dtype=torch.int32) <= room))
    return mask


def best_of_all(parts: Sequence[Tensor], count: int) -> Iterator[Tensor]:
    """Masks of the `count` best of all parts together, of their shapes, one at a time; of equal ones, the first."""
    least, left = cut([part.flatten() for part in parts], [1] * len(parts), count)
    for part in parts:
        mask, equal = (part > least).flatten(), (part == least).flatten().nonzero()[: int(left), 0]
        mask[equal] = True
        left -= len(equal)
        yield mask.view(part.shape)


def cut(parts: Sequence[Tensor], costs: Sequence[float], budget: float) -> tuple[float, float]:
    """Where a budget ends that goes to the best of all parts first.

    Counts are made of the upper halves of the numbers, and then of the lower halves of those that share the upper half
    at which the budget ends: two looks at each number, with copies of a million at a time. Parts may lie in files.

    Args:
        parts: (any number) float32 each, finite.
        costs: of each number of a part.

    Returns:
        The number at which it ends, −∞ where there is enough for all, and what is left then: all greater ones can be
        paid for, and not all that are equal to it.
    """
    if sum(len(part) * cost for part, cost in zip(parts, costs, strict=True)) <= budget:
        return -torch.inf, budget
    left, upper = budget, 0
    for half in range(2):
        counts = torch.zeros(1 << _HALF, dtype=torch.float64)
        pieces = ((piece, cost) for part, cost in zip(parts, costs, strict=True) for piece in part.split(_PIECE))
        for piece, cost in pieces:
            ranks = _ranks(piece)
            if half:
                ranks = ranks[ranks >> _HALF == upper].bitwise_and_((1 << _HALF) - 1)
            else:
                ranks = (ranks >> _HALF).add_(1 << _HALF - 1)
            counts += cost * torch.bincount(ranks, minlength=1 << _HALF).cpu()
        spent = counts.flip(0).cumsum(0)
        place = int((spent > left).int().argmax())
        left -= float(spent[place - 1]) if place else 0.0
        upper = (upper << _HALF) + (1 << _HALF) - 1 - place - (0 if half else 1 << _HALF - 1)
    bits = torch.tensor([upper ^ ((upper >> 31) & 0x7FFFFFFF)], dtype=torch.int32)
    return float(bits.view(torch.float32)), left


def _ranks(values: Tensor) -> Tensor:
    """Whole numbers, int32, in the order of float32 numbers; 0 and −0 have one, 0."""
    bits = values.contiguous().view(torch.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).masked_fill_(values == 0, 0)
