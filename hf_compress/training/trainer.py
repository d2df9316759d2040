"""What a callback needs to know and is not told: the Trainer that calls it, and the checkpoint that it resumes from."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import Trainer


def calling_trainer() -> Trainer:
    """The Trainer on the call stack.

    A callback gets the model, the optimizer and the arguments, but neither the Trainer, whose own loss function decides
    whether a term can be added to the loss, nor its fellow callbacks, which report the logs.

    Raises:
        TypeError: there is none.
    """
    from transformers import Trainer

    for frame in _callers():
        if isinstance(trainer := frame.f_locals.get("self"), Trainer):
            return trainer
    raise TypeError("a CompressionCallback is called by a transformers.Trainer: Trainer(..., callbacks=[callback])")


def resumed_checkpoint() -> str | None:
    """The folder from which the `Trainer.train` on the call stack goes on; None where it starts anew."""
    from transformers import Trainer

    for frame in _callers():
        if isinstance(frame.f_locals.get("self"), Trainer) and "resume_from_checkpoint" in frame.f_locals:
            path = frame.f_locals["resume_from_checkpoint"]
            return str(path) if path else None
    return None


def _callers() -> Iterator[FrameType]:
    frame = sys._getframe(1).f_back
    while frame is not None:
        yield frame
        frame = frame.f_back
