"""Numbers of bits for groups of weights, or for whole items of unequal size, under one budget."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from hf_compress.numerics.aside import Aside
from hf_compress.numerics.selection import cut

_GROUPS = 2**15  # looked at together, so that what is made of their errors takes little memory
_STEPS = 20_000  # that a budget is cut into at most, so that the table of what is left stays small


def spend_bits(errors: Tensor, choices: list[int], budget: float, aside: Aside | None = None) -> Tensor:
    """The number of bits for each group that makes the sum of errors least, at so many bits a weight in the mean.

    Bits are given where a further one takes away most, in float32, and of those that take away as much to the first
    groups. That is the best there is where errors fall ever more slowly. Where they do not, several steps are taken as
    one, and the last group to get bits may be left without.

    Args:
        errors: of each group at each choice, (groups, choices); groups of one size.
        choices: numbers of bits, rising.
        budget: bits a weight.
        aside: where what is as large as the errors goes, which may lie there themselves; in memory when None.

    Returns:
        (groups) uint8, entries of `choices`; aside.

    Raises:
        ValueError: a budget below the smallest choice.
    """
    _check(budget, choices)
    empty = partial(torch.empty, device=errors.device) if aside is None else aside.empty
    widths = torch.tensor(choices, dtype=torch.float64, device=errors.device)
    gains = empty((len(errors), len(choices) - 1), dtype=torch.float32)
    for part, own in zip(gains.split(_GROUPS), errors.split(_GROUPS), strict=True):
        hull = _convex(own.double(), widths)
        part.copy_((hull[:, :-1] - hull[:, 1:]) / widths.diff())  # falling, from left to right
    costs = [after - before for before, after in pairwise(choices)]
    least, left = cut(list(gains.unbind(1)), costs, (budget - choices[0]) * len(errors) + 1e-6)
    found = empty((len(errors),), dtype=torch.uint8)
    for out, part, own in zip(found.split(_GROUPS), gains.split(_GROUPS), errors.split(_GROUPS), strict=True):
        taken, equal = part > least, (part == least).nonzero()
        spent = widths.diff()[equal[:, 1]].cumsum(0)  # on those at which the budget ends, as far as it goes
        taken[tuple(equal[spent <= left].T)] = True
        left -= float(spent[-1]) if len(spent) else 0.0
        steps = taken.long().cumprod(dim=1).sum(dim=1)
        within = torch.arange(len(choices), device=errors.device) <= steps[:, None]
        best = own.masked_fill(~within, torch.inf).argmin(dim=1)  # no bits that make it worse, or no better
        out.copy_(widths[best])
    return found


def spread_bits(groups: int, choices: Sequence[int], budget: float, aside: Aside | None = None) -> Tensor:
    """The same number of bits for all groups; where the budget lies between two, more for some, evenly spread.

    Args:
        choices: numbers of bits, rising.
        budget: bits a weight in the mean.
        aside: as of `spend_bits`.

    Returns:
        (groups) uint8, entries of `choices`; aside.

    Raises:
        ValueError: a budget below the smallest choice.
    """
    _check(budget, choices)
    low = max(bits for bits in choices if bits <= budget)
    high = min((bits for bits in choices if bits > budget), default=low + 1)
    more = math.floor(groups * (budget - low) / (high - low) + 1e-6) if low < choices[-1] else 0
    found = (torch.empty if aside is None else aside.empty)((groups,), dtype=torch.uint8)
    for start, out in zip(range(0, groups, _GROUPS), found.split(_GROUPS), strict=True):
        places = torch.arange(start, start + len(out) + 1) * more // groups  # how many groups before each have more
        out.copy_(torch.where(places.diff() > 0, high, low))
    return found


def _check(budget: float, choices: Sequence[int]) -> None:
    if budget < choices[0]:
        raise ValueError(f"{budget} bits a weight are fewer than the fewest of a group, {choices[0]}")


def _convex(errors: Tensor, widths: Tensor) -> Tensor:
    """The largest convex sequences below the errors of each group."""
    hull = errors.clone()
    count = errors.shape[1]
    for middle in range(1, count - 1):
        for left in range(middle):
            for right in range(middle + 1, count):
                share = (widths[middle] - widths[left]) / (widths[right] - widths[left])
                hull[:, middle] = hull[:, middle].minimum(errors[:, left] * (1 - share) + errors[:, right] * share)
    return hull


def spend_on_items(errors: Tensor, costs: Sequence[Sequence[int]], budget: int) -> list[int]:
    """The choice for each item that makes the sum of errors least within a budget, where items differ in size.

    A knapsack, by dynamic programming: the best there is, where budget and costs are whole multiples of a unit of which
    the budget leaves no more than 20,000 to be spent; else costs above the lowest are rounded up to such a unit.

    Args:
        errors: of each item at each choice, (items, choices), finite.
        costs: bits that each item takes at each choice, (items, choices).
        budget: bits for all of them.

    Returns:
        The index of each item's choice; among equals, the cheaper.

    Raises:
        ValueError: a budget below what all items take at least.
    """
    bits = np.asarray(costs, dtype=np.int64)
    least = bits.min(axis=1)
    left = budget - int(least.sum())
    if left < 0:
        raise ValueError(f"{budget} bits are fewer than the {int(least.sum())} that all items take at least")
    extra = bits - least[:, None]
    spendable = min(left, int(extra.max(axis=1).sum()))
    unit = max(int(np.gcd.reduce(extra, axis=None)), -(-spendable // _STEPS), 1)
    extra = -(-extra // unit)
    left = min(left // unit, int(extra.max(axis=1).sum()))
    order = np.argsort(extra, axis=1, kind="stable")  # the cheaper first, for ties
    ranked = np.take_along_axis(extra, order, axis=1)
    values = np.take_along_axis(errors.detach().double().cpu().numpy(), order, axis=1)
    best, taken = np.zeros(left + 1), []  # the least error of the items so far at no more than so many units
    for own, steps in zip(values, ranked, strict=True):
        table = np.full((len(steps), left + 1), np.inf)
        for row, value, step in zip(table, own, steps, strict=True):
            row[step:] = best[: max(0, left + 1 - step)] + value
        taken.append(table.argmin(axis=0).astype(np.int8))
        best = table.min(axis=0)
    found: list[int] = []
    for item in reversed(range(len(bits))):
        place = taken[item][left]
        found.append(int(order[item, place]))
        left -= int(ranked[item, place])
    return found[::-1]
