"""Rows of a regression say what their sums do, in the memory of the rows."""

from itertools import chain

import pytest
import torch

from hf_compress.calibration.held_out import is_held_out
from hf_compress.methods.base import ridge
from hf_compress.methods.base.ridge import HeldOutSums
from hf_compress.numerics import moments
from hf_compress.numerics.regression_rows import RegressionRows
from hf_compress.numerics.ridge import LeastSquares
from tests.helpers.allocated import most_allocated
from tests.helpers.threads import Exchanges

INPUTS, OUTPUTS = 12, 5


def rows_of(count: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x far from 0, y that hangs on it, and how much each row counts, 0 now and then."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, INPUTS, generator=generator) + 3
    y = x @ torch.randn(INPUTS, OUTPUTS, generator=torch.Generator().manual_seed(9)) - 2
    y += torch.randn(count, OUTPUTS, generator=generator)
    return x, y, torch.randint(0, 4, (count,), generator=generator) / 2


def both(dtype: torch.dtype, origin: bool, weighted: bool) -> tuple[RegressionRows, LeastSquares]:
    """The rows and the sums of 90 rows, in parts, one of them empty."""
    x, y, weights = rows_of(90)
    sums = HeldOutSums.like(x[:20].to(dtype), y[:20], affine=origin).fitted
    rows = RegressionRows.like(sums)
    for part in (slice(0, 50), slice(50, 50), slice(50, 90)):
        for one in (rows, sums):
            one.update(x[part].to(dtype), y[part], weights[part] if weighted else None)
    return rows, sums


@pytest.fixture(params=[False, True], ids=["at once", "a few rows at a time"])
def _rows_at_once(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param:
        monkeypatch.setattr(moments, "_ROWS", 7)
        monkeypatch.setattr(moments, "_SUMMED", 3)


@pytest.mark.usefixtures("_rows_at_once")
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("origin", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_rows_say_what_their_sums_say(dtype: torch.dtype, origin: bool, weighted: bool) -> None:
    rows, sums = both(dtype, origin, weighted)
    close = {"rtol": 1e-10, "atol": 1e-9} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-2}
    point, y_point = torch.full((INPUTS,), 2.5, dtype=torch.float64), torch.full((OUTPUTS,), -1.0, dtype=torch.float64)
    weight, bias = torch.full((INPUTS, OUTPUTS), 0.3), torch.full((OUTPUTS,), 0.7)
    features, mix = torch.tensor([7, 0, 3]), torch.randn(OUTPUTS, 2, generator=torch.Generator().manual_seed(1))
    cases = [
        (rows, sums, weight, bias, point, y_point),
        (rows.take(features), sums.take(features), weight[:3], bias, point[:3], y_point),
        (rows.of_outputs(slice(1, 3)), sums.of_outputs(slice(1, 3)), weight[:, :2], bias[:2], point, y_point[:2]),
        (rows.mix(mix), sums.mix(mix), weight[:, :2], bias[:2], point, y_point[:2]),
    ]
    for number, (some, expected, b, c, at, y_at) in enumerate(cases):
        assert some.count == expected.count
        for name in ("x_sum", "y_sum", "y_mean"):
            torch.testing.assert_close(getattr(some, name), getattr(expected, name), **close)
        torch.testing.assert_close(some.cross_about(at, y_at), expected.cross_about(at, y_at), **close)
        onto = torch.eye(some.inputs, dtype=expected.dtype)
        torch.testing.assert_close(some.gram_about(at, onto.clone()), expected.gram_about(at, onto.clone()), **close)
        # Of sums for other outputs errors are known but for a constant.
        same = some.excess(b, c) - some.excess(2 * b), expected.excess(b, c) - expected.excess(2 * b)
        assert same[0] == pytest.approx(same[1], rel=1e-4, abs=1e-2)
        if number < 2:
            assert some.error(b, c) == pytest.approx(expected.error(b, c), rel=1e-4)
            assert some.energy == pytest.approx(expected.energy, rel=1e-5)
            assert some.energy_about(y_at) == pytest.approx(expected.energy_about(y_at), rel=1e-5)
    torch.testing.assert_close(rows.summed().gram, sums.gram)
    torch.testing.assert_close(rows.summed().cross, sums.cross)


def test_the_error_is_right_where_inputs_are_far_from_their_spread() -> None:
    """About the origin: x B and the bias are a thousand times what is left of their difference."""
    x, y, _ = rows_of(90)
    x, y = x + 1000, y.double()
    sums = HeldOutSums.like(x, y.float(), affine=True).fitted
    rows = RegressionRows.like(sums)
    rows.update(x, y)
    weight = torch.linalg.lstsq((x - x.mean(0)).double(), y - y.mean(0)).solution.float()
    bias = y.mean(0) - x.double().mean(0) @ weight.double()
    left = (x.double() @ weight.double() + bias - y).square().sum(dim=1).mean()
    assert rows.error(weight, bias) == pytest.approx(float(left), rel=1e-4)


def test_refuses_what_sums_refuse() -> None:
    rows = RegressionRows.like(LeastSquares(INPUTS, OUTPUTS, dtype=torch.float32))
    x, y, weights = rows_of(6)
    with pytest.raises(ValueError, match="no rows were seen"):
        rows.excess(torch.zeros(INPUTS, OUTPUTS))
    with pytest.raises(ValueError, match=r"x has shape \[6, 12\] and y \[5, 5\]"):
        rows.update(x, y[:5])
    with pytest.raises(ValueError, match="x has NaN"):
        rows.update(x * torch.nan, y)
    with pytest.raises(ValueError, match="a number >= 0"):
        rows.update(x, y, weights - 5)
    assert not rows.parts
    rows.update(x, y)
    with pytest.raises(ValueError, match="squared error is nan"):
        rows.excess(torch.full((INPUTS, OUTPUTS), torch.nan))


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("count", [24, 400])  # held out of each: rows, and sums in their place
def test_a_fit_by_rows_is_that_by_sums(count: int, affine: bool, weighted: bool) -> None:
    x, y, weights = rows_of(count)
    sums = HeldOutSums.like(x, y, affine)
    plain = HeldOutSums(sums.fitted.merge(sums.held), sums.fitted.merge(sums.held))  # both of them sums
    for number in range(8):
        part = slice(number * count // 8, (number + 1) * count // 8)
        for one in (sums, plain):
            one.update(x[part], y[part], weights[part] if weighted else None, held=is_held_out(number))
    assert isinstance(sums.held, RegressionRows if count == 24 else LeastSquares)
    assert sums.energy == pytest.approx(plain.energy)
    torch.testing.assert_close(sums.all.gram, plain.all.gram)
    prior = torch.full((INPUTS, OUTPUTS), 0.2)
    found, expected = sums.fit(prior, affine), plain.fit(prior, affine)
    assert found.penalty == expected.penalty
    assert found.error == pytest.approx(expected.error, rel=1e-4)
    torch.testing.assert_close(found.weight, expected.weight, rtol=1e-4, atol=1e-4)
    assert (found.bias is None) == (expected.bias is None) == (not affine)
    if found.bias is not None:
        torch.testing.assert_close(found.bias, expected.bias, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(
    ("held", "rows"), [((1, 1, 1), True), ((9, 1, 1), False), ((0, 0, 0), True), ((4, 5, 0), False), ((0, 3, 0), True)]
)
def test_processes_agree_whether_they_keep_rows(
    held: tuple[int, ...], rows: bool, weighted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One alone may have all that are held out, and has sums of them by then; or all have a few, too many together."""

    def fill(sums: HeldOutSums, rank: int) -> None:
        x, y, weights = rows_of(40, seed=rank)
        sums.update(x, y, held=False)
        for start in range(held[rank]):
            part = slice(start, start + 4)
            sums.update(x[part], y[part], weights[part] if weighted else None, held=True)

    def process(rank: int) -> list[HeldOutSums]:
        pair = [HeldOutSums.empty(INPUTS, OUTPUTS, dtype=torch.float32) for _ in range(2)]
        for one in pair:
            fill(one, rank)
        HeldOutSums.reduce_all(pair)
        return pair

    whole = HeldOutSums.empty(INPUTS, OUTPUTS, dtype=torch.float64)
    for rank in range(len(held)):
        fill(whole, rank)
    for one in chain.from_iterable(Exchanges(len(held), ridge, monkeypatch).run(process)):
        assert isinstance(one.held, RegressionRows if rows else LeastSquares)
        for found, expected in ((one.fitted, whole.fitted), (one.held, whole.held)):
            assert found.count == pytest.approx(expected.count)
            assert found.energy == pytest.approx(expected.energy, rel=1e-5)
        torch.testing.assert_close(one.all.gram.double(), whole.all.gram, rtol=1e-4, atol=1e-2)


def test_a_wide_fit_holds_the_sums_and_one_factor() -> None:
    """Beside them: a few matrices (inputs, outputs), and products a few columns at a time."""
    wide, tokens, outputs = 2048, 3072, 64
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(tokens, size, generator=generator).bfloat16() for size in (wide, outputs))

    def fitted() -> None:
        sums = HeldOutSums.empty(wide, outputs, dtype=torch.float32)
        for number in range(12):
            part = slice(number * tokens // 12, (number + 1) * tokens // 12)
            sums.update(x[part].clone(), y[part], held=is_held_out(number))
        sums.fit()

    gram, rows = 4 * wide**2, tokens // 4 * (2 * wide + 4 * outputs)
    assert most_allocated(fitted) < 2 * gram + rows + 5 * 4 * wide * (outputs + 64) + 4 * wide * 512
