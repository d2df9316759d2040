"""Single axes of pictures: heatmaps, values block by block, curves, stacks of blocks as boxes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hf_compress.report.canvas import BLUE, GREY, INK, VERMILION

COLOURS = (BLUE, "#E69F00", "#009E73", "#CC79A7", "#56B4E9", VERMILION)
_MARKERS = "osD^vP"
_KEPT, _MERGED, _REMOVED = GREY, BLUE, VERMILION
_GONE: dict[str, Any] = {"facecolor": "white", "edgecolor": _REMOVED, "hatch": "///"}
_GRID = "#E3E6EA"
_LABELLED = 24  # values that are written beside their points


@dataclass(frozen=True)
class Series:
    """Values by block, or by step, under one name; `look` is what matplotlib draws them with."""

    label: str
    values: Mapping[int, float]
    look: Mapping[str, Any]


def look(number: int, **more: Any) -> dict[str, Any]:
    """The colour and marker of the series of a number, the same again after 36."""
    marker = _MARKERS[(number + number // len(COLOURS)) % len(_MARKERS)]
    return {"color": COLOURS[number % len(COLOURS)], "marker": marker} | more


STAYS: dict[str, Any] = {"color": BLUE, "marker": "o", "markersize": 9}
GOES: dict[str, Any] = {"color": VERMILION, "marker": "X", "markersize": 9}


def draw_blocks(axis: Any, series: Sequence[Series], total: int, label: str, *, lines: bool = False) -> None:
    """Values of a stack's blocks; as points, for a bar on a logarithmic axis has no foot to stand on."""
    every = [value for one in series for value in one.values.values()]
    _log_if_wide(axis, every)
    for one in series:
        style = {"linestyle": "-" if lines else "none", "label": one.label, **one.look}
        blocks = sorted(one.values)
        axis.plot(blocks, [one.values[block] for block in blocks], **style)
        for block in blocks if len(every) <= _LABELLED and not lines else ():
            text, place = f"{one.values[block]:.3g}", (block, one.values[block])
            axis.annotate(text, place, (0, 8), textcoords="offset points", ha="center", fontsize=8)
    axis.margins(y=0.2)
    last = max((block for one in series for block in one.values), default=-1)
    _finish(axis, max(total, last + 1), label)
    _legend_above(axis)


def draw_curves(axis: Any, curves: Mapping[str, tuple[Sequence[Any], Sequence[float]]], x: str, y: str) -> None:
    """A line for each name, of what it has at each step."""
    for number, (name, (steps, values)) in enumerate(curves.items()):
        axis.plot(steps, values, color=COLOURS[number % len(COLOURS)], linewidth=1.2, label=name)
    axis.set_xlabel(x)
    axis.set_ylabel(y)
    _legend_above(axis)
    _despine(axis)


def draw_bars(axis: Any, values: Mapping[str, float], label: str) -> None:
    """A bar for each name."""
    axis.bar(range(len(values)), list(values.values()), width=0.6, color=_KEPT, edgecolor=INK)
    axis.set_xticks(range(len(values)), list(values), parse_math=False)
    axis.set_ylabel(label)
    _despine(axis)


def draw_heatmap(figure: Any, axis: Any, rows: list[list[float]], merged: Sequence[Sequence[int]]) -> None:
    """A similarity matrix, with groups of blocks framed."""
    from matplotlib.patches import Rectangle

    size = len(rows)
    others = [value for i, row in enumerate(rows) for j, value in enumerate(row) if i != j and math.isfinite(value)]
    low = min(others, default=0.0)
    shown = [[math.nan if i == j else value for j, value in enumerate(row)] for i, row in enumerate(rows)]
    axis.set_facecolor(_GRID)  # the diagonal, which is 1 always
    image = axis.imshow(shown, cmap="cividis", vmin=low, vmax=max(max(others, default=1.0), low + 1e-9))
    if size <= 16:
        middle = (low + max(others, default=1.0)) / 2
        for i, row in enumerate(rows):
            for j, value in enumerate(row):
                text = "" if i == j else f"{value:.2f}".removeprefix("0")
                axis.text(
                    j, i, text, ha="center", va="center", fontsize=7, color="white" if value < middle else "black"
                )
    for group in merged:
        first, last = min(group), max(group)
        corner, side = (first - 0.5, first - 0.5), last - first + 1
        axis.add_patch(Rectangle(corner, side, side, fill=False, edgecolor=_REMOVED, linewidth=2.5))
    axis.set_xticks(_ticks(size))
    axis.set_yticks(_ticks(size))
    axis.set_xlabel("block")
    axis.set_ylabel("block")
    figure.colorbar(image, ax=axis, label="similarity of different blocks", shrink=0.85)


def draw_stack(axis: Any, stack: str, total: int, gone: set[int], merged: Mapping[int, Sequence[int]]) -> None:
    """The blocks of a stack as boxes: kept, made of several, taken out."""
    from matplotlib.patches import Rectangle

    for index in range(total):
        style: dict[str, Any] = _GONE if index in gone else {"color": _MERGED if index in merged else _KEPT}
        axis.add_patch(Rectangle((index - 0.42, 0), 0.84, 1, linewidth=1.2, **style))
        if total <= 48:
            ink = "white" if index in merged else INK
            box = {"facecolor": "white", "edgecolor": "none", "pad": 1} if index in gone else None
            axis.text(index, 0.5, str(index), ha="center", va="center", fontsize=8, color=ink, bbox=box)
    for kept, absorbed in merged.items():
        arrow = {"arrowstyle": "-|>", "color": INK, "shrinkA": 0, "shrinkB": 0, "linewidth": 1.2}
        axis.annotate("", xy=(kept, 1.28), xytext=(max(absorbed) + 0.4, 1.28), arrowprops=arrow, annotation_clip=False)
    axis.set_xlim(-0.6, total - 0.4)
    axis.set_ylim(-0.05, 1.45)
    axis.axis("off")
    words = ["grey: kept"] + ["blue: absorbed those under the arrow"] * bool(merged) + ["hatched: taken out"]
    axis.set_title(f"{stack} ({', '.join(words)})", fontsize=9, loc="left", color=INK, parse_math=False)


def _finish(axis: Any, blocks: int, label: str) -> None:
    axis.set_xticks(_ticks(blocks))
    axis.set_xlim(-0.6, blocks - 0.4)
    axis.set_xlabel("block")
    axis.set_ylabel(label)
    _despine(axis)


def _despine(axis: Any) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", color=_GRID, linewidth=0.8)
    axis.set_axisbelow(True)


def _legend_above(axis: Any) -> None:
    axis.legend(fontsize=8, frameon=False, loc="lower right", bbox_to_anchor=(1, 0.97), ncols=7, columnspacing=1)


def _log_if_wide(axis: Any, values: Sequence[float]) -> None:
    """A logarithmic axis where the values differ more than tenfold, so that the small ones can be told apart."""
    if values and min(values) > 0 and max(values) > 10 * min(values):
        axis.set_yscale("log")


def _ticks(size: int) -> range:
    return range(0, size, max(1, math.ceil(size / 32)))
