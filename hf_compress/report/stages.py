"""The changes that a model's history is made of, as data."""

from __future__ import annotations

import platform
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from hf_compress.methods.base.settings import config_class, method_names
from hf_compress.plan.algebra import survivors
from hf_compress.rewrite.edits import edit_from_dict

HEAL = "heal"  # the method of a stage that trained weights and changed no structure
WRITTEN_OUT = "dense"  # and of one that wrote packed and sparse weights out as matrices


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
class Step:
    """A step of a change and its wall time in seconds."""

    name: str
    seconds: float


@dataclass(frozen=True)
class Stage:
    """One change of a model.

    Attributes:
        method: name of the method; "heal" where weights were trained and nothing else was changed, "dense" where they
            were written out as matrices.
        config: the method's settings.
        before, after: the model's sizes.
        edits: the plan's edits, as JSON values; blocks are counted as they were before this stage.
        notes: what the method found out: similarities, choices, errors.
        steps: what was done one after another, and the wall time of each.
        calibration: samples, tokens, truncated samples; empty when none was used. Where the data came by name, its
            `source`, and how it was read; where not all of it was used, `of` how many samples (`of_the_first`, where
            there are more), and the `seed` they were drawn with.
        parity: whether a model rebuilt from the saved config gave the same outputs bit for bit; None where the
            structure stayed as it was, and nothing was rebuilt.
        environment: versions that it was done with.
    """

    method: str
    config: dict[str, Any]
    before: Size
    after: Size
    edits: list[dict[str, Any]]
    notes: dict[str, Any]
    steps: list[Step]
    calibration: dict[str, int | str]
    parity: bool | None
    environment: dict[str, str] = field(default_factory=lambda: environment())

    @property
    def paper(self) -> str | None:
        """The address of the method's paper; None where it names none, or the method is not known here."""
        return config_class(self.method).paper if self.method in method_names() else None

    def survivors(self, stack: str) -> dict[int, int]:
        """The blocks that were left of a stack, each with the last of those that it stands for since.

        Both are counted as before this stage. Every block but a merged one stands for itself.
        """
        edits = [edit_from_dict(values) for values in self.edits if values.get("stack") == stack]
        return survivors(edits, stack, self.before.blocks.get(stack, 0))


def environment() -> dict[str, str]:
    """Versions of Python and of the libraries that decide the result."""
    versions = {"python": platform.python_version()}
    for name in ("hf-compress", "torch", "transformers"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed as a package"
    return versions
