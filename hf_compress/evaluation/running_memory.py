"""How much memory a run needs at most beside what was there before."""

from __future__ import annotations

import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from hf_compress.numerics.aside import give_back

_STATUS = Path("/proc/self/status")
_EVERY = 0.001  # seconds between samples


@dataclass
class Growth:
    """Set at the end of `peak_growth`.

    Attributes:
        bytes: the peak above what was taken at the beginning; None where it cannot be seen.
    """

    bytes: int | None = None


@contextmanager
def peak_growth(device: torch.device) -> Iterator[Growth]:
    """Watch how much more memory is taken inside than before it, at most.

    On CUDA that is what PyTorch's allocator has given out, on all devices. On a CPU under Linux it is the process's
    anonymous memory, sampled every millisecond: unlike the resident set it has no part in files that are mapped, such
    as weights that are read for the first time. What freed memory the C library keeps is handed back before, for it
    would be used again unseen.
    """
    growth = Growth()
    if device.type == "cuda":
        with _of_cuda(growth):
            yield growth
    elif device.type == "cpu" and sys.platform == "linux":
        with _of_process(growth):
            yield growth
    else:
        yield growth


@contextmanager
def _of_cuda(growth: Growth) -> Iterator[None]:
    devices = range(torch.cuda.device_count())
    before = {device: torch.cuda.memory_allocated(device) for device in devices}
    for device in devices:
        torch.cuda.reset_peak_memory_stats(device)
    yield
    growth.bytes = sum(torch.cuda.max_memory_allocated(device) - before[device] for device in devices)


@contextmanager
def _of_process(growth: Growth) -> Iterator[None]:
    give_back()
    before = most = _anonymous()
    done = threading.Event()

    def sample() -> None:
        nonlocal most
        while not done.wait(_EVERY):
            most = max(most, _anonymous())

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
    growth.bytes = max(most, _anonymous()) - before


def _anonymous() -> int:
    """Bytes of memory of the process that no file stands behind."""
    found = re.search(r"^RssAnon:\s+(\d+) kB", _STATUS.read_text(), re.MULTILINE)
    return 1024 * int(found[1]) if found else 0
