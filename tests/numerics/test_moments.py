"""Weighted mean, covariance and principal directions from sums, held against the same of the rows at once."""

import math

import numpy as np
import pytest
import torch

from hf_compress.numerics.moments import Moments

WIDTH = 4


def rows(count=30, offset=0.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    scales = torch.tensor([3.0, 2.0, 1.0, 0.5], dtype=torch.float64)
    mixed = torch.randn(WIDTH, WIDTH, generator=generator, dtype=torch.float64)
    return torch.randn(count, WIDTH, generator=generator, dtype=torch.float64) * scales @ mixed + offset


def weights(count=30):
    return 3 * torch.rand(count, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def moments(x, w=None, sizes=None):
    found = Moments(x.shape[1])
    start = 0
    for size in sizes or [len(x)]:
        found.add(x[start : start + size], None if w is None else w[start : start + size])
        start += size
    return found


def by_hand(x, w):
    """Sum of the weights, mean, and covariance, a number at a time."""
    x, w = x.tolist(), w.tolist()
    count = math.fsum(w)
    mean = [math.fsum(w[t] * x[t][i] for t in range(len(x))) / count for i in range(WIDTH)]
    gaps = [[value - average for value, average in zip(row, mean, strict=True)] for row in x]
    products = [[math.fsum(w[t] * g[i] * g[j] for t, g in enumerate(gaps)) for j in range(WIDTH)] for i in range(WIDTH)]
    return count, mean, [[product / count for product in row] for row in products]


@pytest.mark.parametrize("sizes", [None, [1, 29], [7, 0, 20, 3]])
@pytest.mark.parametrize("weighted", [False, True])
def test_mean_and_covariance_number_by_number(weighted, sizes):
    x, w = rows(offset=2.0), weights() if weighted else None
    count, mean, covariance = by_hand(x, torch.ones(len(x)) if w is None else w)
    found = moments(x, w, sizes)
    assert float(found.count) == pytest.approx(count, rel=1e-12)
    assert found.mean.tolist() == pytest.approx(mean, rel=1e-12)
    np.testing.assert_allclose(found.covariance.numpy(), covariance, rtol=1e-10)


@pytest.mark.parametrize("factor", [1, 10])
def test_a_weight_of_two_is_the_row_twice_and_none_is_no_row(factor):
    """A common factor scales nothing but the count."""
    x = rows(6)
    found, doubled = moments(x, factor * torch.tensor([2, 1, 0, 1, 0, 3])), moments(x[[0, 0, 1, 3, 5, 5, 5]])
    assert float(found.count) == 7 * factor
    torch.testing.assert_close(found.mean, doubled.mean)
    torch.testing.assert_close(found.covariance, doubled.covariance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_of_any_dtype_are_summed_in_float64(dtype):
    x = rows().to(dtype)
    found = moments(x, weights().to(dtype))
    assert {tensor.dtype for tensor in (found.x_sum, found.gram, found.mean)} == {torch.float64}
    _, mean, covariance = by_hand(x.double(), weights().to(dtype).double())
    assert found.mean.tolist() == pytest.approx(mean, rel=1e-10)
    np.testing.assert_allclose(found.covariance.numpy(), covariance, rtol=1e-9)


def test_a_large_offset_costs_few_digits():
    found = moments(rows(offset=1e4))
    np.testing.assert_allclose(found.covariance.numpy(), by_hand(rows(), torch.ones(30))[2], rtol=0, atol=1e-6)


@pytest.mark.parametrize("weighted", [False, True])
def test_principal_directions_are_those_of_the_singular_values(weighted):
    """Of the centred rows, each times the root of its weight."""
    x, w = rows(offset=2.0), weights() if weighted else torch.ones(30, dtype=torch.float64)
    centred = x - (w[:, None] * x).sum(0) / w.sum()
    _, values, directions = np.linalg.svd((w.sqrt()[:, None] * centred).numpy())
    found, variances = moments(x, w).principal()
    assert variances.tolist() == pytest.approx((values**2 / float(w.sum())).tolist(), rel=1e-9)
    for column in range(WIDTH):
        along = float(found[:, column] @ torch.from_numpy(directions[column]))
        assert abs(along) == pytest.approx(1, abs=1e-9)


def test_principal_directions_are_orthonormal_also_where_variance_is_missing():
    x = rows()
    x[:, 1] = 2 * x[:, 0]
    directions, variances = moments(x).principal()
    torch.testing.assert_close(directions.T @ directions, torch.eye(WIDTH, dtype=torch.float64))
    assert variances[-1] == pytest.approx(0, abs=1e-9)
    assert (variances >= 0).all()
    assert variances.tolist() == sorted(variances.tolist(), reverse=True)


def test_no_rows_add_nothing():
    found = moments(rows(0))
    assert (float(found.count), found.gram.count_nonzero()) == (0, 0)
