"""A plan's edits as Markdown, for the model card: a table, which opens on demand if it is long, and bits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hf_compress.report.edits import Bits, bits_of, in_rows
from hf_compress.report.markdown import escape, table
from hf_compress.report.report import REPORT_FILE
from hf_compress.report.stages import Size

SHORT = 8  # rows of a table that stands open
MOST_ROWS = 200  # of one behind a line that opens it; the report beside the card has every edit

_BARS = "▁▂▃▄▅▆▇█"


def edits_table(edits: Sequence[Mapping[str, Any]]) -> str:
    """A table of what was changed, from the edits as a report has them; kinds that are not known here, too."""
    rows = in_rows(edits)
    text = table(["edit", "where", "what"], [[escape(cell) for cell in row] for row in rows[:MOST_ROWS]])
    if more := rows[MOST_ROWS:]:
        text += f"\n\nAnd {len(more):,} more lines; {REPORT_FILE} has every one of the {len(edits):,} edits."
    return text if len(rows) <= SHORT else folded(f"All {len(edits):,} edits", text)


def folded(title: str, text: str) -> str:
    """Markdown behind a line that opens it."""
    return f"<details>\n<summary>{title}</summary>\n\n{text}\n\n</details>"


def bits_table(edits: Sequence[Mapping[str, Any]], original: Size) -> str:
    """How many of the packed weights are stored in how many bits, with bars; nothing where none are packed."""
    bits = bits_of(edits)
    if bits is None:
        return ""
    shares = {width: count / bits.total for width, count in bits.weights.items()}
    tallest = max(shares.values())
    header = ["bits", *map(str, shares)]
    rows = [
        ["share of the weights", *(f"{100 * share:.1f}%" for share in shares.values())],
        ["", *(_BARS[round((len(_BARS) - 1) * share / tallest)] for share in shares.values())],
    ]
    return f"{_told(bits, original)}\n\n{table(header, rows)}"


def _told(bits: Bits, original: Size) -> str:
    before = f"; the original has {8 * original.bytes / original.parameters:.4g}" if original.parameters else ""
    return f"{bits.maps:,} linear maps, of {bits.total:,} weights: {bits.describe()}{before}."
