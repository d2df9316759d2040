"""One method carried out on a model: planned, done, checked, and told in the model's history."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import fields
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

from transformers import PreTrainedModel

from hf_compress.anatomy.dispatch import is_offloaded
from hf_compress.api.identity import identity_of, known_in_memory, tensors_of
from hf_compress.calibration.compute import Compute, bytes_of
from hf_compress.calibration.data import Calibration
from hf_compress.calibration.processes import agree, by_one, from_one, here
from hf_compress.calibration.workdir import check_room, worked_in
from hf_compress.errors import CalibrationError
from hf_compress.methods.base.amounts import AMOUNT, SIZE
from hf_compress.methods.base.context import CalibrationContext
from hf_compress.methods.base.journal import Journal, Shared
from hf_compress.methods.base.registry import common_results, plan_for, work_for
from hf_compress.methods.base.settings import CompressionConfig
from hf_compress.methods.base.work import Work
from hf_compress.numerics.fingerprint import digest, fingerprint
from hf_compress.plan.plan import Plan
from hf_compress.report.edits import log_decisions
from hf_compress.report.history import add_stage, history_of, model_size, stage_of
from hf_compress.rewrite.apply import Change
from hf_compress.rewrite.probe import Probe


def compress_by(
    model: PreTrainedModel,
    config: CompressionConfig,
    data: Calibration | None,
    compute: Compute,
    preparing: float = 0.0,
    common: Path | None = None,
) -> None:
    """Change `model` by one method, and add a stage to its history; after an error it is as it was.

    Args:
        preparing: seconds that it took to make the data, for the history.
        common: beside a workdir, a folder for results that are the same whatever the amount, for runs with others.
    """
    _check_alike(model, config, data, compute)
    context = CalibrationContext(model, data, {"prepare calibration data": preparing} if data else {})
    history, before = history_of(model), model_size(model)
    with _computing(compute, config, context, common), Change(model) as change:
        start = perf_counter()
        probe = Probe.of(model, data.batches[0] if data else None)
        probing = perf_counter() - start
        context.change = change
        plan = _plan(config, context)
        with context.step("apply and check"):
            change.finish(plan, probe)
        agree(compressed_model=lambda: known_in_memory(model))
        context.seconds["apply and check"] += probing
    add_stage(model, stage_of(config, plan, context, before, model_size(model)), history)


def plan_by(model: PreTrainedModel, config: CompressionConfig, data: Calibration | None, compute: Compute) -> Plan:
    """What `compress_by` would do."""
    _check_alike(model, config, data, compute)
    context = CalibrationContext(model, data)
    with _computing(compute, config, context):
        return _plan(config, context)


@contextmanager
def _computing(
    compute: Compute, config: CompressionConfig, context: CalibrationContext, common: Path | None = None
) -> Iterator[None]:
    """Inside, work is done as `compute` says, and its results are kept where that says."""
    with ExitStack() as held:
        if compute.folder is not None:
            held.enter_context(by_one(worked_in)(compute.folder))
            with context.step("look for an earlier run"):
                known_by = partial(identity_of, context.model, config, context.data, compute.device, here()[1])
                identity = from_one(known_by)
                context.journal = Journal(compute.folder, identity, _shared(config, identity, common))
                needed = disk_needed(context, work_for(config, context))
                from_one(partial(check_room, compute.folder, needed))
        held.enter_context(compute.applied(context.model))
        yield


def _shared(config: CompressionConfig, identity: dict[str, Any], folder: Path | None) -> Shared | None:
    """Where results lie that do not depend on how much is taken out."""
    names = common_results(config)
    if folder is None or not names:
        return None
    amounts = {field.name for field in fields(config) if field.metadata.get("group") in (AMOUNT, SIZE)}
    settings = {name: value for name, value in identity["settings"].items() if name not in amounts}
    own = {**identity, "settings": settings}
    return Shared(folder / f"{config.method}-{digest(own)[:16]}", own, names)


def disk_needed(context: CalibrationContext, work: Work | None) -> int:
    """Bytes of the results that a workdir keeps at most: of blocks that get new weights."""
    if work is not None and not work.rewrites:
        return 0
    blocks = sum(bytes_of(stack.blocks) for stack in context.anatomy.stacks)
    return blocks * (2 if is_offloaded(context.model) else 1)  # what is finished, and what the model reads


def _plan(config: CompressionConfig, context: CalibrationContext) -> Plan:
    with context.naming_failures():
        plan = plan_for(config, context)
    log_decisions(config.method, plan)
    return plan


def _check_alike(model: PreTrainedModel, config: CompressionConfig, data: Calibration | None, compute: Compute) -> None:
    """Raise where several processes are not to do the same, or have too few batches to share."""
    agree(
        settings=lambda: repr(config),
        compute=lambda: repr((compute.max_memory, compute.workdir is None)),
        calibration_data=lambda: fingerprint(tensors_of(data)),
        model=lambda: known_in_memory(model),
    )
    if data is not None and len(data) < here()[1]:
        raise CalibrationError(
            f"{len(data)} batches are too few for {here()[1]} processes to share: give at least as many batches as "
            "processes, by more data or a smaller batch_size"
        )
