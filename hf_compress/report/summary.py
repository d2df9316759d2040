"""A model's history in a few lines, as text and for notebooks."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from hf_compress.plan.tables import html_table, text_table
from hf_compress.report.markdown import one_line
from hf_compress.report.stages import Size, Stage

COLUMNS = ("", "parameters", "stored bytes", "blocks", "time", "what changed")


def summary_text(stages: Sequence[Stage], base_model: str) -> str:
    """A line for the original and one for each stage, its sizes beside the original's; for `print`."""
    table = text_table(COLUMNS, history_rows(stages), right={1, 2, 3, 4}, rule=False)
    return f"{_title(stages, base_model)}\n{table}"


def summary_html(stages: Sequence[Stage], base_model: str) -> str:
    """The same as a table."""
    return html_table(_title(stages, base_model), COLUMNS, history_rows(stages))


def _title(stages: Sequence[Stage], base_model: str) -> str:
    return f"{one_line(base_model) or 'model'}: {', '.join(one_line(stage.method) for stage in stages)}"


def history_rows(stages: Sequence[Stage]) -> list[tuple[str, ...]]:
    """The cells, as text."""
    first = stages[0].before
    rows: list[tuple[str, ...]] = [("original", *_sizes(first, first), "", "")]
    for number, stage in enumerate(stages, 1):
        seconds = sum(step.seconds for step in stage.steps if math.isfinite(step.seconds))
        rows.append(
            (f"{number}. {one_line(stage.method)}", *_sizes(stage.after, first), f"{seconds:.1f} s", _changes(stage))
        )
    return rows


def _sizes(size: Size, first: Size) -> tuple[str, str, str]:
    """Parameters and bytes, with the change from the original's, and the blocks of each stack."""
    counts = ((size.parameters, first.parameters), (size.bytes, first.bytes))
    changed = size is not first
    parts = [f"{now:,}" + (f" ({100 * (now / then - 1):+.1f}%)" if changed and then else "") for now, then in counts]
    return parts[0], parts[1], " + ".join(str(size.blocks.get(stack, 0)) for stack in first.blocks)


def _changes(stage: Stage) -> str:
    """The edits, by kind, and what was trained."""
    kinds = Counter(one_line(str(edit.get("edit"))) for edit in stage.edits)
    steps = stage.notes.get("steps", stage.notes.get("trained_steps"))
    trained = [f"trained for {steps:,} steps"] if isinstance(steps, int) else []
    return ", ".join([*(f"{count} × {kind}" for kind, count in kinds.items()), *trained]) or "no structure"
