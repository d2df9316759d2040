"""Several changes of a model one after another, and healing between them: what may follow what, and how it goes on."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeGuard

from transformers import PreTrainedModel

from hf_compress.anatomy.compressible import check_model
from hf_compress.anatomy.dispatch import is_offloaded
from hf_compress.api.identity import identity_of, known_in_memory
from hf_compress.api.one_method import compress_by
from hf_compress.calibration.compute import Compute
from hf_compress.calibration.data import Calibration
from hf_compress.calibration.processes import by_one, here
from hf_compress.calibration.workdir import stage_folder, worked_in
from hf_compress.errors import CalibrationError, UnsupportedModelError
from hf_compress.methods.base.journal import Journal
from hf_compress.methods.base.registry import left_by, needs_dense_weights
from hf_compress.methods.base.settings import CompressionConfig, config_class, method_names
from hf_compress.report.stages import HEAL
from hf_compress.training.heal_config import HealConfig

StageSettings = CompressionConfig | HealConfig


def is_several(config: Any) -> TypeGuard[Sequence[Any]]:
    """Whether settings are those of several stages."""
    return isinstance(config, (list, tuple))


def stage_settings(given: Any) -> StageSettings:
    """The settings of a stage: as they are, or by a name alone, or as a mapping with `method`, as in a file.

    Raises:
        ValueError, TypeError: there is no such method, or it refuses its settings.
    """
    if isinstance(given, StageSettings):
        return given
    if isinstance(given, str):
        given = {"method": given}
    if not isinstance(given, Mapping) or not isinstance(given.get("method"), str):
        raise TypeError(
            f"a stage is a method's settings, its name, 'heal', or a mapping with 'method' and settings; got {given!r}"
        )
    values = {name: value for name, value in given.items() if name != "method"}
    if given["method"].lower() == HEAL:
        return HealConfig.from_dict(values)
    try:
        cls = config_class(given["method"])
    except ValueError as error:
        raise ValueError(f"{error}, and {HEAL}") from None
    return cls(**values)


def stages_of(given: Iterable[Any]) -> tuple[StageSettings, ...]:
    """The settings of stages that can follow each other.

    Raises:
        ValueError: they cannot, and why; or there are none.
        TypeError: one is none.
    """
    stages = tuple(map(stage_settings, given))
    if not stages:
        raise ValueError(f"there are no stages: name methods ({', '.join(method_names())}), with {HEAL} between them")
    compact: tuple[int, str, str] | None = None  # the stage that has left weights in another form, and which
    for number, stage in enumerate(stages, 1):
        if isinstance(stage, HealConfig):
            if number == 1:
                raise ValueError(f"stage 1 is {HEAL}, and nothing is to be healed yet: name a method before it")
            continue
        if compact is not None and needs_dense_weights(stage):
            first, method, form = compact
            raise ValueError(
                f"stage {number} ({stage.method}) cannot follow stage {first} ({method}), which leaves weights {form}: "
                f"put {stage.method} before {method}"
            )
        if form := left_by(stage):
            compact = (number, stage.method, form)
    return stages


def check_stages(
    model: Any, given: Sequence[Any], calibration: Any, settings: Mapping[str, Any], teacher: Any = None
) -> tuple[StageSettings, ...]:
    """The stages of a call; raises unless they can follow each other, and the model can go through them."""
    if settings:
        raise TypeError(f"{', '.join(settings)}: with several stages, settings belong inside each of them")
    stages = stages_of(given)
    check_model(model)
    heals = any(isinstance(stage, HealConfig) for stage in stages)
    if teacher is not None:
        if not heals:
            raise ValueError(f"teacher= is whom {HEAL} learns from, and no stage is {HEAL}: leave it out")
        from hf_compress.training.distillation import check_teacher  # brings the Trainer, as below

        check_teacher(model, teacher)
    if heals:
        if calibration is None:
            raise CalibrationError(f"{HEAL} learns from data: pass calibration=, such as texts")
        if is_offloaded(model):
            raise UnsupportedModelError(f"{HEAL} trains weights in memory, and the model is offloaded: load it whole")
    return stages


def compress_in_stages(
    model: PreTrainedModel,
    stages: Sequence[StageSettings],
    data: Calibration | None,
    compute: Compute,
    teacher: PreTrainedModel | None = None,
    preparing: float = 0.0,
    common: Path | None = None,
) -> None:
    """Change `model` by several stages. In a workdir each has a folder of its own.

    A run that was killed goes through all stages again, and takes from their folders what took the time. So where it
    ends is the same to the bit.

    Args:
        stages: what `check_stages` gave.
        teacher: for healing; a copy of the model as it is when None.
        preparing, common: of the first stage, as for `compress_by`. The others begin with a model of this run alone.
    """
    if teacher is None and any(isinstance(stage, HealConfig) for stage in stages):
        teacher = _copied(model)
    with ExitStack() as held:
        if compute.folder is not None:
            held.enter_context(by_one(worked_in)(compute.folder))
        for number, stage in enumerate(stages, 1):
            folder = None if compute.folder is None else stage_folder(compute.folder, number, stage.method)
            if isinstance(stage, HealConfig):
                assert teacher is not None
                assert data is not None
                _heal(model, stage, teacher, data, folder)
            else:
                compress_by(model, stage, data, replace(compute, workdir=folder), preparing, common)
            preparing, common = 0.0, None


def _copied(model: PreTrainedModel) -> PreTrainedModel:
    """The model as it is, to learn from."""
    teacher = copy.deepcopy(model).eval()
    teacher.requires_grad_(False)
    return teacher


def _heal(
    model: PreTrainedModel, stage: HealConfig, teacher: PreTrainedModel, data: Calibration, folder: Path | None
) -> None:
    """Heal, from where an earlier run in the folder had got."""
    from hf_compress.training.heal_stage import heal_by  # brings PEFT and the Trainer, which nothing else needs here

    if folder is None:
        heal_by(model, stage, teacher, data, Journal())
        return
    with by_one(worked_in)(folder):
        identity = identity_of(model, stage, data, processes=here()[1]) | {"teacher": known_in_memory(teacher)}
        heal_by(model, stage, teacher, data, Journal(folder, identity))
