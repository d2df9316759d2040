"""What all pictures share: matplotlib's Agg canvas without its global state, colours, and how files are written.

Colours are of Okabe and Ito's palette, which look different to the colour-blind too; what a colour says, a letter or a
shape says as well.
"""

from __future__ import annotations

import html
import io
import re
from pathlib import Path
from typing import Any

INK, GREY, BLUE, VERMILION = "#22272E", "#BFC5CC", "#0072B2", "#D55E00"


def new_figure(width: float, height: float) -> Any:
    """A matplotlib figure of so many inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def picture_path(path: str | Path) -> Path:
    """The path, if it is one that a picture can be written to; ValueError otherwise."""
    path = Path(path)
    if path.suffix.lower() not in (".png", ".svg"):
        raise ValueError(f"plots are written as .png or .svg; got {str(path)!r}")
    return path


def write_figure(figure: Any, path: Path) -> Path:
    """Write a figure to a file, and make the folders around it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=144)
    return path


def inline_svg(figure: Any, label: str, prefix: str) -> str:
    """A figure as an SVG element of a page, with its texts as text and nothing outside it.

    Args:
        label: what it shows, for those who do not see it.
        prefix: of its ids, which no other figure of the page has.
    """
    import matplotlib

    written = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        figure.savefig(written, format="svg", metadata={"Date": None})
    text = written.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    head, rest = re.split(r"(?<=>)", text, maxsplit=1)
    size = re.search(r'viewBox="[^"]*"', head)
    assert size is not None, "matplotlib writes a viewBox"
    rest = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{prefix}-", rest)
    whole = f'<svg {size[0]} role="img" aria-label="{html.escape(label)}">{rest.strip()}'
    return "".join(c if c.isprintable() or c == "\n" else " " for c in whole)  # names in it come from anywhere
