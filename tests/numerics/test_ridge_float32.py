"""Sums and solutions in float32, about an origin or not, held against the same in float64."""

import pytest
import torch
from torch import Tensor

from hf_compress.numerics.moments import Moments
from hf_compress.numerics.ridge import LeastSquares, Ridge

INPUTS, OUTPUTS = 48, 7
PENALTIES = (1e-4, 1e-2, 1.0)  # the smallest is the smallest that methods try
ROWS = (
    "plain",
    "collinear",
    "dead",
    "few rows",
    "one direction",
    "massive",
    "massive and collinear",
    "tiny",
    "huge",
)


def data(kind: str = "plain", count: int = 600, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Rows as float32 can hold them, and what depends on them but for noise."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(20 if kind == "few rows" else count, INPUTS, generator=generator)
    if kind in ("collinear", "massive and collinear"):
        x[:, 24:] = x[:, :24] / 3 + x[:, 1:25] / 7
    if kind == "dead":
        x[:, ::3] = 0
    if kind == "one direction":
        x = 0.01 * x + 3 * torch.randn(len(x), 1, generator=generator)
    if kind.startswith("massive"):
        x[:, [0, 1, 24, 25]] *= 1000
    x = x * {"tiny": 1e-6, "huge": 1e6}.get(kind, 1.0)
    weight = torch.randn(INPUTS, OUTPUTS, generator=torch.Generator().manual_seed(9))
    return x, x @ weight + 0.3 * x.std() * torch.randn(len(x), OUTPUTS, generator=generator)


def sums_of(x: Tensor, y: Tensor, dtype: torch.dtype, origin: bool = False, pieces: int = 3) -> LeastSquares:
    sums = LeastSquares(INPUTS, OUTPUTS, dtype=dtype, origin=(x[:50].mean(0), y[:50].mean(0)) if origin else None)
    for part in zip(x.chunk(pieces), y.chunk(pieces), strict=True):
        sums.update(*part)
    return sums


def objective(sums: LeastSquares, weight: Tensor, bias: Tensor | None, penalty: float, prior: Tensor) -> float:
    """What is minimised, from float64 sums, for each row."""
    point = torch.zeros_like(sums.origin) if bias is None else sums.mean
    ridge = penalty * float(sums.squares_about(point).mean()) / sums.count
    return sums.error(weight.double(), bias) + ridge * float((weight.double() - prior).square().sum())


@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("affine", [False, True])
def test_the_objective_is_as_low_as_in_float64(kind: str, penalty: float, affine: bool) -> None:
    """To a small part of the energy: how far apart the weights are says less, where the data do not speak of them."""
    x, y = data(kind)
    exact, single = sums_of(x, y, torch.float64), sums_of(x, y, torch.float32, origin=affine)
    prior = torch.full((INPUTS, OUTPUTS), 0.3, dtype=torch.float64)
    found = []
    for sums in (exact, single):
        weight, bias = sums.solve_affine(penalty, prior) if affine else (sums.solve(penalty, prior), None)
        assert weight.dtype == sums.dtype
        found.append(objective(exact, weight, bias, penalty, prior))
    assert found[0] <= found[1] * (1 + 1e-9)
    assert found[1] - found[0] < 1e-5 * exact.energy / exact.count
    if kind not in ("massive", "massive and collinear"):  # there most of the energy is that of few features
        assert found[1] == pytest.approx(found[0], rel=1e-3)


@pytest.mark.parametrize("parts", [[INPUTS], [8, 40]])
def test_parts_of_very_different_scale_share_a_penalty(parts: list[int]) -> None:
    x, y = data()
    x[:, :8] *= 1e4
    exact, single = sums_of(x, y, torch.float64), sums_of(x, y, torch.float32)
    scale = x.double().square().mean(0).sqrt()[:, None]
    torch.testing.assert_close(
        single.solve(0.1, parts=parts).double() * scale, exact.solve(0.1, parts=parts) * scale, rtol=1e-3, atol=1e-3
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_rows_of_any_dtype_are_summed_in_float32(dtype: torch.dtype) -> None:
    x, y = (part.to(dtype) for part in data())
    single, exact = sums_of(x, y, torch.float32), sums_of(x.double(), y.double(), torch.float64)
    assert {single.gram.dtype, single.cross.dtype} == {torch.float32}
    assert {single.x_sum.dtype, single.y_sum.dtype} == {torch.float64}
    norms = exact.gram.diagonal().sqrt()
    assert ((single.gram - exact.gram) / norms[:, None] / norms).abs().max() < 1e-6
    torch.testing.assert_close(single.cross.double(), exact.cross, rtol=1e-5, atol=1e-3)
    assert single.energy == pytest.approx(exact.energy, rel=1e-6)


def test_covariances_of_rows_far_from_zero_need_an_origin() -> None:
    x, y = data()
    x, y = x + 300 * torch.arange(INPUTS), y + 5000
    exact = sums_of(x.double(), y.double(), torch.float64)
    near, far = (sums_of(x, y, torch.float32, origin=origin) for origin in (True, False))
    scale = exact.covariance.diagonal().mean()
    assert (near.covariance - exact.covariance).abs().max() < 1e-4 * scale
    assert (far.covariance - exact.covariance).abs().max() > 1e-2 * scale
    torch.testing.assert_close(near.variances, exact.variances, rtol=1e-4, atol=0)
    torch.testing.assert_close(near.mean, exact.mean)
    weight, bias = near.solve_affine(1e-4)
    expected = exact.solve_affine(1e-4)
    torch.testing.assert_close(weight.double(), expected[0], rtol=1e-3, atol=1e-3)
    assert exact.error(weight, bias) == pytest.approx(exact.error(*expected), rel=1e-3)
    assert near.error(weight, bias) == pytest.approx(exact.error(*expected), rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_origin_changes_no_sum(dtype: torch.dtype) -> None:
    x, y = data()
    x, y = x + 2, y - 3
    plain, moved = (sums_of(x, y, dtype, origin) for origin in (False, True))
    assert not torch.equal(plain._gram, moved._gram)
    tolerance = {"rtol": 1e-4, "atol": 1e-2} if dtype == torch.float32 else {"rtol": 1e-10, "atol": 1e-8}
    features = torch.tensor([5, 0, 40])
    mix = torch.randn(OUTPUTS, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    pairs = [
        (plain, moved),
        (plain.take(features), moved.take(features)),
        (plain.mix(mix), moved.mix(mix)),
        (plain.merge(plain), plain.merge(moved)),
        (plain.merge(plain), moved.merge(plain)),
    ]
    for one, other in pairs:
        for name in ("gram", "centred_gram", "cross", "x_sum", "y_sum", "mean", "y_mean", "variances"):
            torch.testing.assert_close(getattr(one, name), getattr(other, name), **tolerance)
        torch.testing.assert_close(one.solve(0.1), other.solve(0.1), rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(one.solve_affine(0.1), other.solve_affine(0.1), rtol=1e-3, atol=1e-3)
    assert plain.energy == pytest.approx(moved.energy, rel=1e-5)
    weight = plain.solve(0.1)
    assert plain.error(weight) == pytest.approx(moved.error(weight), rel=1e-4)


def test_a_mix_of_outputs_is_regressed_like_them() -> None:
    """Its errors are right up to a constant."""
    x, y = data()
    mix = torch.randn(OUTPUTS, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    prior = torch.ones(INPUTS, OUTPUTS, dtype=torch.float64)
    for affine in (False, True):
        sums = sums_of(x.double(), y.double(), torch.float64, origin=affine)
        mixed, expected = sums.mix(mix), LeastSquares(INPUTS, 2)
        expected.update(x, y.double() @ mix)
        solved = []
        for penalty in (1e-3, 1.0):
            ridge = Ridge(sums, affine)
            weight, bias = ridge.solution(ridge.solver(penalty), mixed, prior @ mix)
            own_ridge = Ridge(expected, affine)
            own = own_ridge.solution(own_ridge.solver(penalty), expected, prior @ mix)
            torch.testing.assert_close(weight, own[0])
            solved.append(mixed.excess(weight, bias) - expected.count * expected.error(*own))
        assert solved[0] == pytest.approx(solved[1])


def test_constant_features_get_no_weight_where_there_is_a_bias() -> None:
    x, y = data()
    x[:, 3], x[:, 30] = 0.1, 1000.7
    weight, bias = sums_of(x, y, torch.float32, origin=True).solve_affine(0.0)
    assert not weight[[3, 30]].any()
    assert bool(torch.isfinite(bias).all())


def test_no_penalty_and_too_few_rows_stay_finite_and_near_the_prior() -> None:
    x, y = data("few rows")
    prior = torch.full((INPUTS, OUTPUTS), 2.0)
    weight = sums_of(x, y, torch.float32).solve(0.0, prior)
    nearest = sums_of(x, y, torch.float64).solve(0.0, prior)
    assert (weight - nearest).norm() < 0.25 * nearest.norm()
    exact = sums_of(x, y, torch.float64)
    assert exact.error(weight) < 1e-4 * exact.energy / exact.count


def test_refuses_sums_that_overflow() -> None:
    x, y = data()
    sums = sums_of(1e20 * x, y, torch.float32)
    with pytest.raises(ValueError, match=r"so large that sums of its squares overflow torch.float32"):
        sums.solve(0.1)


def test_memory_is_half() -> None:
    for dtype, size in ((torch.float32, 4), (torch.float64, 8)):
        assert Moments(INPUTS, dtype=dtype).gram.nbytes == size * INPUTS**2
