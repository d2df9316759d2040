"""How much a method takes out: `ratio`, which all methods have, beside the word of each one's paper."""

from __future__ import annotations

import math
from dataclasses import dataclass

AMOUNT = "amount"  # the group of the settings that say it; those with `keeps` say how much stays
SIZE = "size"  # the group of the settings that say how much space is left for what stays


@dataclass(frozen=True)
class Amount:
    """How much of what it acts on a method takes out, as it was said: a number, if whole, or else a share.

    Attributes:
        word: the setting that says it, such as "ratio", "num_merges" or "gamma".
        value: of the setting.
        keeps: whether it is the share that stays, as in the papers of ILLC and AdaptiveCompress.
    """

    word: str
    value: float
    keeps: bool = False

    @property
    def kept(self) -> float:
        """The share that stays: 1 − 0.9 as 0.1, and not a little less, which would round otherwise."""
        return self.value if self.keeps else round(1 - self.value, 12)

    def of(self, total: int) -> int:
        """How many of `total` go: the number, or the share rounded to the nearest number, but at least one."""
        return self.value if isinstance(self.value, int) else share_of(total, self.value)

    def of_blocks(self, total: int) -> int:
        """How many of `total` blocks go.

        Raises:
            ValueError: no block would be left.
        """
        count = self.of(total)
        if count >= total:
            asked = f"{self.word}={self.value}"
            raise ValueError(f"{asked} takes {count} of {total} blocks and leaves none; at most {total - 1} can go")
        return count


def share_of(total: int, ratio: float) -> int:
    """A share of `total`, rounded to the nearest number, but at least one."""
    return max(1, math.floor(total * ratio + 0.5))
