"""How many Gram matrices are held at once."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from typing import TypeVar

_MEMORY = 4 * 2**30  # for the sums of one pass over the data
_Key = TypeVar("_Key", bound=Hashable)


def few_at_once(sizes: Mapping[_Key, int]) -> Iterator[list[_Key]]:
    """What sums are made for, by the bytes that each takes, in parts that fit into 4 GiB; one alone always does."""
    part: list[_Key] = []
    left = _MEMORY
    for key, size in sizes.items():
        if part and size > left:
            yield part
            part, left = [], _MEMORY
        part.append(key)
        left -= size
    if part:
        yield part
