"""What was done to a model and what it cost: its history as dataclasses, as JSON, in a few lines, as a plot."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, get_type_hints

from hf_compress.report.markdown import public
from hf_compress.report.plots import plot_stages
from hf_compress.report.stages import Size, Stage, Step
from hf_compress.report.summary import summary_html, summary_text

REPORT_FILE = "compression_report.json"  # what a report is called beside the model that it is of


@dataclass(frozen=True)
class CompressionReport:
    """The history of a model: all that was done to it, from the original to what it is now.

    Attributes:
        base_model: where the original came from.
        stages: every change, the first one first; at least one.
    """

    base_model: str
    stages: list[Stage]

    def __post_init__(self) -> None:
        if not self.stages:
            raise ValueError("a CompressionReport tells of one change at least; stages is empty")

    @property
    def before(self) -> Size:
        """The size of the original."""
        return self.stages[0].before

    @property
    def after(self) -> Size:
        """The size that the last stage has left."""
        return self.stages[-1].after

    @property
    def methods(self) -> list[str]:
        """The names of the methods, each once, in the order of their first use."""
        return list(dict.fromkeys(stage.method for stage in self.stages))

    @property
    def method(self) -> str:
        """The method of the last stage."""
        return self.stages[-1].method

    @property
    def config(self) -> dict[str, Any]:
        """The settings of the last stage."""
        return self.stages[-1].config

    @property
    def edits(self) -> list[dict[str, Any]]:
        """The edits of the last stage."""
        return self.stages[-1].edits

    @property
    def notes(self) -> dict[str, Any]:
        """The notes of the last stage."""
        return self.stages[-1].notes

    @property
    def calibration(self) -> dict[str, int | str]:
        """The calibration data of the last stage."""
        return self.stages[-1].calibration

    def published(self) -> CompressionReport:
        """The same for others: of paths of this machine the last part alone."""
        stages = [
            replace(stage, calibration={**stage.calibration, "source": public(str(stage.calibration["source"]))})
            if "source" in stage.calibration
            else stage
            for stage in self.stages
        ]
        return replace(self, base_model=public(self.base_model), stages=stages)

    def to_dict(self) -> dict[str, Any]:
        """JSON values only."""
        return asdict(self)

    def to_json(self, path: str | Path | None = None) -> str:
        """The report as JSON text; also written to `path` when one is given."""
        text = json.dumps(self.to_dict(), indent=2)
        if path is not None:
            Path(path).write_text(text + "\n", encoding="utf-8")
        return text

    @staticmethod
    def from_json(text: str | bytes) -> CompressionReport:
        """The inverse of `to_json`; takes a file's bytes, too.

        Raises:
            ValueError: the text is no report, or one of another version.
        """
        try:
            data = json.loads(text)
            stages = [_typed(Stage(**_nested(entry))) for entry in data["stages"]]
            return _typed(CompressionReport(data["base_model"], stages))
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise ValueError(f"no compression report of this version of hf_compress ({reason})") from error

    def __str__(self) -> str:
        """A line for the original and one for each stage."""
        return summary_text(self.stages, self.base_model)

    def _repr_html_(self) -> str:
        """The same for notebooks."""
        return summary_html(self.stages, self.base_model)

    def plot(self, path: str | Path, stage: int | None = None) -> Path:
        """Draw what the method measured of the blocks, and what became of them; PNG or SVG by `path`.

        Args:
            path: where to write it.
            stage: of which stage; None for the last that has something to draw, or else the sizes of all.

        Raises:
            ValueError: the ending is neither .png nor .svg.
            IndexError: there is no such stage.
        """
        return plot_stages(self.stages if stage is None else [self.stages[stage]], path, self.base_model)


def _nested(entry: dict[str, Any]) -> dict[str, Any]:
    """A stage's JSON values with the dataclasses that it is made of."""
    sizes = {name: _typed(Size(**entry[name])) for name in ("before", "after")}
    return {**entry, **sizes, "steps": [_typed(Step(**step)) for step in entry["steps"]]}


def _typed(made: Any) -> Any:
    """`made`, a dataclass, unless a field is of another type than it says: TypeError, for files come from anywhere."""
    from huggingface_hub.dataclasses import type_validator

    hints = get_type_hints(type(made))
    for one in fields(made):
        type_validator(one.name, getattr(made, one.name), hints[one.name])
    return made
