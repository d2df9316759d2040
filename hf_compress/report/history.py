"""A model's history, from the model or from what lies beside its files, and one more stage for it."""

from __future__ import annotations

import logging
from pathlib import Path

from huggingface_hub import try_to_load_from_cache
from transformers import PreTrainedModel

from hf_compress.anatomy.anatomy import Anatomy
from hf_compress.anatomy.dispatch import retie
from hf_compress.errors import UnsupportedModelError
from hf_compress.evaluation.size import parameter_count, stored_bytes
from hf_compress.methods.base.context import CalibrationContext
from hf_compress.methods.base.settings import CompressionConfig
from hf_compress.plan.plan import Plan
from hf_compress.report.report import REPORT_FILE, CompressionReport
from hf_compress.report.stages import Size, Stage, Step, environment

logger = logging.getLogger(__name__)


def history_of(model: PreTrainedModel) -> CompressionReport | None:
    """All that was done to `model`, as far as it is known; None where nothing is.

    That is the `compression_report` that the model carries, or else the one beside the files that it was loaded from:
    in its folder, or in the local cache of the Hub (nothing is downloaded). It is looked up when it is asked for, since
    `from_pretrained` of a plain checkpoint runs nothing of this library.

    A report that cannot be read, or that is of a model with other parameters or blocks, is passed over with a warning.
    Its bytes may differ, for a model may have been loaded in another dtype.
    """
    carried = getattr(model, "compression_report", None)
    if isinstance(carried, CompressionReport):
        return carried
    revision = getattr(model.config, "_commit_hash", None)
    path = beside(str(model.name_or_path or ""), REPORT_FILE, revision)
    if path is None:
        return None
    try:
        report = _read(path)
    except (OSError, ValueError) as error:
        logger.warning("the history of the model is not known: %s", error)
        return None
    size, told = model_size(model), report.after
    if (size.parameters, size.blocks) != (told.parameters, told.blocks):
        logger.warning(
            "%s tells of a model with %s parameters in %s blocks, but this one has %s in %s: it is another one, or was "
            "changed since, and its history is not known",
            *(path, f"{told.parameters:,}", told.blocks, f"{size.parameters:,}", size.blocks),
        )
        return None
    return report


def add_stage(model: PreTrainedModel, stage: Stage, history: CompressionReport | None) -> CompressionReport:
    """Have `model` carry its history, as `history_of` gave it before the change, with one stage more."""
    base = str(model.name_or_path or "") if history is None else history.base_model
    report = CompressionReport(base, [*(history.stages if history else ()), stage])
    model.compression_report = report  # type: ignore[assignment]
    return report


def stage_of(config: CompressionConfig, plan: Plan, context: CalibrationContext, before: Size, after: Size) -> Stage:
    """The stage of a model's history that a plan was which has been carried out and checked."""
    return Stage(
        method=config.method,
        config=config.to_dict(),
        before=before,
        after=after,
        edits=plan.to_list(),
        notes=plan.notes,
        steps=[Step(name, seconds) for name, seconds in context.seconds.items()],
        calibration=context.data.describe() if context.data else {},
        parity=True,  # apply() raises otherwise
        environment=environment() | {"dtype": str(context.model.dtype).removeprefix("torch.")},
    )


def read_report(folder: Path) -> CompressionReport | None:
    """The report beside a saved model; None where there is none.

    Raises:
        ValueError: what lies there is no report of this version.
    """
    path = folder / REPORT_FILE
    return _read(path) if path.is_file() else None


def model_size(model: PreTrainedModel) -> Size:
    """Parameters, stored bytes and blocks of a live model; no blocks where none can be found."""
    retie(model)
    try:
        blocks = {stack.path: len(stack) for stack in Anatomy(model).stacks}
    except UnsupportedModelError:
        blocks = {}
    return Size(parameter_count(model), stored_bytes(model), blocks)


def beside(source: str, name: str, revision: str | None = None) -> Path | None:
    """A file beside the weights of a model: in its folder, or in the local cache of the Hub; nothing is downloaded.

    Args:
        source: the folder, or the model's name on the Hub.
        name: of the file.
        revision: the commit on the Hub; the main branch's when None.
    """
    if not source or Path(source).is_dir():
        path = Path(source) / name
        return path if source and path.is_file() else None
    try:
        cached = try_to_load_from_cache(source, name, revision=revision)
    except ValueError:  # no name on the Hub, but of a folder that is no more, say
        return None
    return Path(cached) if isinstance(cached, str) else None


def _read(path: Path) -> CompressionReport:
    try:
        return CompressionReport.from_json(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is {error}: move it away") from error
