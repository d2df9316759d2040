"""Pictures of what was measured and done; heatmaps are in cividis, which looks the same to the colour-blind."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hf_compress.report.canvas import BLUE, GREY, INK, VERMILION, new_figure, picture_path, write_figure
from hf_compress.report.stages import Stage

_KEPT, _MERGED, _REMOVED = GREY, BLUE, VERMILION
_STAYS: dict[str, Any] = {"facecolor": _KEPT, "edgecolor": INK}
_GONE: dict[str, Any] = {"facecolor": "white", "edgecolor": _REMOVED, "hatch": "///"}
_STEPS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
_MARKERS = "osD^vP"
_SCORES = {
    "block_influence": "block influence\n(1 − cosine, before and after)",
    "angular_distance": "angle, as a share of π, over\nthe run that begins here",
}


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
    rows = _square(matrix)
    side = min(9.0, 3.2 + 0.32 * len(rows))
    figure = new_figure(side + 0.9, side)
    _heatmap(figure, figure.add_subplot(), rows, merged)
    figure.suptitle(title, fontsize=12, color=INK)
    return write_figure(figure, path)


def plot_stages(stages: Sequence[Stage], path: str | Path, base_model: str = "") -> Path:
    """Draw what the method of a stage measured and which blocks were kept, merged and removed.

    Above, as far as the stage's notes have them: the similarity matrix with the merged blocks framed; every block's
    score; the loss of every candidate at every step; the error that refitting left. Below, the blocks themselves.

    Args:
        stages: of a model's history; the last that has something to draw is drawn.
        path: where to write it; PNG or SVG, by its ending.
        base_model: stands above it.

    Raises:
        ValueError: no stage says anything of blocks, or the ending is neither .png nor .svg.
    """
    path = picture_path(path)
    shown = next((one for one in reversed(stages) if _panels(one) or _changed_stacks(one)), None)
    if shown is None:
        names = ", ".join(repr(one.method) for one in stages)
        raise ValueError(f"the report of {names} has neither scores nor edits of blocks: there is nothing to draw")
    panels, stacks = _panels(shown), _changed_stacks(shown)
    heights = [4.6 if kind == "similarity" else 2.5 for kind, _ in panels] + [0.75] * len(stacks)
    widest = max(shown.before.blocks.values(), default=0)
    figure = new_figure(min(16.0, max(7.0, 2.5 + 0.4 * widest)), sum(heights) + 0.9)
    axes = figure.subplots(len(heights), 1, gridspec_kw={"height_ratios": heights}, squeeze=False)[:, 0]
    for axis, (kind, values) in zip(axes, panels, strict=False):
        _DRAW[kind](figure, axis, values, shown)
    for axis, stack in zip(axes[len(panels) :], stacks, strict=True):
        _strip(axis, shown, stack)
    counts = [f"{shown.before.blocks[stack]} → {shown.after.blocks.get(stack, 0)} blocks" for stack in stacks]
    name = Path(base_model).name or "model"
    figure.suptitle(", ".join([f"{name}: {shown.method}", *counts]), fontsize=12, color=INK)
    return write_figure(figure, path)


# --- what there is to draw --------------------------------------------------------------------------------------------


def _panels(stage: Stage) -> list[tuple[str, Any]]:
    """The panels that the stage's notes have data for, in order from above."""
    notes = stage.notes
    panels: list[tuple[str, Any]] = []
    if "similarity" in notes:
        panels.append(("similarity", _square(notes["similarity"])))
    panels += [("scores", (name, notes[name])) for name in _SCORES if name in notes]
    if steps := [merge for merge in notes.get("merges", []) if "losses" in merge]:
        panels.append(("losses", steps))
    if "greedy" in notes:
        panels.append(("greedy", notes["greedy"]))
    if fits := notes.get("fits"):
        panels.append(("fits", fits))
    return panels


def _changed_stacks(stage: Stage) -> list[str]:
    """The stacks that lost blocks."""
    return [stack for stack in stage.before.blocks if any(edit.get("stack") == stack for edit in stage.edits)]


def _merged_groups(stage: Stage) -> list[list[int]]:
    return [[edit["kept"], *edit["absorbed"]] for edit in stage.edits if edit.get("edit") == "MergeBlocks"]


def _gone(edits: list[dict[str, Any]]) -> set[int]:
    """Blocks that are no more."""
    return {i for edit in edits for i in (*edit.get("blocks", ()), *edit.get("absorbed", ()))}


# --- panels -----------------------------------------------------------------------------------------------------------


def _draw_similarity(figure: Any, axis: Any, rows: list[list[float]], stage: Stage) -> None:
    _heatmap(figure, axis, rows, _merged_groups(stage))
    axis.set_title("similarity; merged blocks are framed", fontsize=10, loc="left", color=INK)


def _heatmap(figure: Any, axis: Any, rows: list[list[float]], merged: Sequence[Sequence[int]]) -> None:
    from matplotlib.patches import Rectangle

    size = len(rows)
    others = [value for i, row in enumerate(rows) for j, value in enumerate(row) if i != j and math.isfinite(value)]
    low = min(others, default=0.0)
    shown = [[math.nan if i == j else value for j, value in enumerate(row)] for i, row in enumerate(rows)]
    axis.set_facecolor("#E3E6EA")  # the diagonal, which is 1 always
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
    ticks = _ticks(size)
    axis.set_xticks(ticks)
    axis.set_yticks(ticks)
    axis.set_xlabel("block")
    axis.set_ylabel("block")
    figure.colorbar(image, ax=axis, label="similarity of different blocks", shrink=0.85)


