"""What was done to a model and what it cost: a dataclass, as JSON, as a table, as a plot."""

from __future__ import annotations

import json
import platform
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

REPORT_FILE = "compression_report.json"  # what a report is called beside the model that it is of


@dataclass(frozen=True)
class Size:
    """How large a model is; tied tensors count once.

    Attributes:
        parameters: number of parameters.
        bytes: what its tensors take when stored.
        blocks: length of each residual stack, by its path.
    """

    parameters: int
    bytes: int
    blocks: dict[str, int]


@dataclass(frozen=True)
class Stage:
    """One step of compression and its wall time in seconds."""

    name: str
    seconds: float


@dataclass(frozen=True)
class CompressionReport:
    """What `compress` did.

    Attributes:
        method: name of the method.
        config: the method's settings.
        base_model: where the model came from.
        before, after: sizes.
        edits: the plan's edits, as JSON values.
        notes: what the method found out: similarities, choices, errors.
        stages: each step and its wall time.
        calibration: samples, tokens, truncated samples; empty when none was used.
        parity: whether a model rebuilt from the saved config gave the same outputs bit for bit.
        environment: versions that it was done with.
    """

    method: str
    config: dict[str, Any]
    base_model: str
    before: Size
    after: Size
    edits: list[dict[str, Any]]
    notes: dict[str, Any]
    stages: list[Stage]
    calibration: dict[str, int]
    parity: bool
    environment: dict[str, str] = field(default_factory=lambda: environment())

    def to_dict(self) -> dict[str, Any]:
        """JSON values only."""
        return asdict(self)

    def to_json(self, path: str | Path | None = None) -> str:
        """The report as JSON text; also written to `path` when one is given."""
        text = json.dumps(self.to_dict(), indent=2)
        if path is not None:
            Path(path).write_text(text + "\n")
        return text

    @staticmethod
    def from_json(text: str) -> CompressionReport:
        """The inverse of `to_json`."""
        data = json.loads(text)
        data["before"], data["after"] = Size(**data["before"]), Size(**data["after"])
        data["stages"] = [Stage(**stage) for stage in data["stages"]]
        return CompressionReport(**data)

    def table(self) -> Table:
        """What changed, for `rich.print`."""
        from rich.table import Table

        table = Table("", "before", "after", "change", title=f"{self.method}: {self.base_model or 'model'}")
        for stack, blocks in self.before.blocks.items():
            table.add_row(f"blocks in {stack}", *_change(blocks, self.after.blocks.get(stack, 0)))
        table.add_row("parameters", *_change(self.before.parameters, self.after.parameters))
        table.add_row("stored bytes", *_change(self.before.bytes, self.after.bytes))
        for stage in self.stages:
            table.add_row(f"[dim]{stage.name}[/dim]", "", f"[dim]{stage.seconds:.1f} s[/dim]", "")
        return table

    def plot(self, path: str | Path) -> Path:
        """Draw the similarity of the blocks, where the method measured it, and which blocks went; PNG or SVG by `path`.

        Raises:
            ValueError: the method measured nothing that can be drawn.
        """
        from hf_compress.report.plots import plot_report

        return plot_report(self, Path(path))


def _change(before: int, after: int) -> tuple[str, str, str]:
    return f"{before:,}", f"{after:,}", f"{100 * (after / before - 1):+.1f}%" if before else ""


def environment() -> dict[str, str]:
    """Versions of Python and of the libraries that decide the result."""
    versions = {"python": platform.python_version()}
    for name in ("hf-compress", "torch", "transformers"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed as a package"
    return versions
