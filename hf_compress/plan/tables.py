"""Tables of plain values, as text and as notebooks show them, and figures as they stand in them."""

from __future__ import annotations

import html
import math
from collections.abc import Collection, Iterable, Sequence

_LARGE = 1e9  # from here on four digits of a figure say enough


def text_table(
    header: Sequence[str], rows: Iterable[Sequence[str]], right: Collection[int] = (), rule: bool = True
) -> str:
    """A table in lines of text.

    Args:
        rows: their cells. The last cell of a row that has fewer than the head runs on over the columns that follow.
        right: the columns whose cells end, and do not begin, below each other.
        rule: whether a line is drawn under the head.
    """
    rows = [header, *rows]
    whole = [row if len(row) == len(header) else row[:-1] for row in rows]
    wide = [max(len(row[number]) for row in whole if number < len(row)) for number in range(len(header))]
    lines = []
    for row in rows:
        padded = zip(range(len(row)), row, wide, strict=False)
        cells = [cell.rjust(width) if number in right else cell.ljust(width) for number, cell, width in padded]
        lines.append("  ".join(cells).rstrip())
    drawn = ["-" * (sum(wide) + 2 * len(wide) - 2)] if rule else []
    return "\n".join([lines[0], *drawn, *lines[1:]])


def html_table(caption: str, header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of texts, for notebooks; rows as for `text_table`."""
    head = "".join(f"<th>{html.escape(name)}</th>" for name in header)
    body = "".join(f"<tr>{_html_cells(row, len(header))}</tr>" for row in rows)
    return f"<table><caption>{html.escape(caption)}</caption><tr>{head}</tr>{body}</table>"


def _html_cells(row: Sequence[str], columns: int) -> str:
    spans = [1] * (len(row) - 1) + [columns - len(row) + 1]
    told = ((f' colspan="{span}"' if span > 1 else "", cell) for span, cell in zip(spans, row, strict=True))
    return "".join(f"<td{span}>{html.escape(cell)}</td>" for span, cell in told)


def measured(value: float, error: float = math.nan, sign: str = "") -> str:
    """A number to two digits of its standard error where that is known; a whole one in full; never NaN.

    Args:
        sign: "+" where a rise is to be seen as one.
    """
    if not math.isfinite(value):
        return "not finite"
    if isinstance(value, int):
        return f"{value:{sign},}"
    if not math.isfinite(error) or abs(value) >= _LARGE:
        return f"{value:{sign},.4g}"
    digits = min(6, max(0, 1 - math.floor(math.log10(error)))) if error > 0 else 4
    return f"{value:{sign},.{digits}f} ± {error:,.{digits}f}"
