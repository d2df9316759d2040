"""Backward elimination from sums, held against refitting without each feature in turn."""

import numpy as np
import pytest
import torch

from hf_compress.methods.base.ridge import HeldOutSums, for_own_outputs
from hf_compress.numerics import cholesky, elimination
from hf_compress.numerics.elimination import eliminate
from hf_compress.numerics.ridge import LeastSquares
from tests.helpers.regression import statistics
from tests.helpers.team import in_team


def data(rows=80, inputs=9, outputs=4, seed=0):
    """Correlated features with means, of which none explains y alone."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, inputs, generator=generator, dtype=torch.float64)
    x = x @ torch.randn(inputs, inputs, generator=generator, dtype=torch.float64) + 1.5
    weight = torch.randn(inputs, outputs, generator=generator, dtype=torch.float64)
    return x, x @ weight + 2.0 + 0.3 * torch.randn(rows, outputs, generator=generator, dtype=torch.float64)


def left_over(x, y, features, affine):
    """The squared error of least squares on some features."""
    columns = x[:, features].numpy()
    if affine:
        columns = np.concatenate([columns, np.ones((len(x), 1))], axis=1)
    solution = np.linalg.lstsq(columns, y.numpy(), rcond=None)[0]
    return float(np.square(columns @ solution - y.numpy()).sum())


def greedy(x, y, count, affine, at_once=1):
    """Refit without each feature that is left, and leave out the one, or the few, that are missed least."""
    left = list(range(x.shape[1]))
    while len(left) > count:
        errors = {j: left_over(x, y, [i for i in left if i != j], affine) for j in left}
        gone = sorted(left, key=errors.__getitem__)[: min(at_once, len(left) - count)]
        left = [i for i in left if i not in gone]
    return left


@pytest.fixture
def _hardly_any_ridge(monkeypatch):
    """So that refits by plain least squares are an oracle."""
    monkeypatch.setattr(elimination, "_PENALTY", 1e-10)


@pytest.mark.usefixtures("_hardly_any_ridge")
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("seed", range(4))
def test_is_refitting_without_each_feature_in_turn(affine, seed):
    x, y = data(seed=seed)
    for count in range(1, 10):
        kept = eliminate(statistics(x, y), count, affine)
        assert kept.dtype == torch.int64
        assert kept.tolist() == greedy(x, y, count, affine)


@pytest.mark.usefixtures("_hardly_any_ridge")
def test_a_bias_makes_a_difference():
    """Or the two halves of the test above would be one."""
    differing = 0
    for seed in range(4):
        sums = statistics(*data(seed=seed))
        both = [(eliminate(sums, count), eliminate(sums, count, False)) for count in range(1, 9)]
        differing += sum(not torch.equal(*kept) for kept in both)
    assert differing > 3


@pytest.mark.usefixtures("_hardly_any_ridge")
@pytest.mark.parametrize("affine", [True, False])
def test_what_the_rest_can_stand_in_for_is_not_what_is_small(affine):
    """A feature that matters much goes, since two others add up to it; one that matters little stays."""
    x, _ = data(inputs=5)
    x = torch.cat([x, x[:, :1] + x[:, 1:2]], dim=1)
    weight = torch.tensor([0.1, 0.1, 0.1, 0.1, 0.1, 50.0], dtype=torch.float64)
    y = x @ torch.stack([weight, weight.flip(0)], dim=1)
    kept = eliminate(statistics(x, y), 5, affine).tolist()
    assert {2, 3, 4} <= set(kept)
    assert left_over(x, y, kept, affine) < 1e-6


@pytest.mark.usefixtures("_hardly_any_ridge")
@pytest.mark.parametrize(("rounds", "at_once"), [(1, 8), (2, 4), (3, 3), (100, 1)])
def test_several_at_once_where_many_go(rounds, at_once, monkeypatch):
    """One by one among the cheapest few of a round; in the last round no more than there are to go."""
    monkeypatch.setattr(elimination, "_ROUNDS", rounds)
    x, y = data(inputs=12)
    assert eliminate(statistics(x, y), 4).tolist() == greedy(x, y, 4, affine=True, at_once=1)  # of nearly all of them
    monkeypatch.setattr(elimination, "_CANDIDATES", 1)
    assert eliminate(statistics(x, y), 4).tolist() == greedy(x, y, 4, affine=True, at_once=at_once)


@pytest.mark.parametrize("rounds", [1, 2, 5, 7])
def test_the_number_kept_is_exact_whatever_goes_at_once(rounds, monkeypatch):
    monkeypatch.setattr(elimination, "_ROUNDS", rounds)
    sums = statistics(*data(inputs=12))
    for count in range(1, 13):
        kept = eliminate(sums, count).tolist()
        assert len(kept) == count
        assert kept == sorted(set(kept))


@pytest.mark.usefixtures("_hardly_any_ridge")
@pytest.mark.parametrize("most", [1, 2, 5])
def test_no_more_at_once_than_is_worth_it(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(elimination, "_ROUNDS", 1)
    monkeypatch.setattr(elimination, "_CANDIDATES", 1)
    monkeypatch.setattr(elimination, "_AT_ONCE", most)
    x, y = data(inputs=12)
    assert eliminate(statistics(x, y), 4).tolist() == greedy(x, y, 4, affine=True, at_once=most)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("size", [1, 4])
def test_sixteen_rounds_choose_as_one_after_another(affine: bool, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32 too, and from sums in two halves: or at least what is left explains as much."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(900, 30, generator=generator) @ torch.randn(30, 200, generator=generator)
    x = (x + 3 * torch.randn(900, 200, generator=generator)).clamp(min=0)
    y = x @ torch.randn(200, 20, generator=generator)
    exact, halves = statistics(x, y), HeldOutSums.like(x[:600], y[:600], affine)
    halves.update(x[:600], y[:600], held=False)
    halves.update(x[600:], y[600:], held=True)
    assert halves.fitted.dtype == torch.float32
    for share in (0.9, 0.75, 0.5, 0.2):
        count = int(share * 200 / size)
        quick = eliminate(halves, count, affine, size)
        with monkeypatch.context() as patch:
            patch.setattr(elimination, "_ROUNDS", 200)
            slow = eliminate(exact, count, affine, size)
        errors = []
        for kept in (quick, slow):
            features = elimination.entries(kept, size)
            errors.append(left_over(x.double(), y.double(), features.tolist(), affine))
        assert errors[0] == pytest.approx(errors[1], rel=5e-3)
        assert len(set(quick.tolist()) ^ set(slow.tolist())) <= 0.05 * count


@pytest.mark.parametrize("held", [30, 80])  # fewer rows and more than are kept as rows
@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("world", [2, 3])
def test_several_choose_what_one_chooses(world: int, size: int, held: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each has what is to be explained in part, and factorises in part."""
    monkeypatch.setattr(cholesky, "_ROWS", 8)
    x, y = data(rows=200, inputs=60, outputs=7)
    sums = HeldOutSums.like(x, y, True)
    sums.update(x[held:], y[held:], held=False)
    sums.update(x[:held], y[:held], held=True)
    for count in (15, 9):
        expected = eliminate(sums, count, size=size)
        found = in_team(
            world,
            lambda together, count=count: eliminate(
                for_own_outputs(sums, together), count, size=size, together=together
            ),
        )
        assert all(torch.equal(one, expected) for one in found)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("scale", [1.0, 3.0, -0.5])
