"""Settings of healing: data that checks itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar

from hf_compress.checks import check_fields, check_names, setting
from hf_compress.report.stages import HEAL


@dataclass(frozen=True)
class DistillationConfig:
    """What is learned: label_share · (the model's own loss) + (1 − label_share) · (KL + stream_weight · streams).

    Attributes:
        label_share: in [0, 1]; above 0 it needs labels, and a text is its own.
        stream_weight: of the distance of the residual streams of corresponding blocks, at least 0.
        temperature: of the distributions that KL compares, above 0.
    """

    label_share: float = setting(0.0, within="[0, 1]")
    stream_weight: float = setting(1.0, within="[0, inf]")
    temperature: float = setting(1.0, within="(0, inf]")

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True)
class HealConfig(DistillationConfig):
    """Healing as a stage of a recipe: what is learned, as for `DistillationConfig`, and for how long.

    The teacher is the model as it was before the first stage. The data is that of the other stages.
    """

    method: ClassVar[str] = HEAL

    epochs: float = setting(1.0, "passes over the data", "(0, inf)")
    steps: int | None = setting(None, "optimizer steps, in place of epochs", "[1, inf)")
    batch_size: int = setting(8, "samples of a step", "[1, inf)")
    learning_rate: float | None = setting(None, "1e-3 with adapters and 1e-4 without, when not given", "(0, inf)")
    rank: int = setting(16, "of the adapters, which are merged at the end; 0 trains all weights", "[0, inf)")
    seed: int = setting(0, "of the adapters and of the order of the data", "[0, 4294967295]")

    def to_dict(self) -> dict[str, Any]:
        """The fields, and "heal" as the method: JSON values only."""
        return {"method": self.method, **asdict(self)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> HealConfig:
        """The inverse of `to_dict`; `method` may be left out.

        Raises:
            TypeError: an unknown setting.
            ValueError: settings that make no sense.
        """
        given = {name: value for name, value in values.items() if name != "method"}
        check_names(cls.method, given, (field.name for field in fields(cls)))
        return cls(**given)
