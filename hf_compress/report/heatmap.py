"""Texts with the relevance of each token as a colour: red speaks for what is explained, blue against it."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path

from hf_compress.attribution.relevance import Relevance
from hf_compress.report.canvas import new_figure, picture_path, write_figure

_ROW = 12  # tokens in a row of a picture
_STYLE = (
    "body{font:16px/1.8 sans-serif;max-width:50em;margin:2em auto;color:#111;background:#fff}span{white-space:pre-wrap}"
)


def heatmap(relevance: Relevance, path: str | Path) -> Path:
    """Write the texts that a relevance is of, coloured, as a self-contained page (.html) or a picture (.png, .svg).

    Colours are relative to the strongest token of each text.

    Raises:
        ValueError: a relevance without words, or a file name of another kind.
    """
    path = Path(path)
    if relevance.tokens is None or not relevance.words:
        raise ValueError("the relevance has no words to show: explain texts, and give hfc.relevance(…, tokenizer=)")
    rows = [
        [(word, value) for word, value in zip(words, values, strict=True) if value != 0 or not _is_special(word)]
        for words, values in zip(relevance.words, relevance.tokens.tolist(), strict=True)
    ]
    if path.suffix.lower() != ".html":
        return _draw(rows, picture_path(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(_page(rows), encoding="utf-8")
    return path


def _is_special(word: str) -> bool:
    """Whether a token is one such as [PAD] or <pad>, which are left out where they carry no relevance."""
    return word.strip()[:1] in "[<" and word.strip()[-1:] in "]>" and len(word.strip()) > 2


def _shade(value: float, strongest: float) -> tuple[float, float, float]:
    """White at 0, red at the strongest, blue at minus the strongest."""
    share = min(1.0, abs(value) / strongest) if strongest else 0.0
    return (1.0, 1 - share, 1 - share) if value > 0 else (1 - share, 1 - share, 1.0)


def _page(rows: Sequence[Sequence[tuple[str, float]]]) -> str:
    texts = []
    for row in rows:
        strongest = max((abs(value) for _, value in row), default=0.0)
        spans = []
        for word, value in row:
            colour = ",".join(str(round(255 * part)) for part in _shade(value, strongest))
            shown = html.escape(word).replace("\n", "⏎<br>")
            spans.append(f'<span style="background:rgb({colour})" title="{value:.4g}">{shown}</span>')
        texts.append(f"<p>{''.join(spans)}</p>")
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Relevance</title><style>{_STYLE}</style>'
        "<p>Red speaks for what is explained, blue against it; point at a token for its relevance.</p>"
        f"{''.join(texts)}</html>\n"
    )


def _draw(rows: Sequence[Sequence[tuple[str, float]]], path: Path) -> Path:
    lines: list[list[tuple[str, tuple[float, float, float]]]] = []
    for row in rows:
        strongest = max((abs(value) for _, value in row), default=0.0)
        shaded = [(word.replace("\n", "⏎"), _shade(value, strongest)) for word, value in row]
        lines += [shaded[start : start + _ROW] for start in range(0, len(shaded), _ROW)]
    figure = new_figure(1.1 * _ROW, 0.6 * len(lines) + 0.3)
    axes = figure.add_subplot()
    axes.set_axis_off()
    axes.set(xlim=(0, _ROW), ylim=(-len(lines), 0))
    for number, line in enumerate(lines):
        for place, (word, colour) in enumerate(line):
            box = {"facecolor": colour, "edgecolor": "none", "pad": 4}
            axes.text(place + 0.5, -number - 0.5, word, ha="center", va="center", bbox=box, parse_math=False)
    return write_figure(figure, path)
