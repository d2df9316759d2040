"""One process that solves by itself, and what several would do in its place."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor


class Alone:
    """All steps of the work are its own. Of several processes that share them, each does as this one does.

    Attributes:
        rank: the number of this process.
        world: how many there are.
    """

    rank, world = 0, 1

    def sum_up(self, tensors: Iterable[Tensor]) -> None:
        """Put sums over the processes in the places of tensors."""

    def give(self, tensor: Tensor, source: int) -> None:
        """Put the values that a contiguous tensor has in one of them in the places of all."""


ALONE = Alone()
