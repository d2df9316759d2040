"""Logits of words, (samples, positions, words): as a model gave them, or made of what its head reads, as asked for.

Of tens of thousands of words one is explained at each position. The product with the whole head, and that of its
gradient, which is 0 but for one entry a row, take as long as several blocks.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional


class WordLogits(Protocol):
    """Logits of words.

    Attributes:
        like: a tensor with their samples and positions, (samples, positions, any number).
    """

    like: Tensor

    def of(self, words: Tensor) -> Tensor:
        """That of one word at each position, by words (samples, positions) int64: (samples, positions)."""

    def at(self, positions: Tensor) -> Tensor:
        """All at one position of each sample, by positions (samples) int64: (samples, words)."""


class GivenLogits:
    """What a model gave; see `WordLogits`."""

    def __init__(self, logits: Tensor) -> None:
        self.like = logits

    def of(self, words: Tensor) -> Tensor:
        return self.like.gather(-1, words[..., None])[..., 0]

    def at(self, positions: Tensor) -> Tensor:
        return _one_each(self.like, positions)


class HeadLogits:
    """What a head, a linear map, makes of what it reads, (samples, positions, width); see `WordLogits`."""

    def __init__(self, read: Tensor, head: nn.Linear) -> None:
        self.like, self.head = read, head

    def of(self, words: Tensor) -> Tensor:
        found = (self.like * self.head.weight[words]).sum(dim=-1)
        return found if self.head.bias is None else found + self.head.bias[words]

    def at(self, positions: Tensor) -> Tensor:
        return functional.linear(_one_each(self.like, positions), self.head.weight, self.head.bias)


def _one_each(values: Tensor, positions: Tensor) -> Tensor:
    return values[torch.arange(len(values), device=values.device), positions]
