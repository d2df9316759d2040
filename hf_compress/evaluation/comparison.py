"""Several models beside the first of them: every metric, and what of it is their difference, document by document."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from hf_compress.evaluation.evaluate import EvaluationResult, without_nan
from hf_compress.evaluation.perplexity import Perplexity
from hf_compress.evaluation.scores import TaskScore
from hf_compress.evaluation.speed import Speed, median, median_ratio
from hf_compress.plan.tables import html_table, measured, text_table

_NOTE = (
    "± is one standard error; ↓ lower is better, ↑ higher is better. × is a ratio to {reference}, + or − a difference "
    "from it: of texts, tasks and labelled data taken document by document, of speed round by round. A difference of "
    "less than two of its standard errors may be chance."
)
_SPEED_NOTE = " Speed: a prompt of {prompt} random tokens, and {new} generated after them; medians of {rounds} rounds."
_MEMORY_NOTE = " Memory: the weights, and the most that this takes beside them."
_ARROWS = {True: " ↑", False: " ↓", None: ""}


@dataclass(frozen=True)
class ComparedMetric:
    """One metric of one model, and how it stands to the first model's.

    Attributes:
        metric: What was measured, such as "perplexity" or "manuals_cloze acc".
        model: Name of the model.
        value: In the metric's own unit; NaN where it was not measured.
        standard_error: Of `value`; NaN where it is not known.
        change: To the first model: a ratio or a difference, as `kind` says; NaN for the first model itself, and where
            none can be taken.
        change_error: Standard error of `change`, of pairs of documents or rounds; NaN where there is none.
        kind: "ratio" (of sizes, speed and perplexity) or "difference" (of scores).
        higher_is_better: None where that is not said.
        documents: Number of documents; None where the metric is of none.
        note: Why there is no change, in words.
    """

    metric: str
    model: str
    value: float
    standard_error: float = math.nan
    change: float = math.nan
    change_error: float = math.nan
    kind: Literal["ratio", "difference"] = "ratio"
    higher_is_better: bool | None = None
    documents: int | None = None
    note: str = ""

    def change_text(self) -> str:
        """What it is beside the first model's: "× 1.021 ± 0.004", "−0.03 ± 0.01", or why that is not known."""
        if math.isnan(self.change):
            return self.note
        text = measured(self.change, self.change_error, "" if self.kind == "ratio" else "+")
        text = f"× {text}" if self.kind == "ratio" else text.replace("-", "−", 1)
        return f"{text} ({self.note})" if self.note else text


