"""Symmetric products, factors and inverses, held against those of torch and of LAPACK's ordinary routines."""

import pytest
import torch
from torch import Tensor

from hf_compress.numerics import symmetric
from hf_compress.numerics.symmetric import (
    add_products,
    cholesky,
    inverse,
    mirror,
    regular_cholesky,
    solve,
    turn_round,
    turned,
)

DTYPES = (torch.float32, torch.float64)


def rows(count: int = 40, width: int = 11, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, width, generator=generator, dtype=torch.float64).to(dtype)


def gram(width: int = 11, dtype: torch.dtype = torch.float64) -> Tensor:
    x = rows(width=width)
    return (x.T @ x).to(dtype)


@pytest.mark.parametrize("columns", [1, 4, 5, 11, 12])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_upper_triangle_is_summed_and_mirrored(
    columns: int, weighted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(symmetric, "_COLUMNS", columns)
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


@pytest.mark.parametrize("at_once", [256, 2])  # right sides
@pytest.mark.parametrize("dtype", DTYPES)
def test_factor_solution_and_inverse(dtype: torch.dtype, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(symmetric, "_RIGHT", at_once)
    matrix, right = gram(dtype=dtype), rows(11, 3, dtype)
    exact = gram()
    given = matrix.clone()
    factor = cholesky(given)
    assert factor is not None
    assert factor.data_ptr() == given.data_ptr()  # no copy
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-10, "atol": 1e-12}
    torch.testing.assert_close(factor.double(), torch.linalg.cholesky(exact), **tolerance)
    torch.testing.assert_close(solve(factor, right).double(), torch.linalg.solve(exact, right.double()), **tolerance)
    result = inverse(factor)
    assert result.data_ptr() == given.data_ptr()
    torch.testing.assert_close(result.double(), torch.linalg.inv(exact), **tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_singular_to_working_precision_has_no_factor(dtype: torch.dtype) -> None:
    x = rows()
    x[:, 10] = x[:, 0] - x[:, 3]
    assert cholesky((x.T @ x).to(dtype)) is None
    dead = gram(dtype=dtype)
    dead[2], dead[:, 2] = 0, 0
    assert cholesky(dead) is None
    assert cholesky(-gram(dtype=dtype)) is None
    assert cholesky(torch.full((3, 3), torch.nan, dtype=dtype)) is None


@pytest.mark.parametrize(("share", "single"), [(1e-4, True), (1e-5, True), (1e-8, False), (1e-9, False)])
def test_how_much_of_a_feature_has_to_be_its_own(share: float, single: bool) -> None:
    matrix = torch.tensor([[1.0, 1.0], [1.0, 1.0 + share]], dtype=torch.float64)
    assert (cholesky(matrix.float()) is not None) == single
    assert cholesky(matrix) is not None


@pytest.mark.parametrize("dtype", DTYPES)
def test_features_of_very_different_scale_are_not_taken_for_singular(dtype: torch.dtype) -> None:
    scale = torch.tensor([1e6, 1e-4, 1.0, *[1.0] * 8], dtype=torch.float64)
    factor = cholesky((scale[:, None] * gram() * scale).to(dtype))
    assert factor is not None
    torch.testing.assert_close(factor.double() / scale[:, None], torch.linalg.cholesky(gram()), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_a_singular_matrix_is_raised_by_no_more_than_rounding(dtype: torch.dtype, scale: float) -> None:
    x = rows()
    x[:, 7:] = x[:, :4] / 3 + x[:, 3:7] / 7
    x[:, 5] *= 1e3
    matrix = (scale * (x.T @ x)).to(dtype)
    factor = regular_cholesky(matrix.clone)
    change = (factor @ factor.T - matrix) / (matrix.diagonal()[:, None] * matrix.diagonal()).sqrt()
    assert change.abs().max() < 200 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_regular_matrix_is_not_raised(dtype: torch.dtype) -> None:
    matrix = gram(dtype=dtype)
    factor = regular_cholesky(matrix.clone)
    error = 20 * torch.finfo(dtype).eps
    torch.testing.assert_close(factor @ factor.T, matrix, rtol=error, atol=error * float(matrix.max()))


@pytest.mark.parametrize("dtype", DTYPES)
def test_matrices_of_nothing_or_of_rounding_alone(dtype: torch.dtype) -> None:
    for matrix in (torch.zeros(4, 4), torch.tensor([[-1e-9, 2e-9], [2e-9, 1e-9]]), torch.full((3, 3), 1e-30)):
        assert bool(torch.isfinite(regular_cholesky(matrix.to(dtype).clone)).all())


def test_refuses_what_is_not_finite() -> None:
    for value in (torch.nan, torch.inf):
        with pytest.raises(ValueError, match="has NaN or infinite entries"):
            regular_cholesky(torch.full((3, 3), value).clone)


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
