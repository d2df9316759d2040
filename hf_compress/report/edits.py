"""A plan's edits in words: row by row, decision by decision, and how many bits they leave of weights."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from hf_compress.calibration.processes import here
from hf_compress.errors import PlanError
from hf_compress.plan.edits import runs
from hf_compress.plan.plan import Plan
from hf_compress.report.markdown import in_words
from hf_compress.rewrite.edits import edit_from_dict

logger = logging.getLogger(__name__)

_MODULE = re.compile(r"([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*)\.(\d{1,6})((?:\.\w+)*)", re.ASCII)  # a path with a block in it
_NUMBER = re.compile(r"\d+(?:,\d{3})*(?:\.\d+)?")
_HEADER = 3  # bytes beside the bits of a group: its step, and how many bits it has; a stored zero takes one more


@dataclass(frozen=True)
class Bits:
    """How many bits the weights of packed linear maps are stored in.

    Attributes:
        maps: number of linear maps.
        weights: how many weights are stored in how many bits, in rising order.
        header_bits: of what is stored of the groups besides: steps, zeros, and how many bits they have.
    """

    maps: int
    weights: dict[int, int]
    header_bits: int

    @property
    def total(self) -> int:
        """Number of weights."""
        return sum(self.weights.values())

    @property
    def average(self) -> float:
        """Bits a weight."""
        return sum(bits * count for bits, count in self.weights.items()) / self.total

    @property
    def stored(self) -> float:
        """Bits a weight, with what is stored of the groups."""
        return self.average + self.header_bits / self.total

    def describe(self) -> str:
        """The average, and the range."""
        few, most = min(self.weights), max(self.weights)
        spread = f" ({few} to {most})" if few < most else ""
        return f"{self.average:.4g} bits a weight on average{spread}, {self.stored:.4g} with the steps of groups"


def bits_of(edits: Iterable[Mapping[str, Any]]) -> Bits | None:
    """How many bits edits store weights in; None where they pack none."""
    groups: Counter[int] = Counter()
    maps = header = 0
    for edit in edits:
        planes, size = edit.get("planes"), edit.get("group_size")
        if not isinstance(planes, (list, tuple)) or not planes or not isinstance(size, int):
            continue
        if not all(isinstance(plane, int) for plane in planes):  # of a kind that is not known here
            continue
        maps += 1
        header += 8 * (_HEADER + (edit.get("symmetric") is False)) * planes[0]
        for bits, (more, fewer) in enumerate(zip(planes, [*planes[1:], 0], strict=True), 1):
            groups[bits] += size * (more - fewer)
    weights = {bits: groups[bits] for bits in sorted(groups) if groups[bits] > 0}
    return Bits(maps, weights, header) if weights else None


def in_rows(edits: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, str]]:
    """Kind, place and effect of edits, as a report has them; those that differ by their block alone are one row."""
    groups: dict[tuple[str, str, str, str], list[int]] = {}
    for edit in edits:
        kind, where, what = str(edit.get("edit")), _where(edit), _what(edit)
        before, block, after = _located(where)
        groups.setdefault((kind, what, before, after), []).extend([] if block is None else [block])
    return [(kind, _place(before, blocks, after), what) for (kind, what, before, after), blocks in groups.items()]


def decisions(edits: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line for each decision: what becomes of a stack's blocks, or of the parts of a kind in all blocks.

    Of numbers that differ from block to block, the least and the greatest are told; of packed maps, the average bits.
    """
    lines = []
    groups: dict[tuple[str, str, str], list[Mapping[str, Any]]] = {}
    for edit in edits:
        before, _, after = _located(_where(edit))
        packed = bits_of([edit]) is not None
        place = ("", "") if packed else (before, re.sub(r"\.\d+(?=\.|$)", ".*", after))  # experts have numbers, too
        groups.setdefault((str(edit.get("edit")), *place), []).append(edit)
    for (kind, before, after), alike in groups.items():
        blocks = [block for edit in alike if (block := _located(_where(edit))[1]) is not None]
        told = list(dict.fromkeys(map(_what, alike)))
        if "stack" in alike[0]:
            lines.append(f"{before}: {'; '.join(told)}")
        elif (bits := bits_of(alike)) is not None:
            kept = sum(number for edit in alike if isinstance(number := edit.get("kept"), int))
            left = f"{kept:,} weights kept, in " if kept else ""
            lines.append(f"{kind}, {bits.maps:,} linear maps: {left}{bits.describe()}")
        else:
            lines.append(f"{kind}, {_place(before, blocks, after)}: {_ranges(told)}")
    return lines


def log_decisions(method: str, plan: Plan) -> None:
    """Log what a method has decided, a line for each decision; of several processes the first does."""
    if here()[0] or not logger.isEnabledFor(logging.INFO):
        return
    for line in decisions(plan.to_list()):
        logger.info("%s: %s", method, line)


def _ranges(told: Sequence[str]) -> str:
    """Texts that differ by their numbers as one, with the least and the greatest of each."""
    if len({_NUMBER.sub("", text) for text in told}) > 1:
        return "; ".join(told)
    columns = zip(*(_NUMBER.findall(text) for text in told), strict=True)
    spans = iter([sorted(set(column), key=lambda number: float(number.replace(",", ""))) for column in columns])

    def span(_: re.Match[str]) -> str:
        numbers = next(spans)
        return numbers[0] if len(numbers) == 1 else f"{numbers[0]} to {numbers[-1]}"

    return _NUMBER.sub(span, told[0])


def _place(before: str, blocks: Sequence[int], after: str) -> str:
    return f"{before}.{', '.join(runs(sorted(set(blocks))))}{after}" if blocks else before


def _located(where: str) -> tuple[str, int | None, str]:
    """What stands before a block's number, the number, and what stands behind it."""
    path = _MODULE.fullmatch(where)
    return (path[1], int(path[2]), path[3]) if path else (where, None, "")


def _where(edit: Mapping[str, Any]) -> str:
    """The stack or the module that an edit changes: of several, the first that it names by itself."""
    paths = (value for value in edit.values() if _is_module(value))
    return str(edit["stack"]) if "stack" in edit else next(paths, "")


def _what(edit: Mapping[str, Any]) -> str:
    """What an edit does; of one that is not known here, its fields but for the modules' paths."""
    with suppress(PlanError):
        return edit_from_dict(edit).describe()
    return ", ".join(
        f"{key}: {in_words(value)}"
        for key, value in edit.items()
        if key not in ("edit", "stack") and not _is_module(value) and not _are_modules(value)
    )


def _is_module(value: Any) -> bool:
    return isinstance(value, str) and _MODULE.fullmatch(value) is not None


def _are_modules(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and bool(value) and all(map(_is_module, value))
