"""Sums made in parts that fit into memory."""

import pytest

from hf_compress.calibration.memory import WorkingMemory, working_within
from hf_compress.methods.base.grams import few_at_once


@pytest.mark.parametrize(
    ("sizes", "parts"),
    [
        ([], []),
        ([4, 6, 1], [[0, 1], [2]]),
        ([11, 1], [[0], [1]]),  # too large: one alone
        ([1, 11, 12, 1, 9, 1], [[0], [1], [2], [3, 4], [5]]),
    ],
)
def test_parts_fit_into_memory(sizes, parts):
    with working_within(WorkingMemory(sums=10)):
        assert list(few_at_once(dict(enumerate(sizes)))) == parts
