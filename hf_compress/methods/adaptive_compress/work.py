"""What AdaptiveCompress has to do."""

from __future__ import annotations

from hf_compress.methods.adaptive_compress.config import AdaptiveCompressConfig
from hf_compress.methods.adaptive_compress.fit import layers_of
from hf_compress.methods.base.context import CalibrationContext
from hf_compress.methods.base.work import Work, hidden_of


def work_of(config: AdaptiveCompressConfig, context: CalibrationContext) -> Work:
    """Passes as far as the last bottleneck, and for each token both maps, forward and backward, at every bottleneck."""
    stack = context.stack(config.stack)
    layers, hidden = layers_of(config, stack), hidden_of(stack)
    features = hidden if config.scheduled else config.expansion * hidden
    tokens = config.epochs * (context.calibration.tokens or context.calibration.samples)
    passes = (config.epochs + 1) * (max(layers) + 1) / len(stack)
    return Work(passes, 6.0 * tokens * hidden * features * len(layers), sweeps=passes, rewrites=False)
