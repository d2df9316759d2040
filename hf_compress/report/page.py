"""A model's history as one page: what was done in each stage, what it cost, what was found, and what was measured."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_compress.plan.tables import measured
from hf_compress.report.card_history import amounts, source
from hf_compress.report.edits import bits_of, decisions, in_rows
from hf_compress.report.markdown import human_bytes, in_words, json_values, one_line, public
from hf_compress.report.plots import stage_svg
from hf_compress.report.stages import Stage
from hf_compress.report.summary import COLUMNS, history_rows
from hf_compress.report.webpage import bar, boxes, document, escaped, table

EVALUATION_FILE = "evaluation.json"  # as `evaluate` calls it

_MOST_ROWS = 2000  # of a table; the report itself has every edit
_MOST_LETTERS = 20_000  # of a note
_STYLE = """
nav{margin-top:1rem}summary{cursor:pointer}
details{margin:.35rem 0}pre{background:var(--panel);border-radius:.4rem;padding:.6rem .8rem;margin:.35rem 0;
font-size:.8rem;white-space:pre-wrap;max-height:24rem;overflow:auto}
.plot{background:#fff;color-scheme:light;border-radius:.4rem;padding:.5rem;max-height:none}
.plot svg{display:block;height:auto;min-width:42rem;width:100%;max-width:60rem;margin:0 auto}
@media print{pre{max-height:none}.plot svg{min-width:0}}
"""


def report_page(
    stages: Sequence[Stage], base_model: str, name: str, evaluation: Mapping[str, Any] | None = None
) -> str:
    """The page, with nothing outside it.

    Args:
        stages: of the history, the first one first; at least one.
        base_model: where the original came from.
        name: of the model.
        evaluation: what `evaluate` measured of it, as `read_evaluation` gives it.
    """
    first, last = stages[0].before, stages[-1].after
    figures = {
        "stored": f"{human_bytes(last.bytes)}{_change(last.bytes, first.bytes)}",
        "parameters": f"{last.parameters:,}{_change(last.parameters, first.parameters)}",
        "blocks": " + ".join(f"{last.blocks.get(stack, 0)} of {count}" for stack, count in first.blocks.items()),
        "time": f"{sum(_seconds(stage) for stage in stages):.1f} s",
    }
    links = [("history", "History")] + [(f"stage{n}", f"{n}. {stage.method}") for n, stage in enumerate(stages, 1)]
    links += [("evaluation", "Evaluation")] if evaluation is not None else []
    nav = "".join(f'<a href="#{place}">{escaped(one_line(title))}</a>' for place, title in links)
    origin = one_line(public(base_model)) or "a model of unknown origin"
    body = [
        f'<p class="soft">Made from {escaped(origin)} with hf_compress.</p>{boxes(figures)}<nav>{nav}</nav>',
        f'<section id="history"><h2>History</h2>{_history(stages)}</section>',
        *(_stage(stage, number, origin) for number, stage in enumerate(stages, 1)),
        "" if evaluation is None else _evaluation(evaluation),
    ]
    return document(f"{one_line(public(name))}: what was done to it", "".join(body), _STYLE, tables=True, pictures=True)


def read_evaluation(folder: Path) -> dict[str, Any] | None:
    """What lies beside a model of what `evaluate` measured; None where nothing does.

    Raises:
        ValueError: what lies there is something else.
    """
    path = folder / EVALUATION_FILE
    if not path.is_file():
        return None
    try:
        data = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{path} is no JSON ({one_line(str(error))}): move it away, or evaluate the model again"
        ) from None
    if not isinstance(data, dict) or not isinstance(data.get("scores"), list):
        raise ValueError(f"{path} is not what evaluate() writes: move it away, or evaluate the model again")
    return data


def _history(stages: Sequence[Stage]) -> str:
    return table(COLUMNS, [[escaped(cell) for cell in row] for row in history_rows(stages)], numbers=(1, 2, 3, 4))


def _change(now: int, then: int) -> str:
    return f" ({100 * (now / then - 1):+.1f}%)" if then else ""


def _seconds(stage: Stage) -> float:
    return sum(step.seconds for step in stage.steps if math.isfinite(step.seconds))


# --- a stage ----------------------------------------------------------------------------------------------------------


def _stage(stage: Stage, number: int, origin: str) -> str:
    paper = f'<p class="soft"><a href="{escaped(stage.paper)}">{escaped(stage.paper)}</a></p>' if stage.paper else ""
    told = "".join(f"<p>{escaped(line)}</p>" for line in decisions(stage.edits)[:_MOST_ROWS])
    parts = {
        "": paper + told,
        "Blocks": _plot(stage, number, origin),
        "Bits": _bits(stage),
        "Edits": _edits(stage),
        "Settings": _settings(stage),
        "Time": _steps(stage),
        "Notes": "".join(_note(key, value) for key, value in stage.notes.items()),
        "Made with": _circumstances(stage),
    }
    told = "".join((f"<h3>{title}</h3>" if title else "") + part for title, part in parts.items() if part)
    return f'<section id="stage{number}"><h2>{number}. {escaped(one_line(stage.method))}</h2>{told}</section>'


def _plot(stage: Stage, number: int, origin: str) -> str:
    try:
        svg = stage_svg(stage, f"plot{number}", origin)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError):  # a report may come from anywhere
        return "<p>The notes of this stage are not such as can be drawn.</p>"
    return f'<div class="box plot">{svg}</div>' if svg else ""


def _bits(stage: Stage) -> str:
    bits = bits_of(stage.edits)
    if bits is None:
        return ""
    tallest = max(bits.weights.values())
    rows = [
        [str(width), f"{count:,}", f"{100 * count / bits.total:.1f}%", bar(count / tallest)]
        for width, count in bits.weights.items()
    ]
    told = f"<p>{bits.maps:,} linear maps: {escaped(bits.describe())}.</p>"
    return told + table(["bits", "weights", "share", ""], rows, numbers=(0, 1, 2))


def _edits(stage: Stage) -> str:
    rows = [[escaped(cell) for cell in row] for row in in_rows(stage.edits)]
    if not rows:
        return ""
    more = f'<p class="soft">And {len(rows) - _MOST_ROWS:,} more lines.</p>' if len(rows) > _MOST_ROWS else ""
    counted = '<p class="soft">Blocks are counted from 0, as before this change.</p>'
    return table(["edit", "where", "what"], rows[:_MOST_ROWS]) + more + counted


def _settings(stage: Stage) -> str:
    rows = [[escaped(one_line(key)), escaped(in_words(value))] for key, value in stage.config.items()]
    return table(["setting", "value"], rows) if rows else ""


def _steps(stage: Stage) -> str:
    steps = [(step.name, step.seconds) for step in stage.steps if math.isfinite(step.seconds)]
    longest = max((seconds for _, seconds in steps), default=0.0) or 1.0
    rows = [[escaped(one_line(name)), f"{seconds:.1f}", bar(seconds / longest)] for name, seconds in steps]
    return table(["step", "seconds", ""], rows, numbers=(1,)) if rows else ""


def _note(key: str, value: Any) -> str:
    """What a method has found out: in a few words if it is little, else behind a line that opens it."""
    name, brief = escaped(one_line(key)), escaped(in_words(value))
    if not isinstance(value, (Mapping, list, tuple)):
        return f"<p>{name}: {brief}</p>"
    text = json.dumps(json_values(value), indent=1, ensure_ascii=False)
    if len(text) > _MOST_LETTERS:
        text = f"{text[:_MOST_LETTERS]}\n… and {len(text) - _MOST_LETTERS:,} letters more"
    lines = "\n".join(map(escaped, text.splitlines()))
    count = f"{len(value):,} entries"
    return f'<details><summary>{name} <span class="soft">{count}</span></summary><pre>{lines}</pre></details>'


def _circumstances(stage: Stage) -> str:
    used = ("; from ".join(filter(None, (amounts(stage.calibration), source(stage.calibration))))) or "none"
    checked = {True: "passed", False: "not passed", None: "not needed: the structure stayed"}[stage.parity]
    versions = ", ".join(f"{name} {version}" for name, version in stage.environment.items())
    told = {"Calibration data": used, "Reload check": checked, "Versions": versions}
    return "".join(f"<p>{name}: {escaped(one_line(text))}.</p>" for name, text in told.items())


# --- what was measured ------------------------------------------------------------------------------------------------


def _evaluation(told: Mapping[str, Any]) -> str:
    rows = [[name, f"{told[key]:,}"] for key, name in _COUNTS.items() if isinstance(told.get(key), int)]
    speed, perplexity = told.get("throughput"), told.get("perplexity")
    if isinstance(speed, Mapping):
        rows.append(["tokens/s", _figure(speed, "tokens_per_second", "standard_error")])
    if isinstance(perplexity, Mapping):
        counts = (
            f"{perplexity[key]:,} {key}" for key in ("documents", "tokens") if isinstance(perplexity.get(key), int)
        )
        rows.append([f"perplexity ({', '.join(counts)})", _figure(perplexity, "value", "value_standard_error")])
    labelled = told.get("labelled")
    for score in [*told["scores"], *(labelled.get("scores", ()) if isinstance(labelled, Mapping) else ())]:
        if isinstance(score, Mapping):
            name = f"{score.get('task')} {score.get('metric')}"
            rows.append([name, _figure(score, "value", "standard_error")])
    shown = [[escaped(one_line(cell)) for cell in row] for row in rows]
    return (
        f'<section id="evaluation"><h2>Evaluation</h2>{table(["", "measured"], shown, numbers=(1,))}'
        f'<p class="soft">± are standard errors. From {EVALUATION_FILE}.</p></section>'
    )


_COUNTS = {"parameters": "parameters", "stored_bytes": "stored bytes"}


def _figure(told: Mapping[str, Any], value: str, error: str) -> str:
    found, uncertain = (told.get(key) for key in (value, error))
    return measured(
        float(found) if isinstance(found, (int, float)) else math.nan,
        float(uncertain) if isinstance(uncertain, (int, float)) else math.nan,
    )
