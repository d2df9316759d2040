"""Processes that share work, as threads of this one."""

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

import pytest
from torch import Tensor

T = TypeVar("T")


class Exchanges:
    """What `calibration.processes` has for them, put into a module that has imported it.

    They take their turns at every exchange: one that comes to another exchange than the rest fails, and so all do.
    """

    def __init__(self, world: int, module: object, monkeypatch: pytest.MonkeyPatch) -> None:
        self.world, self._own = world, threading.local()
        self._said: dict[int, tuple[str, Any]] = {}
        self._told, self._heard = (threading.Barrier(world, timeout=20) for _ in range(2))
        for name in ("here", "summed", "gathered"):
            monkeypatch.setattr(module, name, getattr(self, name))
        monkeypatch.setattr(module, "told", partial(self._exchange, "told"))

    def run(self, process: Callable[[int], T]) -> list[T]:
        """What each of them comes to, given its number."""

        def run(rank: int) -> T:
            self._own.rank = rank
            return process(rank)

        with ThreadPoolExecutor(self.world) as pool:
            return list(pool.map(run, range(self.world)))

    def here(self) -> tuple[int, int]:
        return self._own.rank, self.world

    def summed(self, tensors: Iterable[Tensor]) -> None:
        own = list(tensors)
        for tensor, *everywhere in zip(own, *self._exchange("summed", [one.clone() for one in own]), strict=True):
            tensor.copy_(sum(everywhere))

    def gathered(self, parts: dict[int, Any]) -> list[Any]:
        return [value for one in self._exchange("gathered", parts) for value in one.values()]

    def _exchange(self, kind: str, value: Any) -> list[Any]:
        self._said[self._own.rank] = kind, value
        self._told.wait()
        everything = [self._said[rank] for rank in range(self.world)]
        self._heard.wait()
        assert {name for name, _ in everything} == {kind}
        return [value for _, value in everything]
