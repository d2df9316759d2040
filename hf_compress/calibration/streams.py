"""Batches on their way up a stack, block by block, through the original model and the compressed one side by side."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedModel

from hf_compress.anatomy.stacks import Stack
from hf_compress.calibration.data import Calibration
from hf_compress.calibration.runner import BlockRunner


@dataclass
class StreamPair:
    """A batch, and the streams (samples, positions, width) that both models have at some block of it.

    Attributes:
        runner: runs blocks on streams of this batch.
        original: the stream of the model as it was given.
        compressed: the stream of the model with the blocks so far changed; the same tensor while nothing is changed.
    """

    runner: BlockRunner
    original: Tensor
    compressed: Tensor


def start_pairs(model: PreTrainedModel, stack: Stack, calibration: Calibration, tokens: int) -> list[StreamPair]:
    """Before the first block, as many batches as hold about `tokens` tokens, spread over the data, at least four.

    Two streams a batch are kept in memory, and no more.
    """
    runners = [BlockRunner(model, stack, batch) for batch in calibration.about(tokens, calibration.tokens, least=4)]
    return [StreamPair(runner, stream, stream) for runner in runners for stream in [runner.start()]]


def advance(pairs: list[StreamPair], index: int) -> None:
    """Take the compressed stream past a block."""
    for pair in pairs:
        pair.compressed = pair.runner.run(index, pair.compressed)