def test_copies_go_first(affine, scale):
    """With the ridge as it is: one of each pair goes, whichever, and nothing else."""
    x, _ = data(inputs=5)
    x = torch.cat([x, scale * x[:, :3]], dim=1)
    weight = torch.randn(8, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    kept = eliminate(statistics(x, x @ weight), 5, affine).tolist()
    assert sorted(unit % 5 for unit in kept) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("rounds", [128, 5, 3])
def test_copies_of_what_matters_most_do_not_both_go_in_one_round(rounds, monkeypatch):
    """Each can be done without as long as the other is there."""
    monkeypatch.setattr(elimination, "_ROUNDS", rounds)
    x, _ = data(inputs=20, rows=400)
    x[:, 10] = x[:, 0]
    weight = torch.randn(20, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    weight[[0, 10]] *= 10
    kept = eliminate(statistics(x, x @ weight), 10).tolist()
    assert len({0, 10} & set(kept)) == 1


def test_features_that_never_vary_go_first_where_there_is_a_bias():
    x, y = data()
    x[:, 2], x[:, 6] = 7.0, 0.1
    y = y + 100 * x[:, [2]]
    assert eliminate(statistics(x, y), 7).tolist() == [0, 1, 3, 4, 5, 7, 8]


def test_a_constant_feature_stays_where_there_is_no_bias():
    """It stands in for one; only what is always 0 says nothing."""
    x, y = data()
    x[:, 2], x[:, 6] = 7.0, 0.0
    y = y + 100
    kept = eliminate(statistics(x, y), 3, affine=False).tolist()
    assert 2 in kept
    assert eliminate(statistics(x, y), 8, affine=False).tolist() == [0, 1, 2, 3, 4, 5, 7, 8]
    assert 2 not in eliminate(statistics(x, y), 3, affine=True).tolist()


def test_what_y_does_not_depend_on_goes_first():
    x, _ = data()
    y = x[:, [1, 4, 5]] @ torch.randn(3, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert eliminate(statistics(x, y), 3).tolist() == [1, 4, 5]


def test_all_features_and_sums_left_alone():
    sums = statistics(*data())
    before = sums.gram.clone(), sums.cross.clone(), sums.x_sum.clone()
    assert eliminate(sums, 9).tolist() == list(range(9))
    eliminate(sums, 3)
    assert all(torch.equal(a, b) for a, b in zip(before, (sums.gram, sums.cross, sums.x_sum), strict=True))


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("x", [torch.full((30, 6), 0.0), torch.full((30, 6), 0.1), data(1)[0], data(3)[0]], ids=len)
def test_dead_units_or_fewer_rows_than_features(affine, x):
    """Any will do, but as many as were asked for."""
    kept = eliminate(statistics(x, data(rows=len(x))[1]), 4, affine).tolist()
    assert len(set(kept)) == 4


def test_the_scale_of_the_data_does_not_matter():
    x, y = data()
    expected = eliminate(statistics(x, y), 4)
    for scale in (1e-6, 1e6):
        assert torch.equal(eliminate(statistics(scale * x, y), 4), expected)
        assert torch.equal(eliminate(statistics(x, scale * y), 4), expected)


def test_refuses_a_count_that_does_not_fit_and_no_rows():
    sums = statistics(*data())
    for count in (0, -1, 10):
        with pytest.raises(ValueError, match=f"count is {count}; expected 1 to the number of features, 9"):
            eliminate(sums, count)
    with pytest.raises(ValueError, match="no rows were seen"):
        eliminate(LeastSquares(9, 4), 3)
