"""Ridge regression from sums, held against the same regression from the data."""

import math

import pytest
import torch

from hf_compress.numerics.ridge import LeastSquares, solve_ridge
from tests.helpers.regression import data, ridge, statistics


def least_squares(*given):
    return ridge(*given)[0]


def system(x, y):
    """Gram matrix and cross products."""
    return x.T @ x, x.T @ y


@pytest.mark.parametrize("penalty", [0.0, 1e-3, 1.0, 100.0])
@pytest.mark.parametrize("with_prior", [False, True])
def test_matches_the_augmented_least_squares(penalty, with_prior):
    x, y = data()
    prior = torch.full((5, 3), 0.7, dtype=torch.float64) if with_prior else None
    solution = solve_ridge(*system(x, y), penalty, prior)
    assert solution.dtype == torch.float64
    torch.testing.assert_close(solution, least_squares(x, y, penalty, prior))


def test_is_the_minimum_of_the_stated_objective():
    x, y = data()
    prior = torch.ones(5, 3, dtype=torch.float64)
    weight = solve_ridge(*system(x, y), 0.1, prior).requires_grad_()
    ridge = 0.1 * (x.T @ x).diagonal().mean()
    ((x @ weight - y).square().sum() + ridge * (weight - prior).square().sum()).backward()
    assert weight.grad is not None
    assert weight.grad.abs().max() < 1e-10
    assert weight.detach().sub(prior).abs().max() > 0.1


def test_penalty_is_free_of_units_and_rows():
    x, y = data()
    expected = solve_ridge(*system(x, y), 0.1)
    torch.testing.assert_close(solve_ridge(1e6 * x.T @ x, 1e6 * x.T @ y, 0.1), expected)
    torch.testing.assert_close(solve_ridge(1e-6 * x.T @ x, 1e-3 * x.T @ y, 0.1), 1e3 * expected)


