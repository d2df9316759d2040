"""A smaller model among others, and what was measured of it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from hf_compress.evaluation.comparison import ComparedMetric


@dataclass(frozen=True)
class Measured:
    """A smaller model and what was measured of it, each metric beside the original's.

    Attributes:
        name: of its settings.
        stages: the settings themselves.
        metrics: nothing where the model or a method refused them.
        seconds: that the compression took; what several have in common, the first of them pays for.
        error: why it was refused.
        control: whether it is there to be beaten.
    """

    name: str
    stages: list[dict[str, Any]]
    metrics: list[ComparedMetric] = field(default_factory=list)
    seconds: float = math.nan
    error: str = ""
    control: bool = False

    @property
    def methods(self) -> str:
        """The methods of its stages, such as "mka + heal"."""
        return " + ".join(str(stage["method"]) for stage in self.stages)

    def get(self, metric: str) -> ComparedMetric | None:
        """One of its metrics."""
        return next((row for row in self.metrics if row.metric == metric), None)

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> Measured:
        """The inverse of `to_dict`."""
        return Measured(**{**values, "metrics": [ComparedMetric(**row) for row in values["metrics"]]})
