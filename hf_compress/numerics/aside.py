"""Memory that the system has back: tensors in mapped files without names, which it may drop, and what is freed."""

from __future__ import annotations

import ctypes
import mmap
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from hf_compress.errors import WorkdirError, one_line

_FIRST, _MOST = 2**20, 2**26  # bytes of a file
_ALIGNMENT = 64
_PRIVATE = {} if sys.platform == "win32" else {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS}


def give_back() -> None:
    """Have the C library (glibc) hand freed memory to the system, which it keeps between what is still in use."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def in_own_pages(tensor: Tensor) -> Tensor:
    """A copy on the CPU, in pages that go back to the system with it, unlike many of the C library's."""
    if not tensor.numel():
        return tensor.clone()
    pages = mmap.mmap(-1, tensor.nbytes, **_PRIVATE)
    return torch.frombuffer(pages, dtype=torch.uint8).view(tensor.dtype).view(tensor.shape).copy_(tensor)


def mapped(size: int, folder: Path | None = None) -> Tensor:
    """Bytes (size) in a file, which goes with the last tensor that has a part of them; in memory on Windows.

    Args:
        folder: where the file is; the system's for temporary files when None. It has no name as soon as it is made.

    Raises:
        WorkdirError: the file cannot be made, or there is no room for it.
    """
    if sys.platform == "win32":  # deletes no file that is open
        return torch.empty(size, dtype=torch.uint8)
    try:
        return _mapped(size, folder)
    except OSError as error:
        raise WorkdirError(
            f"{folder or tempfile.gettempdir()} has no room for {size:,} bytes ({one_line(error)}): make some, or give "
            "another folder (workdir=)"
        ) from error


def _mapped(size: int, folder: Path | None) -> Tensor:
    handle, name = tempfile.mkstemp(prefix="hf_compress-", dir=folder)
    try:
        if hasattr(os, "posix_fallocate"):  # writing to what is mapped tells of no lack of room
            os.posix_fallocate(handle, 0, size)
        return torch.from_file(name, shared=True, size=size, dtype=torch.uint8)
    finally:
        os.close(handle)
        os.unlink(name)


class Aside:
    """Many tensors that are kept a while, several to a file. A file goes with the last of its tensors.

    Args:
        folder: as of `mapped`.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder, self._size = folder, _FIRST
        self._room = torch.empty(0, dtype=torch.uint8)

    def put(self, tensor: Tensor) -> Tensor:
        """The same tensor, on the CPU, in a file."""
        return self.empty(tensor.shape, tensor.dtype).copy_(tensor)

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A tensor in a file, of any values; WorkdirError where there is no room for it."""
        size = prod(shape) * dtype.itemsize
        taken = -(-max(size, 1) // _ALIGNMENT) * _ALIGNMENT
        if taken > len(self._room):
            self._room = mapped(max(taken, self._size), self._folder)
            self._size = min(2 * self._size, _MOST)
        made, self._room = self._room[:size], self._room[taken:]
        return made.view(dtype).view(shape)


class Spare:
    """Files for what only spares time: where there is no room for it, the work does without.

    Room is kept for what the work needs: they take no more than half of what the folder would have left without them.

    Args:
        budget: bytes that they may take in all; as many as there is room for when None.
        folder: as of `mapped`.
    """

    def __init__(self, budget: int | None = None, folder: Path | None = None) -> None:
        self._aside, self._folder, self._left, self._taken = Aside(folder), folder, budget, 0

    def fits(self, size: int) -> bool:
        """Whether there is room for so many bytes."""
        if self._left is not None and size > self._left:
            return False
        try:
            return 2 * size + self._taken <= shutil.disk_usage(self._folder or tempfile.gettempdir()).free
        except OSError:
            return False

    def put(self, tensor: Tensor) -> Tensor | None:
        """The same tensor, on the CPU, in a file; None without room."""
        if not self.fits(tensor.nbytes):
            return None
        try:
            kept = self._aside.put(tensor)
        except WorkdirError:  # somebody else has taken it meanwhile
            return None
        self._taken += tensor.nbytes
        if self._left is not None:
            self._left -= tensor.nbytes
        return kept
