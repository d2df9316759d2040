"""Every method in two processes comes to what it comes to in one: the same choices, and tensors up to rounding."""

import json

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers.runs import same
from tests.helpers.shared_work import CASES, compressed, start

pytestmark = pytest.mark.slow

# Conjugate gradients stop by themselves, after one step more or less.
TOLERANCES = {"lrp, sparse and solved": 1e-2}


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The folder that two processes have written."""
    folder = tmp_path_factory.mktemp("two")
    assert start("all_cases", folder) == [0, 0]
    return folder


def test_goes_on_where_it_ended(tmp_path):
    """Five blocks in two processes, which weigh the inputs of two blocks at a time."""
    assert start("resumed", tmp_path) == [0, 0]
    for rank in (0, 1):
        alike, first, second = json.loads((tmp_path / f"resumed {rank}.json").read_text())
        assert alike
        assert first == second
        weighed = [name for name in first if name.startswith("unexplained")]
        assert weighed == [f"unexplained-inputs-of-block-{block}.safetensors" for block in (0, 2, 4)]


@pytest.mark.parametrize("case", CASES)
def test_as_in_one_process(case, two):
    one, edits = compressed(case)
    ends = [load_file(two / f"{case} {rank}.safetensors") for rank in (0, 1)]
    assert same(*ends)
    assert ends[0].keys() == one.keys()
    for rank in (0, 1):
        assert json.loads((two / f"{case} {rank}.json").read_text()) == edits
    for name, value in one.items():
        found = ends[0][name]
        if value.is_floating_point():
            gap, size = (found - value).norm(), max(value.norm(), value.numel() ** 0.5 / 10)
            assert gap <= TOLERANCES.get(case, 1e-5) * size, name
        else:
            assert torch.equal(found, value), name
