"""Cholesky factors and inverses, held against LAPACK's, in one process and in several."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hf_compress.numerics import cholesky as module
from hf_compress.numerics.cholesky import cholesky, factorise, inverse, own_columns, own_rows, regular_cholesky, solve
from hf_compress.numerics.team import ALONE, Team
from tests.helpers.allocated import most_allocated
from tests.helpers.team import in_team

DTYPES = (torch.float32, torch.float64)
WORLDS = (1, 2, 3, 7)


def rows(count: int = 40, width: int = 11, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, width, generator=generator, dtype=torch.float64).to(dtype)


def gram(width: int = 11, dtype: torch.dtype = torch.float64) -> Tensor:
    x = rows(width=width)
    return (x.T @ x).to(dtype)


def part_of(matrix: Tensor, together: Team) -> Tensor:
    """What one process has of a matrix: its rows of the upper triangle, and the diagonal; NaN elsewhere."""
    own = torch.full_like(matrix, torch.nan)
    for some in own_rows(len(matrix), together):
        own[some] = matrix[some]
    own[torch.ones_like(own).tril(-1).bool()] = torch.nan
    own.diagonal().copy_(matrix.diagonal())
    return own


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("across", [False, True])  # how the right sides lie in memory
def test_factor_solution_and_inverse(dtype: torch.dtype, across: bool) -> None:
    matrix, right = gram(dtype=dtype), rows(11, 3, dtype)
    right = right.T.contiguous().T if across else right
    exact = gram()
    given = matrix.clone()
    factor = cholesky(given)
    assert factor is not None
    assert factor.data_ptr() == given.data_ptr()  # no copy
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-10, "atol": 1e-12}
    torch.testing.assert_close(factor.double(), torch.linalg.cholesky(exact), **tolerance)
    before, solution = right.clone(), solve(factor, right)
    torch.testing.assert_close(solution.double(), torch.linalg.solve(exact, right.double()), **tolerance)
    assert torch.equal(right, before)
    result = inverse(factor)
    assert result.data_ptr() == given.data_ptr()
    torch.testing.assert_close(result.double(), torch.linalg.inv(exact), **tolerance)


def test_a_solution_takes_no_more_memory_than_itself() -> None:
    factor, right = torch.eye(400) + torch.ones(400, 400).tril(), torch.ones(400, 30)
    assert most_allocated(lambda: solve(factor, right)) < 2 * right.nbytes


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


@pytest.mark.parametrize("at_once", [1, 4, 5, 11, 12])
@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_several_factorise_and_invert_as_one_does(
    dtype: torch.dtype, world: int, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each with its own rows alone; and to the same bits."""
    monkeypatch.setattr(module, "_ROWS", at_once)
    matrix, exact = gram(dtype=dtype), gram()
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-10, "atol": 1e-12}

    def work(together: Team) -> tuple[Tensor, Tensor]:
        factor = cholesky(part_of(matrix, together), together)
        assert factor is not None
        kept = factor.clone()
        return kept, inverse(factor, together).clone()

    found = in_team(world, work)
    for factor, inverted in found:
        torch.testing.assert_close(factor.double(), torch.linalg.cholesky(exact), **tolerance)
        torch.testing.assert_close(inverted.double(), torch.linalg.inv(exact), **tolerance)
        assert torch.equal(factor, found[0][0])
        assert torch.equal(inverted, found[0][1])


@pytest.mark.parametrize("world", WORLDS)
def test_at_the_width_of_a_layer(world: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1500, 1100, generator=generator)
    matrix = x.T @ x

    def work(together: Team) -> tuple[Tensor, Tensor]:
        factor = regular_cholesky(lambda: part_of(matrix, together), together)
        kept = factor.clone()
        return kept, inverse(factor, together).clone()

    for factor, inverted in in_team(world, work):
        torch.testing.assert_close(factor @ factor.T, matrix, rtol=1e-4, atol=1e-2)
        torch.testing.assert_close(inverted @ matrix, torch.eye(1100), rtol=0, atol=1e-3)


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("broken", [0, 5, 10])
def test_all_are_told_where_there_is_no_factor(broken: int, world: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_ROWS", 2)
    matrix = gram()
    matrix[broken, broken] *= -1
    assert in_team(world, lambda together: factorise(part_of(matrix, together), together)) == [False] * world
    singular = gram()
    singular[broken], singular[:, broken] = 0, 0
    assert in_team(world, lambda together: cholesky(part_of(singular, together), together)) == [None] * world
    raised = in_team(world, lambda together: regular_cholesky(lambda: part_of(singular, together), together).clone())
    for factor in raised:
        torch.testing.assert_close(factor @ factor.T, singular + factor[broken, broken] ** 2 * one(broken))
        assert torch.equal(factor, raised[0])


def one(place: int) -> Tensor:
    matrix = torch.zeros(11, 11, dtype=torch.float64)
    matrix[place, place] = 1
    return matrix


@pytest.mark.parametrize("size", [3, 256, 896, 4864])
@pytest.mark.parametrize("world", WORLDS)
def test_every_row_is_one_process_s_own(world: int, size: int) -> None:
    shares = [own_rows(size, member(rank, world)) for rank in range(world)]
    covered = sorted((some.start, some.stop) for share in shares for some in share)
    assert [start for start, _ in covered] == [0, *(stop for _, stop in covered[:-1])]
    assert covered[-1][1] == size


@pytest.mark.parametrize("world", WORLDS)
def test_columns_of_an_inverse_are_shared_by_what_they_take(world: int) -> None:
    shares = [own_columns(19, member(rank, world)) for rank in range(world)]
    assert sorted(number for share in shares for number in share) == list(range(19))
    work = [sum((number + 1) ** 2 for number in share) for share in shares]
    assert max(work) <= 1.1 * sum(work) / world


def member(rank: int, world: int) -> Team:
    together = Team()
    together.rank, together.world = rank, world
    return together


def test_one_process_has_all_rows() -> None:
    assert own_rows(300, ALONE) == [slice(0, 256), slice(256, 300)]
