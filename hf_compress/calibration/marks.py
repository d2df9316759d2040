"""Streams of batches before a few blocks, where the next sweep can begin: only blocks behind them have changed."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from hf_compress.calibration.memory import WorkingMemory, working_memory

_DEPTHS = 8  # at which streams of a sweep are kept, at most


@dataclass
class Marks:
    """Where the next sweep over the same batches can begin. The streams are in files.

    Attributes:
        start: the block that it begins with.
    """

    start: int = 0
    _memory: WorkingMemory = field(default_factory=lambda: replace(working_memory(), streams=0))
    _streams: dict[int, dict[int, Tensor]] = field(default_factory=dict)  # by block, then by batch
    _device: torch.device = field(default_factory=lambda: torch.device("cpu"))  # where they came from

    def keep(self, index: int, blocks: int, place: int, before: Tensor) -> None:
        """Keep the stream of a batch before a block, if it is one of `blocks` to begin at."""
        if index % -(-blocks // _DEPTHS) == 0:
            self._device = before.device
            self._streams.setdefault(index, {})[place] = self._memory.keep(place, before.cpu())

    def at_start(self, place: int) -> Tensor | None:
        """The stream of a batch before block `start`; None before the first sweep."""
        kept = self._streams.get(self.start, {}).get(place)
        return None if kept is None else kept.to(self._device)

    def changed(self, index: int) -> None:
        """Block `index` is another now, and so may be those behind it, and how many there are."""
        self._streams = {depth: kept for depth, kept in self._streams.items() if depth <= index}
        self.start = max(self._streams, default=0)
