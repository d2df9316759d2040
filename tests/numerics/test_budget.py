"""Budgets of bits against all allocations there are."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_compress.numerics import budget as budget_module
from hf_compress.numerics.budget import spend_bits, spread_bits

CHOICES = (2, 3, 4, 5, 6, 8)


def total(errors, choices, bits):
    return sum(float(errors[group, choices.index(b)]) for group, b in enumerate(bits))


def best_of_all(errors, choices, budget):
    """The least error of all allocations within the budget."""
    within = (
        bits for bits in itertools.product(choices, repeat=len(errors)) if sum(bits) <= budget * len(errors) + 1e-6
    )
    return min(total(errors, choices, bits) for bits in within)


def convex(groups, choices, seed):
    """Errors that fall ever more slowly, as those of rounding do."""
    scale = torch.rand(groups, generator=torch.Generator().manual_seed(seed)).double() * 10 + 0.1
    rate = 1.5 + 3 * torch.rand(groups, generator=torch.Generator().manual_seed(seed + 1)).double()
    return torch.stack([scale * rate ** -float(b) for b in choices], dim=1)


@pytest.mark.parametrize("seed", range(20))
def test_neighbouring_bits_are_spent_as_well_as_can_be(seed):
    """Steps of one bit each leave nothing over, so that taking the largest gains is the best there is."""
    errors, choices = convex(5, (2, 3, 4, 5), seed), [2, 3, 4, 5]
    for spare in range(16):
        found = spend_bits(errors, choices, 2 + spare / 5).tolist()
        assert sum(found) == 10 + spare
        assert total(errors, choices, found) == pytest.approx(best_of_all(errors, choices, 2 + spare / 5), rel=1e-9)


@pytest.mark.parametrize("seed", range(5))
def test_uneven_choices_lose_no_more_than_one_step(seed):
    """Where choices lie apart, a last step may not fit; what is lost is less than the largest step gains."""
    errors, choices = convex(4, CHOICES, seed), list(CHOICES)
    for budget in (2.0, 2.5, 3.25, 4.75, 6.1, 7.5, 8.0, 11.0):
        found = spend_bits(errors, choices, budget).tolist()
        assert sum(found) <= 4 * budget + 1e-6
        assert set(found) <= set(choices)
        best = best_of_all(errors, choices, budget)
        gains = [total(errors, choices, found) - total(errors, choices, other) for other in _one_more(found, choices)]
        assert total(errors, choices, found) <= best + max(gains, default=0.0) + 1e-12


def _one_more(found, choices):
    """Allocations with one group a step further."""
    for group, bits in enumerate(found):
        if bits < choices[-1]:
            yield [*found[:group], choices[choices.index(bits) + 1], *found[group + 1 :]]


@pytest.mark.parametrize("seed", range(20))
def test_errors_of_any_shape_stay_within_the_budget(seed):
    generator = torch.Generator().manual_seed(seed)
    errors, choices = torch.rand(30, len(CHOICES), generator=generator), list(CHOICES)
    for budget in (2.0, 2.9, 4.0, 6.3, 8.0):
        found = spend_bits(errors, choices, budget)
        assert (found.dtype, found.shape) == (torch.uint8, (30,))
        assert int(found.sum()) <= 30 * budget + 1e-6
        assert set(found.tolist()) <= set(choices)


@pytest.mark.parametrize(
    ("first", "second", "budget", "expected"),
    [
        # steps that pay only together are taken together, and never half of them
        ([10.0, 10.0, 0.0], [3.0, 2.0, 1.5], 3.0, [4, 2]),
        ([10.0, 10.0, 0.0], [3.0, 2.9, 2.85], 3.0, [4, 2]),
        ([10.0, 10.0, 0.0], [3.0, 2.9, 2.85], 2.5, [2, 2]),
        # a group whose weights lie on the grid of 2 bits has errors at more: these are not spent
        ([0.0, 0.5, 0.25], [4.0, 2.0, 1.0], 4.0, [2, 4]),
    ],
)
def test_errors_that_do_not_fall_evenly(first, second, budget, expected):
    assert spend_bits(torch.tensor([first, second]), [2, 3, 4], budget).tolist() == expected


def test_a_group_with_larger_errors_gets_no_fewer():
    errors = convex(1, CHOICES, 0) * torch.tensor([[100.0], [10.0], [1.0], [0.1]])
    for budget in (3.0, 4.0, 5.0):
        found = spend_bits(errors, list(CHOICES), budget).tolist()
        assert found == sorted(found, reverse=True)
        assert found[0] > found[-1]


@pytest.mark.parametrize(("budget", "bits"), [(8.0, 8), (math.inf, 8), (2.0, 2)])
def test_enough_for_all_gives_all_and_the_fewest_gives_the_fewest(budget, bits):
    assert spend_bits(convex(6, CHOICES, 3), list(CHOICES), budget).tolist() == [bits] * 6


def test_a_budget_below_the_fewest_bits_is_refused():
    with pytest.raises(ValueError, match=r"1\.9 bits a weight are fewer than the fewest of a group, 2"):
        spend_bits(convex(3, CHOICES, 0), list(CHOICES), 1.9)


def by_sorting(errors, choices, budget):
    """All steps of all groups in the order of what they take away, until the budget ends."""
    steps = []
    for group, own in enumerate(errors.double().tolist()):
        low = list(own)
        for i in range(1, len(choices) - 1):
            for a, b in itertools.product(range(i), range(i + 1, len(choices))):
                share = (choices[i] - choices[a]) / (choices[b] - choices[a])
                low[i] = min(low[i], own[a] * (1 - share) + own[b] * share)
        for i in range(len(choices) - 1):
            cost = choices[i + 1] - choices[i]
            steps.append((-float(np.float32((low[i] - low[i + 1]) / cost)), group, i, cost))
    left, reached = (budget - choices[0]) * len(errors) + 1e-6, [0] * len(errors)
    for _, group, i, cost in sorted(steps):
        left -= cost
        if left < 0:
            break
        reached[group] += reached[group] == i
    return [
        choices[min(range(top + 1), key=own.__getitem__)] for own, top in zip(errors.tolist(), reached, strict=True)
    ]


@pytest.mark.parametrize("part", [7, 1000])
@pytest.mark.parametrize("kind", ["convex", "any", "alike", "none"])
def test_bits_are_those_of_sorting_all_steps(kind, part, monkeypatch):
    """Also where many steps take away as much, which the first groups then get; in parts, or all at once."""
    monkeypatch.setattr(budget_module, "_GROUPS", part)
    generator = torch.Generator().manual_seed(0)
    errors = {
        "convex": convex(60, CHOICES, 1).float(),
        "any": torch.rand(60, len(CHOICES), generator=generator),
        "alike": convex(60, CHOICES, 2).float() * 0 + torch.tensor([32.0, 16.0, 8.0, 4.0, 2.0, 1.0]),
        "none": torch.zeros(60, len(CHOICES)),
    }[kind]
    errors[20:30] = errors[3]
    for budget in (2.0, 2.3, 3.1, 4.25, 5.999, 7.7, 8.0):
        assert spend_bits(errors, list(CHOICES), budget).tolist() == by_sorting(errors, CHOICES, budget)


@given(st.integers(1, 60), st.floats(2, 9))
def test_uniform_bits_differ_by_one_choice_and_spend_what_there_is(groups, budget):
    found = spread_bits(groups, CHOICES, budget)
    low = max(bits for bits in CHOICES if bits <= budget)
    high = min([bits for bits in CHOICES if bits > budget], default=low)
    assert set(found.tolist()) <= {low, high}
    assert float(found.sum()) <= groups * budget + 1e-3
    if high > low and not bool((found == high).all()):
        assert float(found.sum()) + high - low > groups * budget - 1e-3


def test_what_uniform_bits_leave_over_is_spread_evenly():
    assert spread_bits(8, [3, 4], 3.25).tolist() == [3, 3, 3, 4, 3, 3, 3, 4]
    halves = spread_bits(1000, [3, 4], 3.7).view(10, 100).double().mean(dim=1)
    assert torch.allclose(halves, torch.full((10,), 3.7, dtype=torch.float64))


def test_no_budget_is_below_the_fewest():
    with pytest.raises(ValueError, match=r"1\.5 bits a weight are fewer than the fewest of a group, 2"):
        spread_bits(4, CHOICES, 1.5)
