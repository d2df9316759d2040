"""Texts and values that come from elsewhere, as Markdown: whatever they hold, they stay text."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

MOST_VALUES = 12  # entries of a list that are written out

# As entities, not behind a backslash: the Hub reads formulas ($$, \\() before it reads Markdown.
_ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;", "\\": "&#92;", "$": "&#36;"}
_SPECIAL = re.compile(r"[&<>\\$`*\[\]|~#]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])")  # an underscore in a word is a letter
_AT_START = re.compile(r"^(\d{0,9})([-+=.)]+)(?=\s|$)")  # lists, rules, and the underline of a heading
_METADATA = re.compile(r"\s*---[ \t]*\n(?P<yaml>.*?)^---[ \t]*$\n?", re.DOTALL | re.MULTILINE)
_ABSOLUTE = re.compile(r"[/\\]|~[\w.-]*[/\\]|[A-Za-z]:[/\\]|file:")


def split_card(card: str) -> tuple[str, str]:
    """The metadata at a card's beginning, as YAML, and what follows it; no metadata where there is none."""
    found = _METADATA.match(card)
    return (found["yaml"], card[found.end() :]) if found else ("", card)


def one_line(text: str) -> str:
    """`text` without control characters and line breaks."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def escape(text: str) -> str:
    """`text` on one line, such that Markdown shows it as it is: in a paragraph, a heading, a link or a table's cell."""
    text = _SPECIAL.sub(lambda found: _ENTITIES.get(found[0], "\\" + found[0]), one_line(text))
    return _AT_START.sub(r"\1\\\2", text)


def fence(text: str, language: str = "") -> str:
    """A code block that nothing in `text` can close."""
    lines = ["".join(c if c.isprintable() else " " for c in line).rstrip() for line in text.strip("\n").splitlines()]
    longest = max((len(run) for line in lines for run in re.findall("`+", line)), default=0)
    ticks = "`" * max(3, longest + 1)
    return "\n".join((f"{ticks}{language}", *lines, ticks))


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of cells that are Markdown already; the columns after the first are numbers, at the right, or words."""
    numbers = [any(cell.lstrip("+-")[:1].isdigit() for cell in column) for column in zip(*rows, strict=True)]
    lines = [header, [*("---:" if number else "---" for number in numbers)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def human_bytes(count: int) -> str:
    """A number of bytes, such as "20.4 MB" (powers of 1,000)."""
    size = float(count)
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def sentence(text: str) -> str:
    """`text`, escaped, as a sentence with its full stop; nothing of nothing."""
    text = one_line(text)
    return escape(text if text.endswith((".", "?", "!")) or not text else f"{text}.")


def last_part(path: str) -> str:
    """The last folder of a path, or what stands behind the last slash of a name."""
    last = re.split(r"[\\/]", path.rstrip("\\/"))[-1]
    return "" if last in (".", "..") else last


def public(text: str) -> str:
    """`text`, without the folders where it is a path of this machine."""
    return last_part(text) if _ABSOLUTE.match(text) else text


def json_values(value: Any) -> Any:
    """JSON values that may be published: no NaN, no paths."""
    if isinstance(value, Mapping):
        return {str(key): json_values(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_values(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return public(value) if isinstance(value, str) else value


def in_words(value: Any) -> str:
    """A JSON value in a few words; a long list by its length."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {in_words(entry)}" for key, entry in value.items())
    if isinstance(value, (list, tuple)):
        long = len(value) > MOST_VALUES
        return f"{len(value):,} values" if long else ", ".join(map(in_words, value)) or "none"
    if isinstance(value, float):
        return f"{value:.4g}" if math.isfinite(value) else "not finite"
    return public(value) if isinstance(value, str) else json.dumps(value)


def several(given: str | Iterable[str]) -> list[str]:
    """One text or several as a list, without empty ones."""
    return [line for text in ([given] if isinstance(given, str) else given) if (line := one_line(text))]
