"""The plan of LRP: leave out what carries little relevance, then round what is left."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from hf_compress.calibration.capture import inference
from hf_compress.methods.base.context import CalibrationContext
from hf_compress.methods.lrp.config import STRUCTURED, LRPConfig
from hf_compress.methods.lrp.units import plan_units
from hf_compress.methods.lrp.weights import plan_weights
from hf_compress.plan.plan import Plan


def plan_by_relevance(config: LRPConfig, context: CalibrationContext) -> Plan:
    """Decide what goes and how precisely the rest is kept.

    Raises:
        UnsupportedModelError: there is no rule of relevance for a part of the model, gradients do not come through it,
            or there is nothing that could go.
        ValueError: nothing would be left, or a budget that does not suffice.
        CalibrationError: no data, or data that gives NaN.
    """
    context = _counting_what_is_read(context)
    structured = config.prunes and config.granularity in STRUCTURED
    if structured and config.granularity == "block" and config.quantizes:
        raise ValueError("leave blocks out in a compress() of its own, and then give bits= to what is left")
    notes: dict[str, Any] = {"score": config.score_name}
    left = Plan()
    with inference(context.model), context.drafts() as drafts:
        if structured:
            left = plan_units(config, context, context.stack(config.stack), drafts)
            notes |= left.notes
        if config.quantizes or (config.prunes and not structured):
            prunes = config.prunes and not structured
            notes |= plan_weights(config, context, context.stack(config.stack), drafts, prunes)
    return Plan(drafts.plan.edits + left.edits, drafts.plan.tensors, notes)


def _counting_what_is_read(context: CalibrationContext) -> CalibrationContext:
    """The context; of an encoder, with data of which special tokens count.

    Elsewhere they are kept out of statistics, since what decoders have there is huge and tells nothing. The head of an
    encoder reads nothing else, often: solved for all other tokens alone, weights take its outputs off.
    """
    model = context.model
    causal = model.can_generate() or any(getattr(part, "is_causal", False) for part in model.modules())
    return context if causal or context.data is None else replace(context, data=context.data.with_special_tokens())
