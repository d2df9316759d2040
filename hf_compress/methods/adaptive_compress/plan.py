"""What AdaptiveCompress does to a model: bottlenecks that are fitted beside it, and put in."""

from __future__ import annotations

from hf_compress.methods.adaptive_compress.config import AdaptiveCompressConfig
from hf_compress.methods.adaptive_compress.fit import fit_all
from hf_compress.methods.base.context import CalibrationContext
from hf_compress.plan.plan import Plan


def plan_bottlenecks(config: AdaptiveCompressConfig, context: CalibrationContext) -> Plan:
    """Bottlenecks behind blocks."""
    if config.mode == "observe":
        raise ValueError(
            "mode='observe' leaves the model as it is: hf_compress.fit(model, config, …) gives the bottlenecks; or "
            "set mode='splice'"
        )
    with context.step("fit bottlenecks"):
        return context.journal.plan("bottlenecks", lambda: _fitted(config, context))


def _fitted(config: AdaptiveCompressConfig, context: CalibrationContext) -> Plan:
    (found,) = fit_all(context.model, [config], context.calibration, context.journal.folder)
    return found.plan(context.model)