def _draw_scores(figure: Any, axis: Any, entry: tuple[str, list[float]], stage: Stage) -> None:
    name, values = entry
    gone = _gone(stage.edits)
    _log_if_wide(axis, values)  # so points, not bars: a bar on a logarithmic axis has no foot to stand on
    for out, marker, colour in ((False, "o", _MERGED), (True, "X", _REMOVED)):
        blocks = [index for index in range(len(values)) if (index in gone) is out]
        label = "taken out" if out else "kept"
        axis.plot(blocks, [values[i] for i in blocks], marker, color=colour, markersize=9, label=label)
    if len(values) <= 24:
        for index, value in enumerate(values):
            axis.annotate(f"{value:.3g}", (index, value), (0, 8), textcoords="offset points", ha="center", fontsize=8)
    axis.margins(y=0.2)
    _finish(axis, len(values), _SCORES[name])
    axis.legend(fontsize=8, frameon=False, loc="upper right", ncols=2)


def _draw_losses(figure: Any, axis: Any, steps: list[dict[str, Any]], stage: Stage) -> None:
    every = [loss for step in steps for loss in step["losses"].values()]
    for number, step in enumerate(steps):
        colour, marker = _STEPS[number % len(_STEPS)], _MARKERS[number % len(_MARKERS)]
        losses = {int(index): loss for index, loss in step["losses"].items()}
        blocks = sorted(losses)
        axis.plot(
            blocks,
            [losses[block] for block in blocks],
            color=colour,
            marker=marker,
            markersize=4.5,
            linewidth=1,
            alpha=0.85,
            label=f"step {number + 1}: block {step['absorbed']}",
        )
        chosen = step["absorbed"]
        axis.plot(chosen, losses[chosen], "o", markersize=12, markerfacecolor="none", markeredgecolor=colour, mew=2)
    _finish(axis, stage.before.blocks.get(_only_stack(stage), len(every)), "loss when this block is\nabsorbed (nats)")
    _log_if_wide(axis, every)
    axis.legend(fontsize=8, frameon=False, loc="upper right", title="taken (ringed)", title_fontsize=8)


def _draw_greedy(figure: Any, axis: Any, steps: list[dict[str, Any]], stage: Stage) -> None:
    for number, step in enumerate(steps):
        axis.plot(number, step["loss"], "X", color=_REMOVED, markersize=9)
    axis.set_xticks(range(len(steps)), [f"block {step['removed']}" for step in steps])
    axis.set_xlabel("taken out, in this order")
    axis.set_ylabel("loss afterwards (nats)")
    _despine(axis)


def _draw_fits(figure: Any, axis: Any, fits: list[dict[str, Any]], stage: Stage) -> None:
    for fit in fits:
        axis.bar(fit["block"], fit["error"], width=0.7, color=_MERGED if fit["absorbed"] else _KEPT, edgecolor=INK)
    axis.axhline(1, color=INK, linewidth=0.8, linestyle="--")
    _finish(axis, stage.before.blocks.get(_only_stack(stage), len(fits)), "error after solving\n(1 = without)")
    axis.set_ylim(0, 1.05)
    _legend_above(axis, {"absorbed the next": {"facecolor": _MERGED}, "corrected": _STAYS})


def _strip(axis: Any, stage: Stage, stack: str) -> None:
    """The blocks of a stack as boxes: kept, made of several, taken out."""
    from matplotlib.patches import Rectangle

    total = stage.before.blocks[stack]
    edits = [edit for edit in stage.edits if edit.get("stack") == stack]
    gone = _gone(edits)
    merged = {edit["kept"]: edit["absorbed"] for edit in edits if "kept" in edit}
    for index in range(total):
        look: dict[str, Any] = _GONE if index in gone else {"color": _MERGED if index in merged else _KEPT}
        axis.add_patch(Rectangle((index - 0.42, 0), 0.84, 1, linewidth=1.2, **look))
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
    axis.set_title(f"{stack} ({', '.join(words)})", fontsize=9, loc="left", color=INK)


_DRAW: dict[str, Callable[[Any, Any, Any, Stage], None]] = {
    "similarity": _draw_similarity,
    "scores": _draw_scores,
    "losses": _draw_losses,
    "greedy": _draw_greedy,
    "fits": _draw_fits,
}


# --- common -----------------------------------------------------------------------------------------------------------


def _only_stack(stage: Stage) -> str:
    return next((edit["stack"] for edit in stage.edits if "stack" in edit), "")


def _finish(axis: Any, blocks: int, label: str) -> None:
    axis.set_xticks(_ticks(blocks))
    axis.set_xlim(-0.6, blocks - 0.4)
    axis.set_xlabel("block")
    axis.set_ylabel(label)
    _despine(axis)


def _despine(axis: Any) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", color="#E3E6EA", linewidth=0.8)
    axis.set_axisbelow(True)


def _log_if_wide(axis: Any, values: Sequence[float]) -> None:
    """A logarithmic axis where the values differ more than tenfold, so that the small ones can be told apart."""
    if values and min(values) > 0 and max(values) > 10 * min(values):
        axis.set_yscale("log")


def _legend_above(axis: Any, looks: dict[str, dict[str, Any]]) -> None:
    from matplotlib.patches import Patch

    handles = [Patch(label=name, **look) for name, look in looks.items()]
    axis.legend(handles=handles, fontsize=8, frameon=False, loc="lower right", bbox_to_anchor=(1, 0.97), ncols=2)


def _ticks(size: int) -> range:
    return range(0, size, max(1, math.ceil(size / 32)))


def _square(matrix: Any) -> list[list[float]]:
    rows = [[float(value) for value in row] for row in matrix]
    if not rows or any(len(row) != len(rows) for row in rows):
        raise ValueError(
            f"a similarity matrix must be square; got {len(rows)} rows of {[len(row) for row in rows][:4]}"
        )
    return rows
