"""What LayerCollapse has to do."""

from __future__ import annotations

from hf_compress.methods.base.context import CalibrationContext
from hf_compress.methods.base.work import Work, factor, gram, hidden_of, share_of_samples, solve
from hf_compress.methods.layer_collapse.closed_form import collapsible, count_of
from hf_compress.methods.layer_collapse.config import LayerCollapseConfig


def work_of(config: LayerCollapseConfig, context: CalibrationContext) -> Work:
    """A sweep for every FFN that goes, with a fit for each that is left; by loss, three trials of half the blocks."""
    stack = context.stack(config.stack)
    if config.variant == "paper":
        return Work()
    able, hidden = collapsible(context, stack, config.rank), hidden_of(stack)
    count = len(able) if config.target_r2 is not None else count_of(config, len(able))
    tokens = context.calibration.tokens or context.calibration.samples
    fit = gram(hidden, tokens) + hidden**2 * tokens + 2 * (factor(hidden) + solve(hidden, hidden))
    fits = sum(len(able) - done for done in range(count))
    tried = share_of_samples(context, config.choice_samples).of_all if config.criterion == "loss" else 0.0
    sweeps = count + (4 * count if tried else 0)
    return Work(count + 3 * count * tried, fits * fit, sweeps, streams=tried)
