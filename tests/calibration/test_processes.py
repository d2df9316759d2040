"""What processes tell each other, in one process and in two (gloo)."""

import json

import pytest
import torch
from torch import Tensor

from hf_compress.calibration import processes
from hf_compress.calibration.objective import draws
from hf_compress.methods.base.ridge import HeldOutSums
from hf_compress.numerics.moments import Moments
from hf_compress.numerics.ridge import LeastSquares
from tests.helpers.shared_work import start


def test_one_process_does_everything_itself():
    value = torch.ones(3)
    with processes.sharing():
        assert processes.here() == (0, 1)
        assert processes.own("ab") == [(0, "a"), (1, "b")]
        assert processes.from_one(lambda: value) is value
        assert list(processes.spread([1, 2], lambda item: item + 1)) == [2, 3]
        assert list(processes.spread_prepared([1, 2], lambda item: 10 * item, lambda ready: ready + 1)) == [11, 21]
        processes.given(value, 0)
        assert processes.gathered({2: "c", 0: "a"}) == ["a", "c"]
        assert processes.total(1, 2.5) == [1, 2.5]
        assert not processes.any_of(False)
        processes.summed([value])
        processes.agree(never=lambda: pytest.fail("there is nobody to agree with"))
    assert value.tolist() == [1, 1, 1]


def reduced(parts):
    """The first of some statistics, of several processes, once they are summed up."""
    sums, counted = [], [[] for _ in parts]
    for part, own in zip(parts, counted, strict=True):
        part.reduce(lambda tensors, own=own: own.extend(tensor.clone() for tensor in tensors))
    sums = [sum(tensors[1:], tensors[0]) for tensors in zip(*counted, strict=True)]

    def sum_up(tensors):
        for tensor, total in zip(tensors, sums, strict=True):
            tensor.copy_(total)

    parts[0].reduce(sum_up)
    return parts[0]


@pytest.mark.parametrize("size", [5, 700])  # more and fewer features than are summed up together
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sums_of_parts_are_those_of_the_whole(size, dtype):
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(900, n, generator=generator, dtype=dtype) + 3 for n in (size, 4))
    origin = x[:9].mean(0), y[:9].mean(0)
    parts = [LeastSquares(size, 4, dtype=dtype, origin=origin) for _ in range(3)]
    whole = LeastSquares(size, 4, dtype=dtype, origin=origin)
    whole.update(x, y)
    parts[0].update(x[:500], y[:500])
    parts[1].update(x[500:], y[500:])  # the third has no rows
    parts[1].own_gram()  # has looked at them before
    found = reduced(parts)
    assert found.count == 900
    assert found.energy == pytest.approx(whole.energy)
    for name in ("gram", "cross", "x_sum", "y_sum", "variances"):
        torch.testing.assert_close(getattr(found, name), getattr(whole, name), rtol=1e-5, atol=1e-2)
    moments = [Moments(size, dtype=dtype) for _ in range(2)]
    for one, rows in zip(moments, (x[:1], x[1:]), strict=True):
        one.add(rows)
    torch.testing.assert_close(reduced(moments).gram, whole.gram, rtol=1e-5, atol=1e-2)


def test_sums_for_some_outputs():
    x, y = (torch.randn(40, n, generator=torch.Generator().manual_seed(n)) for n in (3, 6))
    whole, some = HeldOutSums.like(x, y, affine=True), HeldOutSums.like(x, y[:, 2:4], affine=True)
    whole.update(x, y, held=False)
    some.update(x, y[:, 2:4], held=False)
    part = whole.of_outputs(slice(2, 4)).fitted
    weight = torch.ones(3, 2)
    torch.testing.assert_close(part.normal_cross(True), some.fitted.normal_cross(True))
    assert part.excess(weight) == pytest.approx(some.fitted.excess(weight), rel=1e-4)


def test_draws_hang_on_the_number_of_the_batch():
    def drawn(seed: int, number: int) -> Tensor:
        return torch.rand(4, generator=draws(seed, number))

    assert torch.equal(drawn(0, 2), drawn(0, 2))
    assert not torch.equal(drawn(0, 2), drawn(0, 3))
    assert not torch.equal(drawn(0, 2), drawn(1, 2))


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    """The errors that each of two processes has told of."""
    folder = tmp_path_factory.mktemp("agreed")
    assert start("agreed", folder) == [0, 0]
    assert (folder / "saved" / "config.json").is_file()
    return [json.loads((folder / f"said {rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "expected"),
    [
        ("data", "ProcessesError: process 1 does not have the same calibration data as process 0"),
        ("no data", "ProcessesError: process 1 does not have the same calibration data as process 0"),
        ("settings", "ProcessesError: process 1 does not have the same settings as process 0"),
        ("model", "ProcessesError: process 1 does not have the same model as process 0"),
        ("few", "CalibrationError: 1 batches are too few for 2 processes to share"),
        ("after", "nothing"),
        ("saved", "nothing"),
        ("saved again", "FileExistsError"),
    ],
)
def test_all_processes_hear_the_same(case, expected, said):
    assert [told[case].startswith(expected) for told in said] == [True, True], [told[case] for told in said]


@pytest.mark.slow
def test_a_failure_of_one_process_ends_the_others(said):
    assert said[1]["failing"].startswith("UnsupportedModelError: model.layers.2 does not run (ZeroDivisionError")
    assert (
        said[0]["failing"]
        == f"ProcessesError: process 1 of 2 has failed: {said[1]['failing']}"[: len(said[0]["failing"])]
    )


@pytest.mark.slow
def test_a_process_that_dies_leaves_nobody_waiting(tmp_path):
    assert start("dying", tmp_path) == [0, 7]
    assert "process 1 of 2 has ended, or does not answer process 0" in (tmp_path / "told").read_text()