@dataclass(frozen=True)
class Comparison:
    """What `compare` measured; or what `evaluate` has measured of several models on the same data.

    Attributes:
        results: What was measured of each model, by its name; the first is the one that the others are held against.
        speeds: For each other model the first one's speed and its own, measured in turn.
    """

    results: Mapping[str, EvaluationResult]
    speeds: Mapping[str, tuple[Speed, Speed]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.results:
            raise ValueError("a Comparison is of one model at least; results is empty")

    @property
    def reference(self) -> str:
        """The name of the first model."""
        return next(iter(self.results))

    def rows(self) -> tuple[ComparedMetric, ...]:
        """Every metric of every model, the metrics one after another."""
        return (*self._sizes(), *self._speeds(), *self._perplexities(), *self._scores())

    def get(self, metric: str, model: str) -> ComparedMetric:
        """One metric of one model.

        Raises:
            KeyError: there is no such row.
        """
        found = {(row.metric, row.model): row for row in self.rows()}
        if (metric, model) not in found:
            raise KeyError(f"no {metric!r} of {model!r}; there is {sorted({row.metric for row in found.values()})}")
        return found[metric, model]

    def table(self) -> str:
        """A plain-text table of all rows."""
        return f"{text_table(self.header(), self.cells(), right={2})}\n\n{self.note()}"

    def header(self) -> tuple[str, str, str, str]:
        """The head of the table."""
        return ("", "model", "value", f"against {self.reference}")

    def cells(self) -> list[tuple[str, str, str, str]]:
        """(metric, model, value, change) as text, for tables; the metric stands in its first row alone."""
        cells, before = [], ""
        for row in self.rows():
            title = _title(row) if row.metric != before else ""
            before = row.metric
            cells.append((title, row.model, measured(row.value, row.standard_error), row.change_text()))
        return cells

    def note(self) -> str:
        """What the table's signs mean."""
        note = _NOTE.format(reference=self.reference)
        for speed, _ in list(self.speeds.values())[:1]:
            told = _SPEED_NOTE.format(prompt=speed.prompt, new=speed.new_tokens, rounds=len(speed.first_token))
            note += told if speed.new_tokens else told.replace(f", and {speed.new_tokens} generated after them", "")
            note += _MEMORY_NOTE if speed.memory is not None else ""
        return note

    def to_dict(self) -> dict[str, Any]:
        """As plain data; numbers that are not known (NaN) become None."""
        return without_nan(
            {
                "reference": self.reference,
                "models": {name: result.to_dict() for name, result in self.results.items()},
                "speeds": {
                    name: {self.reference: first.to_dict(), name: own.to_dict()}
                    for name, (first, own) in self.speeds.items()
                },
                "comparison": [vars(row) for row in self.rows()],
            }
        )

    def to_json(self) -> str:
        """`to_dict` as JSON text."""
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False, allow_nan=False)

    def __str__(self) -> str:
        return self.table()

    def _repr_html_(self) -> str:
        """The table for notebooks."""
        return html_table(self.note(), self.header(), self.cells())

    def _sizes(self) -> list[ComparedMetric]:
        rows = []
        for metric in ("parameters", "stored bytes"):
            sizes = {name: getattr(result, metric.replace(" ", "_")) for name, result in self.results.items()}
            first = sizes[self.reference]
            for name, size in sizes.items():
                change = math.nan if name == self.reference else size / first
                rows.append(ComparedMetric(metric, name, size, change=change, higher_is_better=False))
        return rows

    def _speeds(self) -> list[ComparedMetric]:
        rows: list[ComparedMetric] = []
        for metric, field_name, better in (
            ("seconds to first token", "first_token", False),
            ("generated tokens/s", "per_second", True),
        ):
            pairs = {name: (getattr(a, field_name), getattr(b, field_name)) for name, (a, b) in self.speeds.items()}
            if not pairs or not all(ours and theirs for ours, theirs in pairs.values()):
                continue
            own = [sample for first in self._first_speeds() for sample in getattr(first, field_name)]
            title = _read(metric, self.speeds)
            rows.append(ComparedMetric(title, self.reference, *median(own), higher_is_better=better))
            for name, (first, other) in pairs.items():
                measured = (*median(other), *median_ratio(other, first))
                rows.append(ComparedMetric(title, name, *measured, higher_is_better=better))
        return rows + self._memory()

    def _first_speeds(self) -> list[Speed]:
        """The first model's speed: once where all ran in turn, once for each of the others otherwise."""
        return list({id(first): first for first, _ in self.speeds.values()}.values())

    def _memory(self) -> list[ComparedMetric]:
        pairs = {name: (a.memory, b.memory) for name, (a, b) in self.speeds.items()}
        if not pairs or any(None in pair for pair in pairs.values()):
            return []
        metric = "bytes of memory to run"
        rows = [
            ComparedMetric(
                metric,
                self.reference,
                max(first for first, _ in pairs.values() if first is not None),
                higher_is_better=False,
            )
        ]
        for name, (first, own) in pairs.items():
            assert first is not None
            assert own is not None
            rows.append(ComparedMetric(metric, name, own, change=own / first, higher_is_better=False))
        return rows

    def _perplexities(self) -> list[ComparedMetric]:
        found = {name: result.perplexity for name, result in self.results.items()}
        first = found[self.reference]
        rows = []
        for name, own in found.items():
            if own is None:
                continue
            change, error, note = math.nan, math.nan, ""
            if name != self.reference:
                change, error, note = _times(own, first)
            rows.append(
                ComparedMetric(
                    *("perplexity", name, own.value, own.value_standard_error, change, error),
                    higher_is_better=False,
                    documents=own.documents,
                    note=note,
                )
            )
        return rows

    def _scores(self) -> list[ComparedMetric]:
        found = {
            name: {(score.task, score.metric): score for score in result.all_scores}
            for name, result in self.results.items()
        }
        rows = []
        for key in dict.fromkeys(key for scores in found.values() for key in scores):
            first = found[self.reference].get(key)
            for name, scores in found.items():
                if (own := scores.get(key)) is None:
                    continue
                nothing = (math.nan, math.nan, "")
                change, error, note = nothing if name == self.reference else _above(own, first)
                rows.append(
                    ComparedMetric(
                        *(f"{own.task} {own.metric}", name, own.value, own.standard_error, change, error),
                        kind="difference",
                        higher_is_better=own.higher_is_better,
                        documents=own.documents,
                        note=note,
                    )
                )
        return rows


def _above(own: TaskScore, first: TaskScore | None) -> tuple[float, float, str]:
    """By how much a score is above the first model's, the error of that, and a note."""
    if first is None:
        return math.nan, math.nan, "not measured of the first"
    if own.by_document is None or first.by_document is None:
        return own.value - first.value, math.nan, "error not known"
    try:
        return *own.difference(first), ""
    except ValueError:
        return math.nan, math.nan, "other documents: not comparable"


def _times(own: Perplexity, first: Perplexity | None) -> tuple[float, float, str]:
    """The ratio of two perplexities, exp of the difference of the losses, its error by the delta method, and a note."""
    if first is None:
        return math.nan, math.nan, "not measured of the first"
    try:
        gap, error = own.loss_difference(first)
    except ValueError:
        return math.nan, math.nan, "other tokens: not comparable"
    times = math.exp(gap) if gap < 700 else math.inf
    return times, times * error, ""


def _read(metric: str, speeds: Mapping[str, tuple[Speed, Speed]]) -> str:
    """What the first token's seconds are called where none was generated."""
    generated = all(own.new_tokens for _, own in speeds.values())
    return metric if generated else "seconds to read a prompt"


def _title(row: ComparedMetric) -> str:
    count = f" ({row.documents:,} documents)" if row.documents is not None else ""
    return f"{row.metric}{_ARROWS[row.higher_is_better]}{count}"


def file_name(name: str) -> str:
    """A name as that of a folder."""
    return re.sub(r"[^\w.=-]+", "-", name).strip(".-") or "model"
