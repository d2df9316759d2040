"""Which calibration batches are held out: to choose or judge by, not to fit."""

from __future__ import annotations

import math

HELD_OUT = 4


def is_held_out(batch: int) -> bool:
    """Whether a batch of this number, counted from 0, is held out: every fourth."""
    return batch % HELD_OUT == HELD_OUT - 1


def taker(batch: int, world: int) -> int:
    """Which of so many processes takes a batch.

    They are dealt in turns that shift, so that no process gets all that are held out: these cost less than the others.
    """
    return (batch + batch // math.lcm(world, HELD_OUT)) % world
