"""What a sweep has measured: a table, a CSV file, a picture, and which of the models nothing smaller beats."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hf_compress.evaluation.comparison import ComparedMetric
from hf_compress.evaluation.evaluate import without_nan
from hf_compress.plan.tables import html_table, measured, text_table
from hf_compress.report.measured import Measured
from hf_compress.report.pareto import draw_pareto

SIZE = "stored bytes"
_NOT_QUALITY = (SIZE, "parameters", "seconds", "generated tokens/s", "bytes of memory")


@dataclass(frozen=True)
class SweepResult:
    """What was measured of many smaller models.

    Attributes:
        original: what was measured of the model as it was.
        measured: of each smaller one; the controls are the last.
    """

    original: list[ComparedMetric]
    measured: list[Measured]

    @property
    def quality(self) -> str | None:
        """The first metric that says how good a model is: perplexity, or else a score; None where none was measured."""
        told = (row for row in self.original if not row.metric.startswith(_NOT_QUALITY))
        return next((row.metric for row in told if row.higher_is_better is not None), None)

    @property
    def metrics(self) -> list[str]:
        """The names of all metrics, those of the smaller models (speed has no row of the original) too."""
        rows = [*self.original, *(row for one in self.measured for row in one.metrics)]
        return list(dict.fromkeys(row.metric for row in rows))

    def front(self) -> list[Measured]:
        """The models, but for controls, that no other of at most their stored bytes beats in quality; the best first.

        Without a measure of quality there are none.
        """
        if self.quality is None:
            return []
        done = [one for one in self.measured if one.metrics]
        best = sorted(done, key=lambda one: (self._loss(one), self._size(one), one.control))
        front: list[Measured] = []
        for one in best:
            if not front or self._size(one) < self._size(front[-1]):
                front.append(one)
        return [one for one in front if not one.control]

    def _size(self, one: Measured) -> float:
        row = one.get(SIZE)
        assert row is not None
        return row.value

    def _loss(self, one: Measured) -> float:
        """The quality, such that less is better."""
        row = one.get(self.quality or "")
        if row is None or math.isnan(row.value):
            return math.inf
        return -row.value if row.higher_is_better else row.value

    def rows(self) -> list[tuple[str, ...]]:
        """The cells of the table: each model's metrics, with what they are beside the original's."""
        front = {one.name for one in self.front()}
        cells = [("original", *(_cell(self._of_original(metric)) for metric in self.metrics))]
        for one in self.measured:
            mark = " *" if one.name in front else " (control)" if one.control else ""
            if one.error:
                cells.append((one.name, one.error))
            else:
                cells.append((one.name + mark, *(_cell(one.get(metric)) for metric in self.metrics)))
        return cells

    def header(self) -> tuple[str, ...]:
        """The head of the table."""
        return ("", *self.metrics)

    def table(self) -> str:
        """A plain-text table of all models."""
        return f"{text_table(self.header(), self.rows())}\n\n{self.note()}"

    def note(self) -> str:
        """What the table's signs mean."""
        best = f" * nothing of at most as many stored bytes is better in {self.quality}." if self.quality else ""
        return f"± is one standard error; in brackets, beside the original, document by document.{best}"

    def __str__(self) -> str:
        return self.table()

    def _repr_html_(self) -> str:
        """The table for notebooks."""
        return html_table(self.note(), self.header(), self.rows())

    def _of_original(self, metric: str) -> ComparedMetric | None:
        return next((row for row in self.original if row.metric == metric), None)

    def to_dict(self) -> dict[str, Any]:
        """JSON values; numbers that are not known (NaN) become None."""
        front = [one.name for one in self.front()]
        measured = [one.to_dict() for one in self.measured]
        return without_nan({"original": [asdict(row) for row in self.original], "measured": measured, "front": front})

    def to_json(self) -> str:
        """`to_dict` as JSON text."""
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False, allow_nan=False)

    def to_csv(self) -> str:
        """A row for each model; for each metric its value, what it is beside the original's, and the errors of both."""
        parts = ("", " error", " change", " change error")
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        head = ["name", "methods", "control", "seconds", "refused"]
        writer.writerow([*head, *(f"{metric}{part}" for metric in self.metrics for part in parts), "settings"])
        original = Measured("original", [], self.original)
        for one in (original, *self.measured):
            values = [value for metric in self.metrics for value in _numbers(one.get(metric))]
            first = [one.name, one.methods, one.control, _known(one.seconds), one.error]
            writer.writerow([*first, *values, json.dumps(one.stages)])
        return text.getvalue()

    def plot(self, path: str | Path) -> Path:
        """Draw quality against stored bytes, parameters and speed; PNG or SVG by `path`.

        Raises:
            ValueError: nothing says how good the models are, or none was made; or the ending is neither .png nor .svg.
        """
        if not any(one.metrics for one in self.measured):
            raise ValueError("no model was made, so there is nothing to draw: the table says why")
        if self.quality is None:
            raise ValueError("no quality was measured, so there is nothing to draw it by: give texts= or tasks=")
        return draw_pareto(self.original, self.measured, self.quality, {one.name for one in self.front()}, path)

    def write(self, folder: Path) -> None:
        """Write sweep.csv, sweep.json and, where quality was measured, sweep.png."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "sweep.csv").write_text(self.to_csv(), encoding="utf-8")
        (folder / "sweep.json").write_text(self.to_json() + "\n", encoding="utf-8")
        if self.quality is not None and any(one.metrics for one in self.measured):
            self.plot(folder / "sweep.png")


def _cell(row: ComparedMetric | None) -> str:
    if row is None or math.isnan(row.value):
        return ""
    value = measured(row.value, row.standard_error)
    return value if math.isnan(row.change) else f"{value} ({row.change_text()})"


def _numbers(row: ComparedMetric | None) -> Sequence[Any]:
    if row is None:
        return [""] * 4
    return [_known(number) for number in (row.value, row.standard_error, row.change, row.change_error)]


def _known(number: float) -> Any:
    return "" if math.isnan(number) else number
