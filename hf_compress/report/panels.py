"""What there is to draw of a stage: a panel for each thing that its notes and edits tell."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from hf_compress.report.axes import (
    GOES,
    STAYS,
    Series,
    draw_bars,
    draw_blocks,
    draw_curves,
    draw_heatmap,
    draw_stack,
    look,
)
from hf_compress.report.canvas import INK
from hf_compress.report.stages import Stage

_BLOCK = re.compile(r"\.(\d+)\.(?:.*\.)?(\w+)$")  # in a map's path: its block's index, and its name
_SCORES = {
    "block_influence": "block influence\n(1 − cosine, before and after)",
    "angular_distance": "angle, as a share of π, over\nthe run that begins here",
    "relevance": "relevance of what the\nblock writes",
}


@dataclass(frozen=True)
class Panel:
    """A part of a picture: its height in inches, and what draws it on a figure's axes."""

    height: float
    draw: Callable[[Any, Any], None]


def panels_of(stage: Stage) -> list[Panel]:
    """The panels that a stage has data for, in order from above; none where it tells of no blocks."""
    found = [panel for name, make in _PANELS.items() if name in stage.notes for panel in make(stage)]
    return found + [_stack(stage, stack) for stack in changed_stacks(stage)]


def sizes_panel(stages: Sequence[Stage]) -> Panel:
    """The stored bytes of the original and of what each stage has left, for a history that tells of nothing else."""
    sizes = {"original": stages[0].before.bytes / 1e6}
    sizes |= {f"{number}. {stage.method}": stage.after.bytes / 1e6 for number, stage in enumerate(stages, 1)}
    return Panel(3.0, lambda figure, axis: draw_bars(axis, sizes, "stored (MB)"))


def changed_stacks(stage: Stage) -> list[str]:
    """The stacks that lost blocks."""
    return [stack for stack in stage.before.blocks if any(edit.get("stack") == stack for edit in stage.edits)]


def square(matrix: Any) -> list[list[float]]:
    """A matrix as lists; ValueError where it is not square."""
    rows = [[float(value) for value in row] for row in matrix]
    if not rows or any(len(row) != len(rows) for row in rows):
        raise ValueError(
            f"a similarity matrix must be square; got {len(rows)} rows of {[len(row) for row in rows][:4]}"
        )
    return rows


def _blocks(stage: Stage, label: str, *series: Series, lines: bool = False) -> Panel:
    stacks = changed_stacks(stage) or list(stage.before.blocks)
    total = stage.before.blocks[stacks[0]] if len(stacks) == 1 else 0
    shown = [one for one in series if one.values]
    return Panel(2.5, lambda figure, axis: draw_blocks(axis, shown, total, label, lines=lines))


def _gone(edits: Sequence[dict[str, Any]]) -> set[int]:
    """Blocks that are no more."""
    return {i for edit in edits for i in (*edit.get("blocks", ()), *edit.get("absorbed", ()))}


def _stack(stage: Stage, stack: str) -> Panel:
    edits = [edit for edit in stage.edits if edit.get("stack") == stack]
    gone, merged = _gone(edits), {edit["kept"]: edit["absorbed"] for edit in edits if "kept" in edit}
    return Panel(0.75, lambda figure, axis: draw_stack(axis, stack, stage.before.blocks[stack], gone, merged))


# --- one function for each note ---------------------------------------------------------------------------------------


def _similarity(stage: Stage) -> Iterator[Panel]:
    rows = square(stage.notes["similarity"])
    merged = [[edit["kept"], *edit["absorbed"]] for edit in stage.edits if edit.get("edit") == "MergeBlocks"]

    def draw(figure: Any, axis: Any) -> None:
        draw_heatmap(figure, axis, rows, merged)
        axis.set_title("similarity; merged blocks are framed", fontsize=10, loc="left", color=INK)

    yield Panel(4.6, draw)


def _scores(name: str, stage: Stage) -> Iterator[Panel]:
    values, gone = dict(enumerate(stage.notes[name])), _gone(stage.edits)
    kept = Series("kept", {block: value for block, value in values.items() if block not in gone}, STAYS)
    out = Series("taken out", {block: value for block, value in values.items() if block in gone}, GOES)
    yield _blocks(stage, _SCORES[name], kept, out)


def _merges(stage: Stage) -> Iterator[Panel]:
    """The loss of every candidate at every step, what was taken ringed."""
    series: list[Series] = []
    for number, step in enumerate(merge for merge in stage.notes["merges"] if "losses" in merge):
        losses, chosen = {int(block): loss for block, loss in step["losses"].items()}, step["absorbed"]
        style = look(number, markersize=4.5, linewidth=1, alpha=0.85)
        ring = look(number, marker="o", markersize=12, fillstyle="none", markeredgewidth=2)
        series.append(Series(f"step {number + 1}: block {chosen} (ringed)", losses, style))
        series.append(Series("_ring", {chosen: losses[chosen]}, ring))
    if series:
        yield _blocks(stage, "loss when this block is\nabsorbed (nats)", *series, lines=True)


