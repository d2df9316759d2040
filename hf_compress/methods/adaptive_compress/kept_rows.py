"""Tokens that a first pass over the data has seen behind blocks, so that the next need not run the model for them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hf_compress.calibration.memory import working_memory


class KeptRows:
    """Tokens (tokens, hidden) by the batch's number and the block.

    They are in files, as far as there is room, and no more in all than streams may take in memory.
    """

    def __init__(self) -> None:
        memory = working_memory()
        self._spare = memory.spare(memory.streams)
        self._rows: dict[tuple[int, int], tuple[Tensor, torch.device]] = {}

    def put(self, number: int, layer: int, rows: Tensor) -> None:
        """Keep some, if there is room."""
        kept = self._spare.put(rows)
        if kept is not None:
            self._rows[number, layer] = kept, rows.device

    def has(self, number: int, layers: Sequence[int]) -> bool:
        """Whether a batch's tokens behind all of some blocks are there."""
        return all((number, layer) in self._rows for layer in layers)

    def of(self, number: int, layer: int) -> Tensor:
        """A batch's tokens behind a block, in float32."""
        rows, device = self._rows[number, layer]
        return rows.to(device).float()
