"""Errors of its own; everything else is a plain `ValueError` or `TypeError`."""

from __future__ import annotations


class UnsupportedModelError(ValueError):
    """A model, or a change of it, that hf_compress cannot do; the message names what is in the way."""


class ParityError(UnsupportedModelError):
    """A model rebuilt from its own saved config would not be the model in memory, so nothing was changed or written."""


class NotLinearError(ValueError):
    """Training has not made any FFN as linear as its collapse would need; the message says how linear each is."""


class CalibrationError(ValueError):
    """The calibration data is missing, empty, too little, or leads to activations that are not finite."""


class HubError(RuntimeError):
    """A model could not be pushed to the Hub; the message says to which repository, why, and what to do."""


class PlanError(ValueError):
    """A plan is malformed, of a newer version, or does not fit the model."""


class OffloadError(ValueError):
    """Weights of an offloaded model cannot be read, or changed ones stored; the message names the file."""


class WorkdirError(ValueError):
    """A folder for what a run has finished is another run's, or cannot be written; the message says what differs."""


class MemoryBudgetError(ValueError):
    """What the work needs at least is more than it may take; the message says how much that is."""


class ProcessesError(Exception):
    """Processes that share work cannot go on: one has failed, has ended, or has another model, settings or data."""


def one_line(error: BaseException) -> str:
    """The class of an error and the beginning of what it says, for messages of ours that pass it on."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
