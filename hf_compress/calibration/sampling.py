"""Random samples, drawn with a seed: of what can be indexed, of what is read once, and of streaming datasets.

The first samples of a file are seldom like the rest: files are sorted, or put together from others.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from random import Random
from typing import Any

logger = logging.getLogger(__name__)

BOUND = 4096  # samples that are read, where nobody says how many, of what may have no end
POOL = 10_000  # samples that are looked at, to draw some, of what may have no end or comes over a network
_UNTOLD = "not all of the calibration data is read, but %s: DataOptions(max_samples=) gives another number"


@dataclass(frozen=True)
class Drawn:
    """Samples, and what they were taken from.

    Attributes:
        items: the samples, in the order in which they were found; a tensor or a mapping of tensors is one, too.
        count: how many samples these are.
        of: how many were looked at; None where that is not known.
        seed: what they were drawn with; None where they are all that there are, or the first ones.
        more: whether there is more than what they were drawn from.
        source: the name of the file or dataset.
        asked: how many were wanted of it; None for all.
        drawn_with: the seed of the draw, whether there was one or not; None for the first ones.
    """

    items: Any
    count: int
    of: int | None = None
    seed: int | None = None
    more: bool = False
    source: str | None = None
    asked: int | None = None
    drawn_with: int | None = None

    @property
    def all_there_are(self) -> bool:
        """Whether nothing was left out."""
        return self.of == self.count and not self.more

    def __str__(self) -> str:
        """Such as "256 of 10,000 samples, drawn with seed 0"."""
        if self.seed is None:
            return f"the first {self.count:,}{'' if self.of is None else f' of {self.of:,}'} samples"
        among = "" if self.of is None else f" of {'the first ' * self.more}{self.of:,}"
        return f"{self.count:,}{among} samples, drawn with seed {self.seed}"

    def facts(self) -> dict[str, int | str]:
        """What a report says of it; nothing of a list that was used as it was."""
        of = None if self.all_there_are else self.of
        found = {"source": self.source, "asked": self.asked, "drawn_with": self.drawn_with}
        found |= {"of_the_first" if self.more else "of": of, "seed": self.seed}
        return {name: value for name, value in found.items() if value is not None}

    def tell(self, asked: bool = True) -> None:
        """Log what was left out, with a warning where nobody had asked for it."""
        if self.all_there_are:
            return
        if asked:
            logger.info("calibration data: %s", self)
        else:
            logger.warning(_UNTOLD, self)


def one(value: Any) -> int:
    """How many samples a value is: none, where it is a text without a word in it."""
    return 0 if isinstance(value, str) and not value.strip() else 1


def drawn_from(items: Any, count: int, of: int, seed: int | None) -> Drawn:
    """Samples that were taken from `of`: with a seed, unless these are all."""
    return Drawn(items, count, of, seed if count < of else None)


def shuffled(length: int, seed: int | None) -> Iterator[int]:
    """The numbers below `length` in random order, in memory for those alone that were asked for; in theirs for None."""
    if seed is None:
        yield from range(length)
        return
    random, moved = Random(seed), dict[int, int]()
    for place in range(length):  # Fisher and Yates, but with the list kept as what differs from 0, 1, 2, …
        other = random.randrange(place, length)
        yield moved.get(other, other)
        moved[other] = moved.pop(place, place)


def indices(length: int, count: int | None, seed: int | None) -> list[int]:
    """Of the samples to take, in rising order: all, where none are left out."""
    if count is None or count >= length:
        return list(range(length))
    return sorted(islice(shuffled(length, seed), count))


def choose(values: Sequence[Any], count: int, seed: int | None, size: Callable[[Any], int] = one) -> Drawn:
    """Values that hold `count` samples together, or as few more as whole values allow, in their order.

    Args:
        values: what can be indexed.
        count: how many samples are wanted.
        seed: for the draw without replacement; None for the first ones.
        size: how many samples a value holds; what holds none is left out.
    """
    chosen: dict[int, Any] = {}
    held = 0
    for index in shuffled(len(values), seed):
        if held >= count:
            break
        if samples := size(value := values[index]):
            chosen[index] = value
            held += samples
    else:
        return Drawn([chosen[index] for index in sorted(chosen)], held, held)
    of = len(values) if held == len(chosen) else None
    return Drawn([chosen[index] for index in sorted(chosen)], held, of, seed)


def reservoir(items: Iterable[Any], count: int, seed: int | None, pool: int) -> Drawn:
    """`count` of the first `pool` items, each as likely as any other, in one pass that holds no more than them.

    Source: J. S. Vitter, "Random Sampling with a Reservoir", 1985 (Algorithm R).

    Args:
        items: read to their end, or one beyond the pool. Empty texts are left out, and are no samples.
        count: how many are wanted.
        seed: for the draw; None for the first ones, after which nothing more is read than one item.
        pool: how many are looked at for a draw; `count`, where that is more.
    """
    random, pool = Random(seed), max(pool, count)
    kept: list[tuple[int, Any]] = []
    seen, more = 0, False
    for number, item in enumerate(items):
        if len(kept) == count if seed is None else number == pool:
            more = True
            break
        if not one(item):
            continue
        seen += 1
        if len(kept) < count:
            kept.append((number, item))
        elif (place := random.randrange(seen)) < count:
            kept[place] = (number, item)
    found = [item for _, item in sorted(kept, key=lambda pair: pair[0])]
    drawn = seed is not None and seen > len(found)
    return Drawn(found, len(found), None if more and not drawn else seen, seed if drawn else None, more)


def from_stream(rows: Any, count: int, seed: int | None, values: Callable[[Any], Iterable[Any]] = iter) -> Drawn:
    """Samples of a streaming dataset, drawn by its own means: it shuffles its files, and rows in a buffer of `POOL`.

    Args:
        rows: a `datasets.IterableDataset`.
        count: how many are wanted.
        seed: for the draw; None for the first ones.
        values: gives samples from rows; the rows themselves by default. Empty texts are left out.
    """
    if seed is not None:
        buffered = values(rows.shuffle(seed=seed, buffer_size=max(POOL, count)))
        found = list(islice(filter(one, buffered), count + 1))
        if len(found) > count:
            return Drawn(found[:count], count, None, seed, True)
    return reservoir(values(rows), count, None, count)  # all there are, or the first ones, in their order