def _greedy(stage: Stage) -> Iterator[Panel]:
    losses = {str(step["removed"]): step["loss"] for step in stage.notes["greedy"]}
    curve, words = (
        {"loss": ([*losses], [*losses.values()])},
        ("block taken out, in this order", "loss afterwards (nats)"),
    )
    yield Panel(2.5, lambda figure, axis: draw_curves(axis, curve, *words))


def _fits(stage: Stage) -> Iterator[Panel]:
    fits = stage.notes["fits"]
    absorbed = Series("absorbed the next", {fit["block"]: fit["error"] for fit in fits if fit["absorbed"]}, STAYS)
    others = Series("corrected", {fit["block"]: fit["error"] for fit in fits if not fit["absorbed"]}, look(1))
    if fits:
        yield _blocks(stage, "error after solving\n(1 = without)", absorbed, others)


def _collapsed(stage: Stage) -> Iterator[Panel]:
    """R² of the linear map for each FFN, when it was last fitted; where FFNs were trained, their α."""
    steps = stage.notes["collapsed"]
    for name, label in (("r2", "R² of the linear map\nfor the FFN"), ("alpha", "α of the activation\n(1 = linear)")):
        fitted: dict[int, float] = {}
        for step in steps:
            told = step.get(name, {})
            known = told if isinstance(told, dict) else {step["block"]: told}
            fitted |= {int(block): value for block, value in known.items()}
        done = {step["block"] for step in steps}
        goes = Series("collapsed", {block: value for block, value in fitted.items() if block in done}, GOES)
        stays = Series("stays", {block: value for block, value in fitted.items() if block not in done}, STAYS)
        if fitted:
            yield _blocks(stage, label, stays, goes)


def _narrowed(stage: Stage) -> Iterator[Panel]:
    """How wide parts are, and the error that solving for what reads them has left."""
    for name, label in (("width", "units or heads kept"), ("error", "error after solving\n(share of the energy)")):
        parts: dict[str, dict[int, float]] = {}
        for told in stage.notes["blocks"]:
            if name in told:
                parts.setdefault(told.get("part", "FFN"), {})[told["block"]] = told[name]
        if parts:
            series = [Series(part, values, look(number)) for number, (part, values) in enumerate(parts.items())]
            yield _blocks(stage, label, *series)


def _linears(stage: Stage) -> Iterator[Panel]:
    """The share of weights kept and the bits of those, by block and map; experts of a block in the mean."""
    for label, figure_of in (("share of weights kept", _kept), ("bits a weight,\nwithout steps", _bits)):
        maps: dict[str, dict[int, list[float]]] = {}
        for told in stage.notes["linears"]:
            place, value = _BLOCK.search(told["linear"]), figure_of(told)
            if place is not None and value is not None:
                maps.setdefault(place[2], {}).setdefault(int(place[1]), []).append(value)
        means = [{block: sum(found) / len(found) for block, found in blocks.items()} for blocks in maps.values()]
        if means:
            series = [Series(name, found, look(n)) for n, (name, found) in enumerate(zip(maps, means, strict=True))]
            yield _blocks(stage, label, *series, lines=True)


def _kept(told: dict[str, Any]) -> float | None:
    return told.get("kept")


def _bits(told: dict[str, Any]) -> float | None:
    groups = {int(bits): count for bits, count in told.get("groups", {}).items()}
    return sum(bits * count for bits, count in groups.items()) / sum(groups.values()) if groups else None


def _bottlenecks(stage: Stage) -> Iterator[Panel]:
    """What bottlenecks explained while they learned, and the features that they were left with."""
    places = {int(block): told for block, told in stage.notes["bottlenecks"].items()}
    curves = {f"block {block}": told.get("curve", {}) for block, told in places.items()}
    explained = {
        name: (curve["step"], [1 - error for error in curve["error"]])
        for name, curve in curves.items()
        if curve.get("step")
    }
    if explained:
        yield Panel(2.5, lambda figure, axis: draw_curves(axis, explained, "step", "share of the variance\nexplained"))
    retention = {name: (curve["step"], curve["retention"]) for name, curve in curves.items() if curve.get("retention")}
    if retention:
        yield Panel(2.5, lambda figure, axis: draw_curves(axis, retention, "step", "retention"))
    kept = Series("kept", {block: told["features"] for block, told in places.items()}, STAYS)
    given = Series("of", {block: told["of"] for block, told in places.items()}, look(1))
    yield _blocks(stage, "features", kept, given)


_PANELS: dict[str, Callable[[Stage], Iterator[Panel]]] = {
    "similarity": _similarity,
    **{name: partial(_scores, name) for name in _SCORES},
    "merges": _merges,
    "greedy": _greedy,
    "fits": _fits,
    "collapsed": _collapsed,
    "blocks": _narrowed,
    "linears": _linears,
    "bottlenecks": _bottlenecks,
}
