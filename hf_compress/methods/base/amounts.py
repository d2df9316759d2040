"""How many blocks a method takes out: by number or by share."""

from __future__ import annotations

import math

from hf_compress.methods.base.checks import check_ratio


def check_amount(ratio: float | None, num: int | None, num_name: str) -> None:
    """Raise unless exactly one of `ratio`, a share of the blocks, and `num`, a count of at least 1, is given."""
    check_ratio("ratio", ratio)
    if num is not None and (type(num) is not int or num < 1):
        raise ValueError(f"{num_name} must be a whole number of at least 1; got {num!r}")
    if ratio is not None and num is not None:
        raise ValueError(f"give ratio or {num_name}, not both; got ratio={ratio} and {num_name}={num}")


def share_of(total: int, ratio: float) -> int:
    """A share of `total`, rounded to the nearest number, but at least one."""
    return max(1, math.floor(total * ratio + 0.5))


def blocks_to_remove(total: int, ratio: float | None, num: int | None, num_name: str) -> int:
    """How many of `total` blocks go: `num`, or the share `ratio` rounded to the nearest number, but at least one.

    Raises:
        ValueError: no block would be left.
    """
    count = num if num is not None else share_of(total, ratio or 0)
    if count >= total:
        asked = f"{num_name}={num}" if num is not None else f"ratio={ratio}"
        raise ValueError(f"{asked} takes {count} of {total} blocks and leaves none; at most {total - 1} can go")
    return count
