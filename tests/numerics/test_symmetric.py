"""Symmetric products, and what is done to a matrix in its own memory."""

import pytest
import torch
from torch import Tensor

from hf_compress.numerics import symmetric
from hf_compress.numerics.symmetric import add_products, in_blocks, mirror, turn_round, turned


def rows(count: int = 40, width: int = 11) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("columns", [1, 4, 5, 11, 12])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_upper_triangle_is_summed_and_mirrored(
    columns: int, weighted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(symmetric, "_ROWS", columns)
    x = rows()
    left = x * torch.rand(40, 1, generator=torch.Generator().manual_seed(1), dtype=x.dtype) if weighted else x
    total = torch.zeros(11, 11, dtype=x.dtype)
    for part in (slice(0, 7), slice(7, 40)):
        add_products(total, left[part], x[part])
    mirror(total)
    torch.testing.assert_close(total, left.T @ x)
    assert torch.equal(total, total.T)


def test_products_below_the_diagonal_are_spared() -> None:
    total = torch.zeros(1100, 1100)
    add_products(total, torch.ones(1, 1100), torch.ones(1, 1100))
    assert not total[1024:, :1024].any()
    assert not total[512:1024, :512].any()
    assert total.triu().sum() == 1100 * 1101 / 2


def test_products_of_some_rows_alone() -> None:
    x = rows()
    total = torch.zeros(11, 11, dtype=x.dtype)
    first, _, last = in_blocks(11, 4)
    add_products(total, x, x, rows=[first, last])
    torch.testing.assert_close(total[:4], x[:, :4].T @ x)
    torch.testing.assert_close(total[8:, 8:], x[:, 8:].T @ x[:, 8:])
    assert not total[4:8].any()


@pytest.mark.parametrize("shape", [(1, 1), (5, 5), (4, 7), (1500, 1500)])
def test_a_matrix_is_turned_round_in_its_own_memory(shape: tuple[int, int]) -> None:
    matrix = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    expected = matrix.flip(0, 1)
    turn_round(matrix)
    assert torch.equal(matrix, expected)


def test_directions_do_not_hang_on_the_signs_that_they_came_with() -> None:
    directions = rows(5, 5)
    signs = torch.tensor([1.0, -1, 1, -1, -1], dtype=directions.dtype)
    assert torch.equal(turned(directions * signs), turned(directions))
    assert torch.equal(turned(directions).abs(), directions.abs())
    assert bool((turned(directions).abs().amax(dim=0) == turned(directions).amax(dim=0)).all())
