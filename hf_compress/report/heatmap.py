"""Texts with the relevance of each token as a colour: orange speaks for what is explained, blue against it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hf_compress.attribution.relevance import Relevance
from hf_compress.report.canvas import BLUE, INK, VERMILION, new_figure, picture_path, write_figure
from hf_compress.report.webpage import document, escaped

_ROW = 12  # tokens in a row of a picture
_STYLE = """
.text{line-height:2;margin:.25rem 0 1.5rem}.text span{white-space:pre-wrap;border-radius:.2rem;padding:.15rem .1rem;
box-decoration-break:clone;-webkit-box-decoration-break:clone;print-color-adjust:exact;-webkit-print-color-adjust:exact}
h2{font-size:1rem}
"""

Colour = tuple[float, float, float]  # red, green, blue, from 0 to 1


@dataclass(frozen=True)
class _Text:
    """A text: its tokens with their relevance, and what is explained of it."""

    title: str
    tokens: Sequence[tuple[str, float]]

    @property
    def strongest(self) -> float:
        return max((abs(value) for _, value in self.tokens), default=0.0)


def heatmap(relevance: Relevance, path: str | Path) -> Path:
    """Write the texts that a relevance is of, coloured, as a self-contained page (.html) or a picture (.png, .svg).

    Above each stands what is explained. Colours are relative to the strongest token of each text.

    Raises:
        ValueError: a relevance without words, or a file name of another kind.
    """
    path = Path(path)
    if relevance.tokens is None or not relevance.words:
        raise ValueError("the relevance has no words to show: explain texts, and give hfc.relevance(…, tokenizer=)")
    texts = [
        _Text(
            _title(relevance, number),
            [(word, value) for word, value in zip(words, values, strict=True) if value != 0 or not _is_special(word)],
        )
        for number, (words, values) in enumerate(zip(relevance.words, relevance.tokens.tolist(), strict=True))
    ]
    if path.suffix.lower() != ".html":
        return _draw(texts, _legend(relevance), picture_path(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(_page(texts, _legend(relevance)), encoding="utf-8")
    return path


def _title(relevance: Relevance, number: int) -> str:
    """What is explained of a text, and the logit of it."""
    told = relevance.targets[number] if relevance.targets else "an output"
    return f"Explained: {told} (logit {float(relevance.explained[number]):.2f})"


def _legend(relevance: Relevance) -> str:
    rules = f" Rules: {relevance.composite}." if relevance.composite else ""
    return f"Orange speaks for what is explained, blue against it.{rules}"


def _is_special(word: str) -> bool:
    """Whether a token is one such as [PAD] or <pad>, which are left out where they carry no relevance."""
    return word.strip()[:1] in "[<" and word.strip()[-1:] in "]>" and len(word.strip()) > 2


def _shade(value: float, strongest: float) -> Colour:
    """White at 0, orange at the strongest, blue at minus the strongest."""
    share = min(1.0, abs(value) / strongest) if strongest else 0.0
    full = VERMILION if value > 0 else BLUE
    red, green, blue = (1 - share * (1 - int(full[at : at + 2], 16) / 255) for at in (1, 3, 5))
    return red, green, blue


def _ink(paper: Colour) -> str:
    """Black or white, whichever can be read better: of any paper, one has a contrast of 4.5."""
    lit = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in paper]
    luminance = 0.2126 * lit[0] + 0.7152 * lit[1] + 0.0722 * lit[2]
    return "#000" if (luminance + 0.05) ** 2 > 1.05 * 0.05 else "#fff"


def _page(texts: Sequence[_Text], legend: str) -> str:
    parts = [f'<p class="soft">{escaped(legend)} Point at a token for its relevance.</p>']
    for text in texts:
        spans = []
        for word, value in text.tokens:
            shade = _shade(value, text.strongest)
            colours = f"background:rgb({','.join(str(round(255 * part)) for part in shade)});color:{_ink(shade)}"
            shown = escaped(word).replace("⏎", "⏎<br>")
            spans.append(f'<span style="{colours}" title="{value:.4g}">{shown}</span>')
        parts.append(f'<h2>{escaped(text.title)}</h2><p class="text">{"".join(spans)}</p>')
    return document("Relevance", "".join(parts), _STYLE)


def _draw(texts: Sequence[_Text], legend: str, path: Path) -> Path:
    rows: list[str | list[tuple[str, Colour]]] = [legend]
    for text in texts:
        shaded = [(word.replace("\n", "⏎"), _shade(value, text.strongest)) for word, value in text.tokens]
        rows += [text.title, *(shaded[start : start + _ROW] for start in range(0, len(shaded), _ROW))]
    figure = new_figure(1.1 * _ROW, 0.6 * len(rows) + 0.3)
    axes = figure.add_subplot()
    axes.set_axis_off()
    axes.set(xlim=(0, _ROW), ylim=(-len(rows), 0))
    for number, row in enumerate(rows):
        height = -number - 0.5
        if isinstance(row, str):
            axes.text(0.1, height - 0.15 * bool(number), row, va="center", color=INK, parse_math=False)
            continue
        for place, (word, colour) in enumerate(row):
            look = {"ha": "center", "va": "center", "color": _ink(colour), "parse_math": False}
            axes.text(place + 0.5, height, word, bbox={"facecolor": colour, "edgecolor": "none", "pad": 4}, **look)
    return write_figure(figure, path)
