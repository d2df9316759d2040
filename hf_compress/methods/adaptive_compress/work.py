"""What AdaptiveCompress has to do."""

from __future__ import annotations

from hf_compress.calibration.memory import working_memory
from hf_compress.methods.adaptive_compress.config import AdaptiveCompressConfig
from hf_compress.methods.adaptive_compress.fit import START_TOKENS, layers_of
from hf_compress.methods.base.context import CalibrationContext
from hf_compress.methods.base.work import Work, hidden_of


def work_of(config: AdaptiveCompressConfig, context: CalibrationContext) -> Work:
    """Passes as far as the last bottleneck, and for each token both maps, forward and backward, at every bottleneck.

    Tokens that are kept from the first pass, for which there is room, need no other.
    """
    stack = context.stack(config.stack)
    layers, hidden = layers_of(config, stack), hidden_of(stack)
    features = hidden if config.scheduled else config.expansion * hidden
    tokens = context.calibration.tokens or context.calibration.samples
    first = min(1.0, START_TOKENS * hidden / tokens)  # for means and directions
    room = working_memory().streams / (tokens * hidden * len(layers) * context.model.dtype.itemsize)
    passes = (first + config.epochs * (1 - min(first, room))) * (max(layers) + 1) / len(stack)
    products = 6.0 * config.epochs * tokens * hidden * features * len(layers)
    return Work(passes, products, sweeps=passes, rewrites=False)
