"""Which batches are held out, and who takes them."""

from collections import Counter

import pytest

from hf_compress.calibration.held_out import HELD_OUT, is_held_out, taker

WORLDS = range(1, 13)


def test_every_fourth_batch_is_held_out():
    assert [number for number in range(12) if is_held_out(number)] == [3, 7, 11]


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("batches", [1, 5, 8, 13, 48])
def test_all_take_as_many_batches_but_for_one(world, batches):
    counts = Counter(taker(number, world) for number in range(batches))
    taken = [counts[rank] for rank in range(world)]
    assert sum(taken) == batches
    assert max(taken) - min(taken) <= (batches % world > 0)
    assert batches < world or min(taken) > 0


@pytest.mark.parametrize("world", WORLDS)
def test_all_take_as_many_of_those_that_are_held_out(world):
    for times in (1, 2, 5):  # so many rounds in which each process has its turn with them
        counts = Counter(taker(number, world) for number in range(times * world * HELD_OUT) if is_held_out(number))
        fewest, most = min(counts[rank] for rank in range(world)), max(counts.values())
        assert most - fewest <= 1


@pytest.mark.parametrize("world", WORLDS)
def test_the_first_process_has_the_first_batch(world):
    assert [taker(number, world) for number in range(world)] == list(range(world))
