"""A picture of many models: how good each is, against how large and how fast."""

from __future__ import annotations

import math
from collections.abc import Sequence, Set
from pathlib import Path
from typing import Any

from hf_compress.evaluation.comparison import ComparedMetric
from hf_compress.report.canvas import GREY, INK, new_figure, picture_path, write_figure
from hf_compress.report.measured import Measured

# Okabe and Ito's colours, each with a shape of its own.
_STYLES = (
    ("#0072B2", "o"),
    ("#D55E00", "s"),
    ("#009E73", "^"),
    ("#CC79A7", "D"),
    ("#E69F00", "v"),
    ("#56B4E9", "P"),
    ("#22272E", "X"),
)
_PANELS = ("stored bytes", "parameters", "generated tokens/s")  # as shares of, or times, the original's


def draw_pareto(
    original: Sequence[ComparedMetric], measured: Sequence[Measured], quality: str, front: Set[str], path: str | Path
) -> Path:
    """Draw a panel for each measure of size and speed that was taken.

    Args:
        original: what was measured of the model as it was.
        measured: of the smaller ones; those without metrics are left out.
        quality: the metric that is drawn upwards.
        front: the names of those that are not beaten; in the first panel a line goes through them.
        path: where to write it; PNG or SVG, by its ending.

    Raises:
        ValueError: the ending is neither .png nor .svg.
    """
    path = picture_path(path)
    done = [one for one in measured if one.get(quality) is not None]
    panels = [metric for metric in _PANELS if any(one.get(metric) for one in done)]
    figure = new_figure(1 + 4.2 * len(panels), 4.6)
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axis, metric in zip(axes, panels, strict=True):
        _panel(axis, done, metric, quality, front if metric == _PANELS[0] else set())
        _mark_original(axis, original, quality)
    better = next(row.higher_is_better for row in original if row.metric == quality)
    axes[0].set_ylabel(f"{quality} ({'higher' if better else 'lower'} is better)", parse_math=False)
    if better is False and _spread(done, quality) > 3:
        _logarithmic(axes[0])
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(labels)), frameon=False, fontsize=9)
    return write_figure(figure, path)


def _logarithmic(axis: Any) -> None:
    """Values by their ratios, written as numbers and not as powers."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
    axis.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.yaxis.set_minor_formatter(NullFormatter())


def _panel(axis: Any, done: Sequence[Measured], metric: str, quality: str, front: Set[str]) -> None:
    methods = list(dict.fromkeys(one.methods for one in done if not one.control))
    for number, method in enumerate(methods):
        colour, shape = _STYLES[number % len(_STYLES)]
        own = [one for one in done if one.methods == method and not one.control]
        _points(axis, own, metric, quality, label=method, color=colour, marker=shape, linestyle="")
    controls = [one for one in done if one.control]
    _points(
        axis, controls, metric, quality, label="control: last blocks left out", color=GREY, marker="x", linestyle=""
    )
    best = sorted((one for one in done if one.name in front), key=lambda one: _change(one, metric))
    if len(best) > 1:
        places = [_change(one, metric) for one in best]
        axis.plot(
            places, [_value(one, quality) for one in best], color=INK, linewidth=0.8, label="not beaten", zorder=1
        )
    axis.set_xlabel(f"{metric}, times the original's", parse_math=False)
    axis.grid(color="#EEEEEE")
    axis.set_axisbelow(True)


def _points(axis: Any, some: Sequence[Measured], metric: str, quality: str, **style: Any) -> None:
    """Models as points; the bars are standard errors of the difference to the original, document by document."""
    some = [one for one in some if not math.isnan(_change(one, metric))]
    if not some:
        return
    places, heights = [_change(one, metric) for one in some], [_value(one, quality) for one in some]
    axis.errorbar(places, heights, yerr=[_error(one, quality) for one in some], capsize=2, **style)


def _mark_original(axis: Any, original: Sequence[ComparedMetric], quality: str) -> None:
    value = next(row.value for row in original if row.metric == quality)
    axis.plot([1.0], [value], marker="*", markersize=13, color=INK, linestyle="", label="original")


def _change(one: Measured, metric: str) -> float:
    row = one.get(metric)
    return math.nan if row is None else row.change


def _value(one: Measured, metric: str) -> float:
    row = one.get(metric)
    return math.nan if row is None else row.value


def _error(one: Measured, metric: str) -> float:
    """Of the difference to the original, in the metric's own unit; 0 where it is not known."""
    row = one.get(metric)
    if row is None or math.isnan(row.change_error):
        return 0.0
    return row.change_error * row.value / row.change if row.kind == "ratio" else row.change_error


def _spread(done: Sequence[Measured], metric: str) -> float:
    values = [value for one in done if (value := _value(one, metric)) > 0]
    return max(values) / min(values) if values else 1.0
