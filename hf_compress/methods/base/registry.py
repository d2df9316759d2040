"""What methods do with their settings: each package of a method registers it when it is imported."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hf_compress.methods.base.context import CalibrationContext
from hf_compress.methods.base.schedule import TrainingSchedule
from hf_compress.methods.base.settings import CompressionConfig
from hf_compress.methods.base.work import Work
from hf_compress.plan.plan import Plan


def _no_steps(config: CompressionConfig, context: CalibrationContext) -> list[CompressionConfig]:
    raise ValueError(f"{type(config).__name__} cannot be cut into steps; leave out every=")


def _whole(config: CompressionConfig) -> str:
    return ""


def _nothing(config: CompressionConfig) -> tuple[str, ...]:
    return ()


@dataclass(frozen=True)
class Method:
    """What a method does. All take its settings first.

    Attributes:
        plan: decides what to do to the model of a context; the model is left as it was.
        schedule: what to do while a model is trained, for one run; when None, compress first, then heal.
        steps: settings that, planned and applied one after another, come to the same amount: for training in between.
        work: how much there is to do, for an estimate; None where nobody has counted.
        leaves: in what form settings leave weights, "packed" or "sparse"; nothing where they stay whole matrices.
        dense: whether it needs weights that are whole matrices.
        common: how the names begin of those results in its journal that are the same however much is taken out.
    """

    plan: Callable[[Any, CalibrationContext], Plan]
    schedule: Callable[[Any], TrainingSchedule] | None = None
    steps: Callable[[Any, CalibrationContext], list[CompressionConfig]] = _no_steps
    work: Callable[[Any, CalibrationContext], Work] | None = None
    leaves: Callable[[Any], str] = _whole
    dense: bool = True
    common: Callable[[Any], tuple[str, ...]] = _nothing


_METHODS: dict[type[CompressionConfig], Method] = {}


def register(settings: type[CompressionConfig], method: Method) -> None:
    """Say what is done with settings of a class; TypeError where that has been said already."""
    if settings in _METHODS:
        raise TypeError(f"{settings.__name__} is registered already: each method has settings of its own")
    _METHODS[settings] = method


def plan_for(config: CompressionConfig, context: CalibrationContext) -> Plan:
    """Decide what to do to the model of a context; the model is left as it was.

    Raises:
        ValueError: the settings do not fit the model or the calibration data.
    """
    return _method(config).plan(config, context)


def schedule_for(config: CompressionConfig) -> TrainingSchedule:
    """What to do while a model is trained with these settings, for one run."""
    make = _method(config).schedule
    return CompressFirst(config) if make is None else make(config)


def steps_for(config: CompressionConfig, context: CalibrationContext) -> list[CompressionConfig]:
    """Settings that, applied one after another, come to the same amount; ValueError where there are none."""
    return _method(config).steps(config, context)


def work_for(config: CompressionConfig, context: CalibrationContext) -> Work | None:
    """How much there is to do with the model of a context; None where nobody has counted."""
    count = _method(config).work
    return None if count is None else count(config, context)


def left_by(config: CompressionConfig) -> str:
    """In what form these settings leave weights, "packed" or "sparse"; nothing where they stay whole matrices."""
    return _method(config).leaves(config)


def needs_dense_weights(config: CompressionConfig) -> bool:
    """Whether a method cannot do with weights that an earlier one has left packed or sparse."""
    return _method(config).dense


def common_results(config: CompressionConfig) -> tuple[str, ...]:
    """How the names begin of the results in a journal that are the same however much is taken out."""
    return _method(config).common(config)


class CompressFirst(TrainingSchedule):
    """The plainest: the model is compressed before the first step, and training heals it."""

    def prepare(self, context: CalibrationContext) -> Plan:
        return plan_for(self.config, context)


def _method(config: CompressionConfig) -> Method:
    if type(config) not in _METHODS:
        raise TypeError(f"{type(config).__name__} has no method: its package has to call register() for it")
    return _METHODS[type(config)]
