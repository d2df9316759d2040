"""How many Gram matrices are held at once."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from typing import TypeVar

from hf_compress.calibration.memory import working_memory

_Key = TypeVar("_Key", bound=Hashable)


def few_at_once(sizes: Mapping[_Key, int]) -> Iterator[list[_Key]]:
    """What sums are made for, by the bytes that each takes, in parts that fit into memory; one alone always does."""
    most = working_memory().sums
    part: list[_Key] = []
    left = most
    for key, size in sizes.items():
        if part and size > left:
            yield part
            part, left = [], most
        part.append(key)
        left -= size
    if part:
        yield part
