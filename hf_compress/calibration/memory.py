"""How much memory the work takes beside the model, and where streams go that are more than that."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from hf_compress.numerics.aside import Aside, Spare, mapped

_GIB = 2**30
COPIES = 3  # of a stream, at most: two that are kept, and the one that the model's forward began with


@dataclass(frozen=True)
class WorkingMemory:
    """Where the streams of batches are, in memory up to a budget, in mapped files beyond; and how many sums there are.

    Attributes:
        streams: bytes of all streams in memory.
        sums: bytes of the sums that one pass over the data makes; more are made in further passes.
        folder: where the files go, which have no name as soon as they are made; the system's for temporary files when
            None.
    """

    streams: int = 4 * _GIB
    sums: int = 4 * _GIB
    folder: Path | None = None

    def aside(self) -> Aside:
        """For what is kept a while and is as much as weights: it lies where streams do."""
        return Aside(self.folder)

    def spare(self, budget: int | None = None) -> Spare:
        """For what only spares time: it lies where streams do."""
        return Spare(budget, self.folder)

    def keep(self, number: int, stream: Tensor) -> Tensor:
        """The same tensor, which lies in a file where streams like it of the batches up to `number` take too much.

        Raises:
            WorkdirError: there is no room for the file.
        """
        if stream.device.type != "cpu" or (number + 1) * COPIES * stream.nbytes <= self.streams:
            return stream
        stream.data = mapped(stream.nbytes, self.folder).view(stream.dtype).view(stream.shape).copy_(stream)
        return stream


_current: ContextVar[WorkingMemory] = ContextVar("working_memory")


def working_memory() -> WorkingMemory:
    """What the work may take here."""
    return _current.get(WorkingMemory())


@contextmanager
def working_within(memory: WorkingMemory) -> Iterator[None]:
    """Inside, the work takes no more than that."""
    token = _current.set(memory)
    try:
        yield
    finally:
        _current.reset(token)
