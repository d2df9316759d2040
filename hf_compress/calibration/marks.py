"""Streams of batches before a few blocks, where the next sweep can begin: only blocks behind them have changed."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from hf_compress.calibration.memory import working_memory
from hf_compress.calibration.processes import told
from hf_compress.numerics.aside import Spare

_DEPTHS = 8  # at which streams of a sweep are kept, at most


@dataclass
class Marks:
    """Where the next sweep over the same batches can begin. The streams are in files, as far as there is room.

    Attributes:
        start: the block that it begins with.
    """

    start: int = 0
    _spare: Spare = field(default_factory=lambda: working_memory().spare())
    _streams: dict[int, dict[int, Tensor]] = field(default_factory=dict)  # by block, then by batch
    _given_up: set[int] = field(default_factory=set)  # blocks before which there was no room for all batches
    _device: torch.device = field(default_factory=lambda: torch.device("cpu"))  # where they came from

    def keep(self, index: int, blocks: int, place: int, before: Tensor) -> None:
        """Keep the stream of a batch before a block, if it is one of `blocks` to begin at."""
        known = index in self._given_up or place in self._streams.get(index, {})
        if known or index % -(-blocks // _DEPTHS):
            return
        kept = self._spare.put(before)
        if kept is None:
            self._given_up.add(index)
            self._drop(index)
        else:
            self._device = before.device
            self._streams.setdefault(index, {})[place] = kept

    def at_start(self, place: int) -> Tensor | None:
        """The stream of a batch before block `start`; None where that is the first, and it is not kept."""
        kept = self._streams.get(self.start, {}).get(place)
        return None if kept is None else kept.to(self._device)

    def changed(self, index: int) -> None:
        """Block `index` is another now, and so may be those behind it, and how many there are."""
        everywhere = set.intersection(*map(set, told(list(self._streams))))  # a process may have had less room
        for depth in [depth for depth in self._streams if depth > index or depth not in everywhere]:
            self._drop(depth)
        self._given_up = {depth for depth in self._given_up if depth <= index}
        self.start = max(self._streams, default=0)

    def _drop(self, depth: int) -> None:
        for stream in self._streams.pop(depth, {}).values():
            self._spare.drop(stream)
