"""Pictures of what was measured and done; heatmaps are in cividis, which looks the same to the colour-blind."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hf_compress.report.axes import draw_heatmap
from hf_compress.report.canvas import INK, inline_svg, new_figure, picture_path, write_figure
from hf_compress.report.panels import Panel, changed_stacks, panels_of, sizes_panel, square
from hf_compress.report.stages import Stage


def plot_similarity(
    matrix: Sequence[Sequence[float]] | Any,
    path: str | Path,
    title: str = "Similarity of the blocks",
    merged: Sequence[Sequence[int]] = (),
) -> Path:
    """Draw a similarity matrix as a heatmap.

    Args:
        matrix: (blocks, blocks), nested lists or a tensor, entries in [0, 1].
        path: where to write it; PNG or SVG, by its ending.
        title: stands above it.
        merged: groups of blocks that became one, which are framed.

    Returns:
        The path.

    Raises:
        ValueError: the matrix is not square, or the ending is neither .png nor .svg.
    """
    path = picture_path(path)
    rows = square(matrix)
    side = min(9.0, 3.2 + 0.32 * len(rows))
    figure = new_figure(side + 0.9, side)
    draw_heatmap(figure, figure.add_subplot(), rows, merged)
    figure.suptitle(title, fontsize=12, color=INK, parse_math=False)
    return write_figure(figure, path)


def plot_stages(stages: Sequence[Stage], path: str | Path, base_model: str = "") -> Path:
    """Draw what the method of a stage measured, and what became of the blocks.

    The panels are those that the stage's notes and edits have data for: similarities, scores and losses of blocks,
    errors after solving, widths, R² of FFNs, bits and sparsity of linear maps, curves of bottlenecks, and the blocks
    themselves. Where no stage tells of any, the sizes of the model are drawn, stage by stage.

    Args:
        stages: of a model's history; the last that has something to draw is drawn.
        path: where to write it; PNG or SVG, by its ending.
        base_model: stands above it.

    Raises:
        ValueError: the ending is neither .png nor .svg.
    """
    path = picture_path(path)
    shown = next((one for one in reversed(stages) if panels_of(one)), stages[-1])
    return write_figure(_figure(shown, panels_of(shown) or [sizes_panel(stages)], base_model), path)


def stage_svg(stage: Stage, prefix: str, base_model: str = "") -> str:
    """The same of one stage, as an SVG element of a page; empty where it has nothing to draw.

    Args:
        prefix: of the ids in it, which no other figure of the page has.
    """
    panels = panels_of(stage)
    label = f"What {stage.method} measured of the blocks, and what became of them"
    return inline_svg(_figure(stage, panels, base_model), label, prefix) if panels else ""


def _figure(stage: Stage, panels: Sequence[Panel], base_model: str) -> Any:
    """A stage's panels, one below the other."""
    heights = [panel.height for panel in panels]
    widest = max(stage.before.blocks.values(), default=0)
    figure = new_figure(min(16.0, max(7.0, 2.5 + 0.4 * widest)), sum(heights) + 0.9)
    axes = figure.subplots(len(heights), 1, gridspec_kw={"height_ratios": heights}, squeeze=False)[:, 0]
    for axis, panel in zip(axes, panels, strict=True):
        panel.draw(figure, axis)
    counts = [f"{stage.before.blocks[s]} → {stage.after.blocks.get(s, 0)} blocks" for s in changed_stacks(stage)]
    name = Path(base_model).name or "model"
    figure.suptitle(", ".join([f"{name}: {stage.method}", *counts]), fontsize=12, color=INK, parse_math=False)
    return figure