def test_large_penalty_returns_the_prior():
    x, y = data()
    prior = torch.randn(5, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    torch.testing.assert_close(solve_ridge(*system(x, y), 1e14, prior), prior)


@pytest.mark.parametrize("scale", [1.0, 1e-4, 1e4])
def test_collinear_features_give_the_minimum_norm_solution(scale):
    x, y = data(inputs=4)
    x = scale * torch.cat([x, x[:, :2] - x[:, 2:]], dim=1)
    solution = solve_ridge(*system(x, y), 0.0)
    torch.testing.assert_close(solution, torch.linalg.pinv(x) @ y, rtol=1e-6, atol=1e-8 / scale)


def test_collinear_up_to_rounding_does_not_blow_up():
    """Whether Cholesky notices such a system is a matter of luck: over the seeds it does and does not."""
    for seed in range(20):
        x, y = data(inputs=4, seed=seed)
        x = torch.cat([x, x[:, :2] / 3 + x[:, 2:] / 7], dim=1)
        solution = solve_ridge(*system(x, y), 0.0)
        torch.testing.assert_close(solution, torch.linalg.pinv(x) @ y, rtol=1e-6, atol=1e-8)


def test_singular_system_stays_at_the_prior_where_the_data_say_nothing():
    x, y = data()
    x[:, 2] = 0.0  # a dead neuron
    prior = torch.full((5, 3), 9.0, dtype=torch.float64)
    solution = solve_ridge(*system(x, y), 0.0, prior)
    alive = [0, 1, 3, 4]
    torch.testing.assert_close(solution[2], prior[2])
    torch.testing.assert_close(solution[alive], least_squares(x[:, alive], y, 0.0))
    nothing = torch.zeros(5, 5), torch.zeros(5, 3)
    torch.testing.assert_close(solve_ridge(*nothing, 1.0, prior), prior)
    assert torch.equal(solve_ridge(*nothing, 0.0), torch.zeros(5, 3, dtype=torch.float64))


def test_features_of_very_different_scale_are_not_taken_for_singular():
    """Massive activations next to ordinary ones: eigenvalues 1e18 apart, yet every feature is its own."""
    x, y = data()
    scale = torch.tensor([1e6, 1.0, 1e-3, 1.0, 1.0], dtype=torch.float64)
    solution = solve_ridge(*system(x * scale, y), 0.0)
    torch.testing.assert_close(solution * scale[:, None], least_squares(x, y, 0.0), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_low_precision_input_is_summed_in_float64(dtype):
    x, y = (t.to(dtype) for t in data(rows=500))
    sums, exact = statistics(x, y), statistics(x.double(), y.double())
    assert sums.gram.dtype == sums.cross.dtype == sums.x_sum.dtype == sums.y_sum.dtype == torch.float64
    assert torch.equal(sums.gram, exact.gram)
    assert sums.energy == exact.energy


def test_streaming_and_merging_give_the_sums_of_the_whole():
    x, y = data()
    halves, pieces = statistics(x[:25], y[:25]) + statistics(x[25:], y[25:]), LeastSquares(5, 3)
    for part in torch.arange(60).chunk(7):
        pieces.update(x[part], y[part])
    for sums in (pieces, halves):
        torch.testing.assert_close(sums.gram, x.T @ x)
        torch.testing.assert_close(sums.cross, x.T @ y)
        torch.testing.assert_close(sums.x_sum, x.sum(dim=0))
        torch.testing.assert_close(sums.y_sum, y.sum(dim=0))
        assert sums.energy == pytest.approx(float(y.square().sum()))
        assert sums.count == 60


def test_merging_leaves_its_parts_alone():
    first, second = statistics(*data()), statistics(*data(seed=1))
    before = first.gram.clone()
    first.merge(second).update(*data(seed=2))
    assert torch.equal(first.gram, before)
    assert (first.count, second.count) == (60, 60)


def test_solve_and_error_agree_with_the_data():
    x, y = data()
    sums = statistics(x, y)
    prior = torch.ones(5, 3)
    weight = sums.solve(0.1, prior)
    torch.testing.assert_close(weight, least_squares(x, y, 0.1, prior.double()))
    assert sums.error(weight) == pytest.approx(float((x @ weight - y).square().sum(dim=1).mean()))
    bias = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)
    assert sums.error(weight, bias) == pytest.approx(float((x @ weight + bias - y).square().sum(dim=1).mean()))


def test_error_of_an_exact_fit_is_zero_and_never_negative():
    for seed in range(20):
        x, _ = data(seed=seed)
        weight = torch.randn(5, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        sums = statistics(x, x @ weight)
        assert 0.0 <= sums.error(sums.solve(0.0)) < 1e-13


def test_affine_fit_is_ridge_of_the_centred_data():
    x, y = data()
    sums = statistics(x, y)
    torch.testing.assert_close(sums.solve_affine(0.05), ridge(x, y, 0.05, affine=True))
    free_weight, free_bias = sums.solve_affine(0.0)
    assert sums.error(free_weight, free_bias) < sums.error(sums.solve(0.0)) - 0.1
    prior = torch.full((5, 3), 3.0, dtype=torch.float64)
    torch.testing.assert_close(sums.solve_affine(1e14, prior)[0], prior)


def test_affine_fit_leaves_a_constant_feature_to_the_bias():
    x, y = data()
    x[:, 1] = 0.1
    weight, bias = statistics(x, y).solve_affine(0.0)
    assert weight[1].abs().max() < 1e-12
    with_ones = torch.cat([x[:, [0, 2, 3, 4]], torch.ones(60, 1, dtype=torch.float64)], dim=1)
    expected = least_squares(with_ones, y, 0.0)
    torch.testing.assert_close(torch.cat([weight[[0, 2, 3, 4]], bias[None]]), expected)


def test_affine_fit_of_constants_only():
    weight, bias = statistics(torch.full((7, 2), 0.1), torch.full((7, 1), 0.3)).solve_affine(1e-3)
    assert torch.equal(weight, torch.zeros(2, 1, dtype=torch.float64))
    assert float(bias) == pytest.approx(0.3)


def test_no_rows_may_be_added_but_not_solved():
    sums = LeastSquares(5, 3)
    sums.update(torch.zeros(0, 5), torch.zeros(0, 3))
    for call in (lambda: sums.solve(0.1), lambda: sums.solve_affine(0.1), lambda: sums.error(torch.zeros(5, 3))):
        with pytest.raises(ValueError, match="no rows were seen"):
            call()


def test_refused_rows_add_nothing():
    sums = LeastSquares(5, 3)
    x, y = data()
    y[4, 1] = float("nan")
    with pytest.raises(ValueError, match="y has NaN or infinite entries"):
        sums.update(x, y)
    with pytest.raises(ValueError, match=r"x has shape \[60, 5\] and y \[59, 3\]; expected \[T, 5\] and \[T, 3\]"):
        sums.update(x, y[:59])
    assert sums.count == 0
    assert not sums.gram.any()


GRAM, CROSS = system(*data())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        *(((GRAM, CROSS, p), f"penalty is {p}; expected a finite number >= 0") for p in (-1e-3, math.nan, math.inf)),
        ((CROSS, CROSS, 0.1), r"gram has shape \[5, 3\] and cross \[5, 3\]"),
        ((GRAM, CROSS[:4], 0.1), r"gram has shape \[5, 5\] and cross \[4, 3\]"),
        ((GRAM, CROSS, 0.1, CROSS.T), r"prior has shape \[3, 5\]; expected that of cross, \[5, 3\]"),
        ((GRAM.triu(), CROSS, 0.1), "gram is not symmetric"),
        ((GRAM / 0.0, CROSS, 0.1), "gram has NaN or infinite entries"),
    ],
)
def test_refuses_bad_systems(given, message):
    with pytest.raises(ValueError, match=message):
        solve_ridge(*given)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s: LeastSquares(0, 3), "inputs is 0 and outputs is 3"),
        (lambda s: s.merge(LeastSquares(5, 2)), "cannot merge statistics of 5 -> 3 features with 5 -> 2"),
        (
            lambda s: s.error(torch.zeros(3, 5)),
            r"weight has shape \[3, 5\] and bias \[3\]; expected \[5, 3\] and \[3\]",
        ),
        (lambda s: s.error(torch.full((5, 3), math.nan)), "the squared error is nan"),
        (lambda s: s + 1, "unsupported operand"),
    ],
)
def test_refuses_bad_statistics(call, message):
    with pytest.raises((ValueError, TypeError), match=message):
        call(statistics(*data()))
