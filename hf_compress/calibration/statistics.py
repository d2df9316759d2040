"""Statistics of every block from one pass over the calibration data, gathered as it streams by."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from hf_compress.anatomy.stacks import Stack
from hf_compress.calibration.capture import inference, stream_tokens
from hf_compress.calibration.data import Calibration
from hf_compress.calibration.processes import gathered, here, summed, total
from hf_compress.calibration.sweep import Passed, Sweep

Pooling = Literal["mean", "last"]


@dataclass(frozen=True)
class BlockStatistics:
    """What one pass over the calibration data tells of each block of a stack.

    Attributes:
        pooled: per block, (samples, width) float32: its output pooled over each sample's real tokens.
        influence: (blocks,) float64: 1 - mean cosine of a token's stream before and after the block
            (ShortGPT, arXiv 2403.03853, equation 1).
        change: (blocks - span + 1,) float64: mean angle, as a share of pi, between a token's stream before block l and
            after block l + span - 1 (arXiv 2403.17887, equation 3).
    """

    pooled: list[Tensor]
    influence: Tensor
    change: Tensor


class _Collector:
    """Sums of one pass."""

    def __init__(self, stack: Stack, pooling: Pooling, span: int) -> None:
        self.stack, self.pooling, self.span = stack, pooling, span
        self.before: dict[tuple[int, int], Tensor] = {}  # by batch and block, of the last blocks
        self.pooled: list[dict[int, Tensor]] = [{} for _ in range(len(stack))]  # by batch
        self.influence = torch.zeros(len(stack), dtype=torch.float64)
        self.change = torch.zeros(len(stack) - span + 1, dtype=torch.float64)
        self.tokens = 0

    def add(self, index: int, passed: Passed) -> None:
        """What a block made of a batch."""
        real = stream_tokens(self.stack, passed.batch, passed.after)
        self.pooled[index][passed.number] = pool(passed.after, real, self.pooling)
        self.influence[index] += (1 - _cosine(passed.before, passed.after, real)).sum()
        self.before[passed.number, index] = passed.before
        if (start := index - self.span + 1) >= 0:
            before = self.before.pop((passed.number, start))
            self.change[start] += (torch.arccos(_cosine(before, passed.after, real)) / torch.pi).sum()
        self.tokens += int(real.sum()) if index == 0 else 0

    def reduce(self) -> None:
        """Make these the sums over the batches of all processes."""
        if here()[1] > 1:
            summed([self.influence, self.change])
            self.tokens = int(total(self.tokens)[0])
            self.pooled = [dict(enumerate(gathered(rows))) for rows in self.pooled]


def _cosine(before: Tensor, after: Tensor, real: Tensor) -> Tensor:
    """Cosines of the real tokens' streams at two depths, (tokens,) float64 on the CPU."""
    return F.cosine_similarity(before[real].float(), after[real].float(), dim=-1).clamp(-1, 1).double().cpu()


def block_statistics(
    model: PreTrainedModel, stack: Stack, calibration: Calibration, pooling: Pooling = "mean", span: int = 1
) -> BlockStatistics:
    """Pooled outputs and influence of every block of `stack`, from one pass over the data, block by block.

    A stream a batch is kept (`span` of them), and the samples' pooled states: samples x width x 4 bytes a block.

    Raises:
        CalibrationError: a block's activations are not finite; the message names it.
    """
    collector = _Collector(stack, pooling, span)
    with inference(model):
        sweep = Sweep(model, stack, calibration)
        for index in sweep.blocks("reading activations"):
            for passed in sweep.past(index):
                collector.add(index, passed)
    collector.reduce()
    tokens, pooled = max(1, collector.tokens), [torch.cat(list(rows.values())) for rows in collector.pooled]
    return BlockStatistics(pooled, collector.influence / tokens, collector.change / tokens)


def pool(stream: Tensor, real: Tensor, pooling: Pooling) -> Tensor:
    """One row a sample, (samples, width) float32 on the CPU: the mean over its real tokens, or the last of them.

    Samples without a single real token are left out.
    """
    some = real.any(dim=1)
    stream, real = stream[some].float(), real[some]
    if pooling == "last":
        last = real.shape[1] - 1 - real.flip(1).int().argmax(dim=1)
        return stream[torch.arange(len(stream)), last].cpu()
    weight = real.unsqueeze(-1)
    return ((stream * weight).sum(dim=1) / weight.sum(dim=1)).cpu()
