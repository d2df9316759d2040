"""Several that work together, in threads of one process: for what processes do with each other's sums."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import TypeVar

import torch
from torch import Tensor

from hf_compress.numerics.team import Team

T = TypeVar("T")
_PATIENCE = 60  # seconds for the others to come to the same exchange


class _Member(Team):
    """One of them."""

    def __init__(self, rank: int, world: int, barrier: Barrier, told: list[list[Tensor]]) -> None:
        self.rank, self.world = rank, world
        self._barrier, self._told = barrier, told

    def sum_up(self, tensors: Iterable[Tensor]) -> None:
        tensors = list(tensors)
        self._told[self.rank] = [tensor.clone() for tensor in tensors]
        self._barrier.wait(_PATIENCE)
        everywhere = list(zip(*self._told, strict=True))
        self._barrier.wait(_PATIENCE)
        for tensor, parts in zip(tensors, everywhere, strict=True):
            tensor.copy_(torch.stack(parts).sum(0))

    def give(self, tensor: Tensor, source: int) -> None:
        assert tensor.is_contiguous()
        if self.rank == source:
            self._told[source] = [tensor.clone()]
        self._barrier.wait(_PATIENCE)
        tensor.copy_(self._told[source][0])
        self._barrier.wait(_PATIENCE)


def in_team(world: int, work: Callable[[Team], T]) -> list[T]:
    """What each of so many makes of it."""
    barrier, told = Barrier(world), list[list[Tensor]]([[] for _ in range(world)])

    def own(rank: int) -> T:
        try:
            return work(_Member(rank, world, barrier, told))
        except BaseException:
            barrier.abort()  # the others are not to wait
            raise

    with ThreadPoolExecutor(world) as pool:
        return list(pool.map(own, range(world)))
