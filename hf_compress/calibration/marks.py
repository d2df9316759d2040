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
    _left_out: set[int] = field(default_factory=set)  # blocks before which there was no room for all batches
    _device: torch.device = field(default_factory=lambda: torch.device("cpu"))  # where they came from

    def keep(self, index: int, blocks: int, place: int, batches: int, before: Tensor) -> None:
        """Keep the stream of one of some batches before a block, if it is one of `blocks` to begin at.

        Of all batches, the first of them first, or of none.
        """
        known = index in self._left_out or place in self._streams.get(index, {})
        if known or index % -(-blocks // _DEPTHS):
            return
        fits = place > 0 or self._spare.fits(batches * before.nbytes)
        kept = self._spare.put(before) if fits else None
        if kept is None:
            self._left_out.add(index)
            self._streams.pop(index, None)
        else:
            self._device = before.device
            self._streams.setdefault(index, {})[place] = kept

    def at_start(self, place: int) -> Tensor | None:
        """The stream of a batch before block `start`; None where that is the first, and it is not kept."""
        kept = self._streams.get(self.start, {}).get(place)
        return None if kept is None else kept.to(self._device)

    def changed(self, index: int, batches: int) -> None:
        """Block `index` is another now, and so may be those behind it, and how many there are.

        Args:
            batches: of this process.
        """
        kept = [set(depths) for depths in told(list(self._streams) if batches else None) if depths is not None]
        everywhere = set.intersection(*kept)  # a process may have had less room
        self._streams = {at: streams for at, streams in self._streams.items() if at <= index and at in everywhere}
        self._left_out = {depth for depth in self._left_out if depth <= index}
        self.start = max(everywhere & set(range(index + 1)), default=0)
