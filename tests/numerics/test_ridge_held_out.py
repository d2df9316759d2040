"""What ILLC asks of ridge regression, against the same from the data: weights, features taken, a penalty chosen."""

from functools import partial

import pytest
import torch

from hf_compress.calibration.held_out import is_held_out
from hf_compress.methods.base import ridge as ridge_module
from hf_compress.methods.base.ridge import HeldOutSums, downhill, lowest
from hf_compress.numerics.ridge import LeastSquares
from tests.helpers import regression
from tests.helpers.regression import ridge, statistics

FIELDS = ("gram", "cross", "x_sum", "y_sum")
PENALTIES = (1e-6, 1e-2, 1.0, 100.0)
data = partial(regression.data, noise=2.0)


def assert_same(first, second):
    for name in FIELDS:
        torch.testing.assert_close(getattr(first, name), getattr(second, name))
    assert first.energy == pytest.approx(second.energy)
    assert first.count == pytest.approx(second.count)


def copy_of(sums):
    return sums.merge(LeastSquares(sums.inputs, sums.outputs))


def test_a_weight_is_a_row_that_many_times():
    x, y = data()
    times = torch.arange(60) % 4  # some of them 0: as if not there
    repeated = statistics(x.repeat_interleave(times, 0), y.repeat_interleave(times, 0))
    for weights in (times, times.float(), times.double()):
        weighted = statistics(x, y, weights)
        assert_same(weighted, repeated)
        torch.testing.assert_close(weighted.solve_affine(0.1), repeated.solve_affine(0.1))
        torch.testing.assert_close(weighted.solve(0.1), repeated.solve(0.1))
    assert repeated.error(repeated.solve(0.1)) == pytest.approx(weighted.error(weighted.solve(0.1)))
    assert weighted.solve(0.1).sub(statistics(x, y).solve(0.1)).abs().max() > 1e-3


def test_fractions_count_too():
    """The common factor of all weights changes nothing but the count."""
    x, y = data()
    weights = torch.rand(60, generator=torch.Generator().manual_seed(1))
    sums, tenth = statistics(x, y, weights), statistics(x, y, weights / 10)
    assert sums.count == pytest.approx(float(weights.sum()))
    assert tenth.count == pytest.approx(sums.count / 10)
    torch.testing.assert_close(tenth.solve_affine(0.1), sums.solve_affine(0.1))
    assert tenth.error(tenth.solve(0.1)) == pytest.approx(sums.error(sums.solve(0.1)))


def test_weighted_rows_come_in_pieces():
    x, y = data()
    weights = torch.rand(60, generator=torch.Generator().manual_seed(1))
    sums = LeastSquares(5, 3)
    for piece in torch.arange(60).split(13):
        sums.update(x[piece], y[piece], weights[piece])
    sums.update(x[:0], y[:0], weights[:0])
    assert_same(sums, statistics(x, y, weights))
    assert_same(statistics(x, y, torch.ones(60)), statistics(x, y))


def test_rows_that_all_count_nothing_are_no_rows():
    x, y = data()
    sums = statistics(x, y, torch.zeros(60))
    assert sums.count == 0
    with pytest.raises(ValueError, match="no rows were seen"):
        sums.solve_affine(0.1)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (torch.full((60,), -1.0), "expected a number >= 0 for each of 60 rows"),
        (torch.ones(59), r"weights has shape \[59\]; expected a number >= 0 for each of 60 rows"),
        (torch.full((60,), float("nan")), "weights has NaN or infinite entries"),
        (torch.full((60,), float("inf")), "weights has NaN or infinite entries"),
        (torch.ones(60, 1), r"weights has shape"),
        (torch.ones(()), r"weights has shape"),
    ],
    ids=["negative", "too few", "nan", "infinite", "a column", "a number"],
)
def test_refused_weights_add_nothing(weights, message):
    sums = LeastSquares(5, 3)
    with pytest.raises(ValueError, match=message):
        sums.update(*data(), weights)
    assert sums.count == 0
    assert not any(getattr(sums, name).any() for name in FIELDS)


@pytest.mark.parametrize("features", [[3], [4, 0, 2], [0, 1, 2, 3, 4]])
def test_taking_features_is_having_seen_no_others(features):
    x, y = data()
    weights = torch.rand(60, generator=torch.Generator().manual_seed(1))
    some = statistics(x, y, weights).take(torch.tensor(features))
    assert_same(some, statistics(x[:, features], y, weights))
    assert (some.inputs, some.outputs) == (len(features), 3)
    torch.testing.assert_close(some.solve_affine(0.1), statistics(x[:, features], y, weights).solve_affine(0.1))


