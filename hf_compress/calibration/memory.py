"""How much memory the work takes beside the model, and where streams go that are more than that."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from hf_compress.errors import WorkdirError, one_line

_GIB = 2**30
_COPIES = 3  # of a stream, at most: two that are kept, and the one that the model's forward began with


@dataclass(frozen=True)
class WorkingMemory:
    """Where the streams of batches are, in memory up to a budget, in mapped files beyond; and how many sums there are.

    Attributes:
        streams: bytes of all streams in memory.
        sums: bytes of the sums of one pass over the data, where it is the matter of how many passes there are.
        folder: where the files go, which have no name as soon as they are made; the system's for temporary files when
            None.
    """

    streams: int = 4 * _GIB
    sums: int = 4 * _GIB
    folder: Path | None = None

    def keep(self, number: int, stream: Tensor) -> Tensor:
        """The same tensor, which lies in a file where streams like it of the batches up to `number` take too much.

        Raises:
            WorkdirError: there is no room for the file.
        """
        if stream.device.type != "cpu" or (number + 1) * _COPIES * stream.nbytes <= self.streams:
            return stream
        stream.data = self._mapped(stream).copy_(stream)
        return stream

    def _mapped(self, like: Tensor) -> Tensor:
        """A tensor in a file."""
        folder = self.folder or Path(tempfile.gettempdir())
        try:
            handle, name = tempfile.mkstemp(prefix="hf_compress-stream-", dir=folder)
            try:
                if hasattr(os, "posix_fallocate"):  # or a full disk would end the process when it is written to
                    os.posix_fallocate(handle, 0, like.nbytes)
                mapped = torch.from_file(name, shared=True, size=like.numel(), dtype=like.dtype)
            finally:
                os.close(handle)
                os.unlink(name)  # what is mapped stays until nothing refers to it
        except OSError as error:
            raise WorkdirError(
                f"{folder} has no room for a stream of {like.nbytes:,} bytes ({one_line(error)}): make some, or give "
                "another folder (workdir=)"
            ) from error
        return mapped.view(like.shape)


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
