"""What all pictures share: matplotlib's Agg canvas without its global state, colours, and how files are written.

Colours are of Okabe and Ito's palette, which look different to the colour-blind too; what a colour says, a letter or a
shape says as well.
"""

from __future__ import annotations

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
