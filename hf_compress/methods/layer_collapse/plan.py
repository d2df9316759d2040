"""What LayerCollapse does to a model: in closed form, or by what training has left."""

from __future__ import annotations

from dataclasses import replace

from hf_compress.methods.base.context import CalibrationContext
from hf_compress.methods.base.schedule import TrainingSchedule
from hf_compress.methods.base.settings import CompressionConfig
from hf_compress.methods.layer_collapse.closed_form import collapsible, count_of, plan_closed_form
from hf_compress.methods.layer_collapse.config import LayerCollapseConfig
from hf_compress.methods.layer_collapse.product import plan_by_product
from hf_compress.methods.layer_collapse.training import Blending, ClosedForm
from hf_compress.plan.plan import Plan


def plan_collapses(config: LayerCollapseConfig, context: CalibrationContext) -> Plan:
    """Linear maps in the place of FFNs."""
    return plan_by_product(config, context) if config.variant == "paper" else plan_closed_form(config, context)


def training_schedule(config: LayerCollapseConfig) -> TrainingSchedule:
    """Activations that are blended away, or a closed form before the first step."""
    return Blending(config) if config.variant == "paper" or config.gradual else ClosedForm(config)


def single_collapses(config: LayerCollapseConfig, context: CalibrationContext) -> list[CompressionConfig]:
    """The settings for one FFN, as often as there are FFNs to collapse."""
    if config.variant == "paper" or config.gradual or config.target_r2 is not None:
        raise ValueError("only a closed form with a ratio or num_layers can be cut into steps; leave out every=")
    able = collapsible(context, context.stack(config.stack), config.rank)
    return [replace(config, ratio=None, num_layers=1)] * count_of(config, len(able))
