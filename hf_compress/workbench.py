"""What a method works on while it decides: the model, its anatomy, and calibration data."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import perf_counter

from transformers import PreTrainedModel

from hf_compress.anatomy.anatomy import Anatomy
from hf_compress.anatomy.stacks import Stack
from hf_compress.anatomy.undo import Undo
from hf_compress.calibration.data import Calibration
from hf_compress.errors import CalibrationError


@dataclass
class Workbench:
    """A model and calibration data, for a method to make a plan from.

    A method may try changes out on the model, inside `trial()`; it is as it was when the trial ends.

    Attributes:
        model: the model to decide about.
        data: calibration data, or None.
        seconds: how long each stage of planning took.
    """

    model: PreTrainedModel
    data: Calibration | None = None
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def anatomy(self) -> Anatomy:
        """The model's anatomy as it is now."""
        return Anatomy(self.model)

    @property
    def calibration(self) -> Calibration:
        """The calibration data; CalibrationError where there is none."""
        if self.data is None:
            raise CalibrationError("this method needs calibration data: pass calibration=, say texts, with tokenizer=")
        return self.data

    def stack(self, path: str | None) -> Stack:
        """The residual stack to work on; see `Anatomy.stack`."""
        return self.anatomy.stack(path)

    def trial(self) -> Undo:
        """Changes made through it last until the end of the `with` block that it opens."""
        return Undo()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a stage of planning."""
        start = perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + perf_counter() - start
