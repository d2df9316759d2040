"""Processes that factorise, invert and choose together; one alone is the smallest team."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor


class Team:
    """One process alone, which tells nobody anything. In a larger team all come to the same exchanges.

    Attributes:
        rank: the number of this process.
        world: how many there are.
    """

    rank, world = 0, 1

    def part(self, count: int) -> slice:
        """Of so many things in a row, those that this process sees to; all of them alone."""
        share = -(-count // self.world)
        return slice(self.rank * share, (self.rank + 1) * share)

    def sum_up(self, tensors: Iterable[Tensor]) -> None:
        """Put sums over the processes in the places of tensors."""

    def give(self, tensor: Tensor, source: int) -> None:
        """Put the values that a contiguous tensor has in one of them in the places of all."""


ALONE = Team()
