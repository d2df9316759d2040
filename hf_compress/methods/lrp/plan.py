"""The plan of LRP: leave out what carries little relevance, then round what is left."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hf_compress.calibration.capture import inference
from hf_compress.methods.lrp.config import STRUCTURED
from hf_compress.methods.lrp.units import plan_units
from hf_compress.methods.lrp.weights import plan_weights
from hf_compress.plan import Plan
from hf_compress.workbench import Workbench

if TYPE_CHECKING:
    from hf_compress.methods.lrp.config import LRPConfig


def plan_by_relevance(config: LRPConfig, bench: Workbench) -> Plan:
    """Decide what goes and how precisely the rest is kept.

    Raises:
        UnsupportedModelError: there is no rule of relevance for a part of the model, gradients do not come through it,
            or there is nothing that could go.
        ValueError: nothing would be left, or a budget that does not suffice.
        CalibrationError: no data, or data that gives NaN.
    """
    structured = config.prunes and config.granularity in STRUCTURED
    if structured and config.granularity == "block" and config.quantizes:
        raise ValueError("leave blocks out in a compress() of its own, and then give bits= to what is left")
    plan = Plan()
    notes: dict[str, Any] = {"score": config.score_name}
    with inference(bench.model), bench.trial() as undo:
        if structured:
            part = plan_units(config, bench, bench.stack(config.stack), undo)
            plan, notes = part, notes | part.notes
        if config.quantizes or (config.prunes and not structured):
            part = plan_weights(config, bench, bench.stack(config.stack), undo, config.prunes and not structured)
            plan, notes = plan.then(part), notes | part.notes
    return Plan(plan.edits, plan.tensors, notes)
