"""The best of many against sorting them all."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_compress.numerics.selection import best, best_of_all, cut

TINY = [0.0, -0.0, 1e-45, -1e-45, 1e-38, -1e-38, 1.0, -1.0, 1 + 2**-23, 3e38, -3e38]


def sorted_out(values, count):
    """By a stable sort of (row) lists."""
    mask = torch.zeros(values.shape, dtype=torch.bool)
    for row, numbers in enumerate(values.tolist()):
        mask[row, sorted(range(len(numbers)), key=lambda i: -numbers[i])[:count]] = True
    return mask


def numbers(rows, length, levels, seed):
    """Normal ones, or whole ones of few levels, many of which are equal."""
    found = torch.randn(rows, length, generator=torch.Generator().manual_seed(seed))
    return (found * levels).round() if levels else found


@pytest.mark.parametrize("levels", [0, 1, 3])
@pytest.mark.parametrize(("rows", "length"), [(1, 1), (1, 200), (40, 4), (7, 33)])
def test_the_best_of_each_row(rows, length, levels):
    values = numbers(rows, length, levels, 0)
    for count in range(length + 1):
        assert torch.equal(best(values, count), sorted_out(values, count))


@pytest.mark.parametrize("levels", [0, 1, 3])
def test_the_best_of_all_parts(levels):
    parts = [numbers(3, 5, levels, 1), numbers(1, 40, levels, 2).T, numbers(8, 2, levels, 3).T]
    joined = torch.cat([part.flatten() for part in parts])[None]
    for count in range(joined.shape[1] + 1):
        found = torch.cat([mask.flatten() for mask in best_of_all(parts, count)])[None]
        assert torch.equal(found, sorted_out(joined, count))
        assert [mask.shape for mask in best_of_all(parts, count)] == [part.shape for part in parts]


@given(st.lists(st.sampled_from(TINY) | st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1))
def test_numbers_of_all_sizes(found):
    values = torch.tensor([found], dtype=torch.float32)
    for count in range(len(found) + 1):
        expected = sorted_out(values, count)
        assert torch.equal(best(values, count), expected)
        assert torch.equal(next(best_of_all([values], count)), expected)


@given(st.lists(st.tuples(st.integers(-3, 3), st.integers(1, 3)), min_size=1), st.integers(0, 60))
def test_where_a_budget_ends(items, budget):
    """Of items of several costs, a part for each cost."""
    parts = [torch.tensor([float(value) for value, own in items if own == cost]) for cost in (1, 2, 3)]
    least, left = cut(parts, [1, 2, 3], budget)
    above = sum(cost for value, cost in items if value > least)
    if sum(cost for _, cost in items) <= budget:
        assert least == -torch.inf
    else:
        assert left == budget - above >= 0
        assert above + sum(cost for value, cost in items if value == least) > budget
