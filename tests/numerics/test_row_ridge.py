"""Ridge regression on few rows, against a stacked least-squares problem by numpy."""

import numpy as np
import pytest
import torch
from torch import Tensor

from hf_compress.numerics import cholesky
from hf_compress.numerics.row_ridge import solve_rows
from tests.helpers.allocated import most_allocated
from tests.helpers.team import in_team


def by_numpy(x, y, penalty, parts):
    """With the features of every part divided by their root mean square."""
    scales = np.concatenate(
        [np.full(p.shape[1], np.sqrt((p**2).mean())) for p in np.split(x, np.cumsum(parts)[:-1], 1)]
    )
    scaled = x / scales
    rows = np.vstack([scaled, np.sqrt(penalty * len(x)) * np.eye(x.shape[1])])
    solution, *_ = np.linalg.lstsq(rows, np.vstack([y, np.zeros((x.shape[1], y.shape[1]))]), rcond=None)
    return solution / scales[:, None]


@pytest.mark.parametrize(("rows", "parts"), [(20, (30, 12)), (42, (30, 12)), (200, (30, 12)), (15, (42,))])
@pytest.mark.parametrize("penalty", [0.01, 0.1, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_the_ridge_solution(rows, parts, penalty, dtype):
    """By the rows' Gram matrix and by the features' alike, with parts of very different size."""
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, 42, generator=generator)
    x[:, parts[0] :] *= 1e3
    x, y = x.to(dtype), torch.randn(rows, 5, generator=generator)
    found = solve_rows(x, y, penalty, parts)
    expected = by_numpy(x.double().numpy(), y.double().numpy(), penalty, parts)
    assert found.dtype == torch.float32
    scale = np.abs(expected).max(axis=1, keepdims=True)
    assert (np.abs(found.numpy() - expected) <= 1e-4 * scale + 1e-9).all()


@pytest.mark.parametrize(("rows", "features"), [(40, 90), (90, 40)])
@pytest.mark.parametrize("world", [2, 3])
def test_a_team_finds_what_one_does(world, rows, features, monkeypatch):
    """All of it the very same."""
    monkeypatch.setattr(cholesky, "_ROWS", 16)
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(rows, features, generator=generator), torch.randn(rows, 7, generator=generator)
    parts = (30, features - 30)
    found = in_team(world, lambda team: solve_rows(x, y, 0.1, parts, team))
    torch.testing.assert_close(found[0], solve_rows(x, y, 0.1, parts), rtol=1e-4, atol=1e-5)
    assert all(torch.equal(one, found[0]) for one in found)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 3e25])
def test_rows_that_are_not_finite_or_too_large(value):
    x, y = torch.ones(3, 5), torch.ones(3, 2)
    x[1, 2] = value
    with pytest.raises(ValueError, match="expected finite ones"):
        solve_rows(x, y, 0.1, (5,))
    if value != 3e25:
        y[0, 1] = value
        with pytest.raises(ValueError, match="y has NaN or infinite"):
            solve_rows(torch.ones(3, 5), y, 0.1, (5,))


def test_features_that_are_all_zero_get_nothing():
    x = torch.randn(10, 6, generator=torch.Generator().manual_seed(0))
    x[:, 4:] = 0
    found = solve_rows(x, torch.ones(10, 2), 0.1, (4, 2))
    assert torch.isfinite(found).all()
    assert not found[4:].any()


@pytest.mark.parametrize(("rows", "features"), [(1200, 2600), (2600, 1200)])
def test_a_fit_holds_one_system_beside_what_it_is_given(rows: int, features: int) -> None:
    """Two for fewer rows than features: their products stay as they are, for another penalty."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(rows, features, generator=generator).bfloat16(), torch.randn(rows, 32, generator=generator)
    systems, part = (2 if rows < features else 1) * min(rows, features) ** 2, 1024 * max(rows, features)
    results = 6 * 32 * max(rows, features)
    found: list[Tensor] = []
    assert most_allocated(lambda: found.append(solve_rows(x, y, 0.1, [features]))) < 4 * (systems + part + results)
    exact = x.double()
    system = exact.T @ exact
    system.diagonal().add_(0.1 * rows * float(exact.square().mean()))
    torch.testing.assert_close(found[0].double(), torch.linalg.solve(system, exact.T @ y.double()), rtol=0, atol=1e-4)
