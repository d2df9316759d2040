"""What MKA does to a model: by its default variant or by the paper's rule."""

from __future__ import annotations

from dataclasses import replace

from hf_compress.methods.base.context import CalibrationContext
from hf_compress.methods.base.settings import CompressionConfig
from hf_compress.methods.mka.average import plan_by_averaging
from hf_compress.methods.mka.config import MKAConfig
from hf_compress.methods.mka.refit import plan_by_refitting
from hf_compress.modules.compact import CompactLinear
from hf_compress.plan.plan import Plan
from hf_compress.rewrite.record import missing


def plan_merges(config: MKAConfig, context: CalibrationContext) -> Plan:
    """Merges of neighbouring blocks.

    Raises:
        UnsupportedModelError: the blocks' weights are packed or sparse.
    """
    stack = context.stack(config.stack)
    if any(isinstance(part, CompactLinear) for part in stack.blocks.modules()):
        what = f"the weights of {stack.path} are in no form that can be averaged or solved for"
        raise missing(what, context.model, stack.path)
    return plan_by_averaging(config, context) if config.variant == "paper" else plan_by_refitting(config, context)


def single_merges(config: MKAConfig, context: CalibrationContext) -> list[CompressionConfig]:
    """The settings for one merge, as often as there are to be."""
    if config.amount is None:
        raise ValueError("a threshold does not say how many merges there will be; give ratio= or num_merges=")
    return [replace(config, ratio=None, num_merges=1)] * config.amount.of_blocks(len(context.stack(config.stack)))