def test_taking_leaves_the_whole_alone():
    """Rows that are added to either of the two are not the other's."""
    x, y = data()
    for features in ([4, 0], [0, 1, 2, 3, 4]):
        whole = statistics(x, y)
        before, some = copy_of(whole), whole.take(torch.tensor(features))
        some.update(x[:, features], y)
        assert_same(whole, before)
        some = whole.take(torch.tensor(features))
        whole.update(x, y)
        assert_same(some, statistics(x[:, features], y))


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("with_prior", [False, True])
@pytest.mark.parametrize("rows", [6, 12, 300])
@pytest.mark.parametrize("narrow", [4, 5])
def test_the_penalty_is_the_best_on_rows_held_out(
    affine: bool, with_prior: bool, rows: int, narrow: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Looked for downhill, where inputs are many, or among all."""
    monkeypatch.setattr(ridge_module, "NARROW", narrow)
    (x, y), (x_held, y_held) = data(rows), data(40, seed=1)
    prior = torch.full((5, 3), 0.3, dtype=torch.float64) if with_prior else None
    errors = {}
    for penalty in PENALTIES:
        weight, bias = ridge(x, y, penalty, prior, affine)
        errors[penalty] = float((x_held @ weight + bias - y_held).square().sum(dim=1).mean())
    best = min(errors, key=errors.__getitem__)
    fit = HeldOutSums(statistics(x, y), statistics(x_held, y_held)).fit(prior, affine, PENALTIES)
    assert fit.penalty == best
    assert fit.error == pytest.approx(errors[best] / float(y_held.square().sum(dim=1).mean()))
    weight, bias = ridge(torch.cat([x, x_held]), torch.cat([y, y_held]), best, prior, affine)
    torch.testing.assert_close(fit.weight, weight, rtol=1e-6, atol=1e-8)
    assert (fit.bias is None) == (not affine)
    if fit.bias is not None:
        torch.testing.assert_close(fit.bias, bias, rtol=1e-6, atol=1e-8)


def test_the_choice_depends_on_the_rows():
    """Few and noisy rows want a large penalty, many want a small one: else the test above would tell nothing."""
    held = statistics(*data(400, seed=1))
    chosen = [HeldOutSums(statistics(*data(rows)), held).fit(penalties=PENALTIES).penalty for rows in (6, 3000)]
    assert chosen[0] > chosen[1]


def test_the_rows_that_choose_are_not_those_that_are_fitted():
    """On its own rows the smallest penalty is always the best."""
    assert HeldOutSums(few := statistics(*data(6)), few).fit(penalties=PENALTIES).penalty == PENALTIES[0]
    fit = HeldOutSums(statistics(*data(6)), statistics(*data(400, seed=1))).fit(penalties=PENALTIES)
    assert fit.penalty > PENALTIES[0]


@pytest.mark.parametrize("values", range(1, 9))
def test_the_lowest_is_found_downhill_from_the_middle(values: int) -> None:
    """Wherever it is, and no value is tried twice, nor one behind a neighbour that is higher."""
    for bottom in range(values):
        tried: list[float] = []

        def attempt(value: float, bottom: int = bottom, tried: list[float] = tried) -> tuple[float, str]:
            tried.append(value)
            return abs(value - bottom), f"of {value}"

        assert downhill(attempt, range(values)) == (bottom, f"of {bottom}")
        assert len(tried) == len(set(tried)) <= abs(bottom - values // 2) + 3


def many_outputs(rows, seed):
    """Of correlated outputs, some of them much larger than others."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 40, generator=generator)
    maps = torch.randn(40, 6, generator=torch.Generator().manual_seed(5))
    maps = maps @ torch.randn(6, 300, generator=torch.Generator().manual_seed(6))
    sizes = torch.linspace(-2, 1, 300).exp()
    return x, (x @ maps + 8 * torch.randn(rows, 300, generator=generator)) * sizes


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("rows", [30, 60, 400])
def test_mixtures_of_many_outputs_choose_as_well_as_all_of_them(affine: bool, rows: int) -> None:
    (x, y), (x_held, y_held) = many_outputs(rows, 0), many_outputs(200, 1)
    sums, prior = HeldOutSums(statistics(x, y), statistics(x_held, y_held)), torch.full((40, 300), 0.1)
    penalties = (1e-4, 1e-3, 1e-2, 0.03, 0.1, 0.3, 1.0, 3.0)
    errors = {}
    for penalty in penalties:
        weight, bias = ridge(x.double(), y.double(), penalty, prior.double(), affine)
        errors[penalty] = float((x_held.double() @ weight + bias - y_held.double()).square().sum())
    fit = sums.fit(prior, affine, penalties)
    assert errors[fit.penalty] < 1.01 * min(errors.values())
    assert max(errors.values()) > 1.1 * min(errors.values()) or rows == 400
    assert fit.error == pytest.approx(errors[fit.penalty] / float(y_held.double().square().sum()))


def test_sums_are_of_float32_unless_rows_are_float64_and_about_means_where_there_is_a_bias() -> None:
    x, y = data()
    for dtype, of_sums in ((torch.bfloat16, torch.float32), (torch.float32, torch.float32), (x.dtype, x.dtype)):
        for affine in (True, False):
            sums = HeldOutSums.like(x.to(dtype), y, affine)
            assert sums.fitted.dtype == sums.held.dtype == of_sums
            for one in (sums.fitted, sums.held):
                near = torch.allclose(one.origin, x.mean(0), rtol=1e-2, atol=1e-2)
                assert near if affine else not one.origin.any()
                assert torch.allclose(one.y_origin, y.mean(0)) if affine else not one.y_origin.any()
    assert not HeldOutSums.like(x[:0], y[:0], True).fitted.origin.any()  # of which there is no mean


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("origin", [True, False])
def test_normal_equations_are_those_of_all_batches(affine: bool, origin: bool) -> None:
    (x, y), (x_held, y_held) = data(), data(seed=1)
    sums = HeldOutSums.like(x, y, origin)
    sums.update(x, y, held=False)
    sums.update(x_held, y_held, held=True)
    every_x, every_y = torch.cat([x, x_held]), torch.cat([y, y_held])
    if affine:
        every_x, every_y = every_x - every_x.mean(0), every_y - every_y.mean(0)
    torch.testing.assert_close(sums.normal_gram(affine), every_x.T @ every_x)
    torch.testing.assert_close(sums.normal_cross(affine), every_x.T @ every_y)
    torch.testing.assert_close(sums.all.normal_gram(affine), every_x.T @ every_x)
    torch.testing.assert_close(sums.all.normal_cross(affine), every_x.T @ every_y)
    assert sums.energy == pytest.approx(float(torch.cat([y, y_held]).square().sum()) / 120)


def test_one_penalty_leaves_no_choice() -> None:
    sums = statistics(*data())
    fit = HeldOutSums(sums, statistics(*data(seed=1))).fit(penalties=[0.5])
    assert fit.penalty == 0.5


def test_sums_are_used_up() -> None:
    """What was fitted has all rows then, in its own memory, however many penalties were tried; those held out stay."""
    for penalties in ([0.5], PENALTIES):
        fitted, held = statistics(*data()), statistics(*data(seed=1))
        everything, before, memory = fitted.merge(held), copy_of(held), fitted.own_gram().data_ptr()
        sums = HeldOutSums(fitted, held)
        energy = sums.energy
        sums.fit(penalties=penalties)
        assert sums.energy == pytest.approx(energy), "none of them counts twice"
        assert_same(fitted, everything)
        assert_same(held, before)
        assert fitted.own_gram().data_ptr() == memory


def test_a_target_of_zeros_is_met():
    x = data()[0]
    fit = HeldOutSums(statistics(x, torch.zeros(60, 3)), statistics(x, torch.zeros(60, 3))).fit()
    assert fit.error == 0
    assert not fit.weight.any()


@pytest.mark.parametrize("affine", [True, False])
def test_without_rows_to_choose_by_the_penalty_is_cautious(affine):
    """Whichever of the two has none; all rows count once."""
    x, y = data()
    weight, bias = ridge(x, y, 0.1, None, affine)
    for sums in (HeldOutSums(statistics(x, y), LeastSquares(5, 3)), HeldOutSums(LeastSquares(5, 3), statistics(x, y))):
        fit = sums.fit(affine=affine)
        assert fit.penalty == 0.1
        torch.testing.assert_close(fit.weight, weight, rtol=1e-6, atol=1e-8)
        left = (x @ weight + bias - y).square().sum() / y.square().sum()
        assert fit.error == pytest.approx(float(left))


def test_batches_go_to_the_one_or_the_other():
    (x, y), sums = data(), HeldOutSums.empty(5, 3)
    for number in range(12):
        rows = slice(5 * number, 5 * number + 5)
        sums.update(x[rows], y[rows], held=is_held_out(number))
    assert (sums.fitted.count, sums.held.count, sums.all.count) == (45, 15, 60)
    assert_same(sums.all, statistics(x, y))


def test_refuses_no_rows_and_no_penalties() -> None:
    sums, none = statistics(*data()), LeastSquares(5, 3)
    with pytest.raises(ValueError, match="no rows were seen"):
        HeldOutSums(none, none).fit()
    with pytest.raises(ValueError, match="penalties is empty"):
        HeldOutSums(sums, sums).fit(penalties=[])
    with pytest.raises(ValueError, match="penalty is -1"):
        HeldOutSums(sums, sums).fit(penalties=[-1.0])


def test_where_inputs_are_few_a_second_minimum_is_not_missed() -> None:
    """Downhill from the middle ends in the nearer one."""
    heights = {1: 0.0, 2: 5.0, 3: 2.0, 4: 1.0, 5: 3.0}

    def attempt(value: float) -> tuple[float, None]:
        return heights[int(value)], None

    assert lowest(attempt, [1, 2, 3, 4, 5]) == (1, None)
    assert downhill(attempt, [1, 2, 3, 4, 5]) == (4, None)
