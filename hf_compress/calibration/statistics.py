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
from hf_compress.calibration.marks import Marks
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

    def __init__(self, stack: Stack, pooling: Pooling, span: int, first: int) -> None:
        self.stack, self.pooling, self.span, self.first = stack, pooling, span, first
        self.before: dict[tuple[int, int], Tensor] = {}  # by batch and block, of the last blocks
        self.pooled: list[dict[int, Tensor]] = [{} for _ in range(len(stack))]  # by batch
        self.influence = torch.zeros(len(stack), dtype=torch.float64)
        self.change = torch.zeros(len(stack) - span + 1, dtype=torch.float64)
        self.tokens = 0

    def add(self, index: int, passed: Passed) -> None:
        """What a block made of a batch."""
        real = stream_tokens(self.stack, passed.batch, passed.after)
        self.pooled[index][passed.number] = pool(passed.after, real, self.pooling)
        cosine = _cosine(passed.before, passed.after, real)
        self.influence[index] += (1 - cosine).sum()
        self.before[passed.number, index] = passed.before
        if (start := index - self.span + 1) >= 0:
            before = self.before.pop((passed.number, start))
            cosine = cosine if start == index else _cosine(before, passed.after, real)
            self.change[start] += (torch.arccos(cosine) / torch.pi).sum()
        self.tokens += int(real.sum()) if index == self.first else 0

    def reduce(self) -> None:
        """Make these the sums over the batches of all processes."""
        if here()[1] > 1:
            summed([self.influence, self.change])
            self.tokens = int(total(self.tokens)[0])
            self.pooled = [dict(enumerate(gathered(rows))) for rows in self.pooled]


def _cosine(before: Tensor, after: Tensor, real: Tensor) -> Tensor:
    """Cosines of the real tokens' streams at two depths, (tokens,) float64 on the CPU."""
    return F.cosine_similarity(before[real].float(), after[real].float(), dim=-1).clamp(-1, 1).double().cpu()


@dataclass
class Earlier:
    """What a pass over the data leaves for the next one, over the same data, when blocks have merged in between.

    Attributes:
        sweep: takes the batches past the blocks; None before the first pass.
        statistics: of the last pass.
    """

    sweep: Sweep | None = None
    statistics: BlockStatistics | None = None

    def merged(self, index: int) -> None:
        """A block has become one with that behind it, which is out of the stack."""
        if self.sweep is not None:
            self.sweep.merged(index)

    def joined(self, new: BlockStatistics, sweep: Sweep, start: int) -> BlockStatistics:
        """The statistics of a pass that began at block `start`, and of the last one before that; kept for the next."""
        self.sweep = sweep
        if (old := self.statistics) is not None:
            new = BlockStatistics(
                [*old.pooled[:start], *new.pooled[start:]],
                torch.cat([old.influence[:start], new.influence[start:]]),
                torch.cat([old.change[:start], new.change[start:]]),
            )
        self.statistics = new
        return new


def block_statistics(
    model: PreTrainedModel,
    stack: Stack,
    calibration: Calibration,
    pooling: Pooling = "mean",
    span: int = 1,
    earlier: Earlier | None = None,
) -> BlockStatistics:
    """Pooled outputs and influence of every block of `stack`, from one pass over the data, block by block.

    A stream a batch is kept (`span` of them), and the samples' pooled states: samples x width x 4 bytes a block.

    Args:
        earlier: what the last pass has left, where there are to be several and `span` is 1: what it tells of blocks
            that are what they were is not measured again.

    Raises:
        CalibrationError: a block's activations are not finite; the message names it.
    """
    sweep = None if earlier is None else earlier.sweep
    with inference(model):
        if sweep is None:
            sweep = Sweep(model, stack, calibration, None if earlier is None else Marks())
        start = 0 if sweep.marks is None else sweep.marks.start
        collector = _Collector(stack, pooling, span, start)
        for index in sweep.blocks("reading activations"):
            for passed in sweep.past(index):
                collector.add(index, passed)
    collector.reduce()
    tokens = max(1, collector.tokens)
    pooled = [torch.cat(list(rows.values())) if rows else torch.empty(0, 0) for rows in collector.pooled]
    found = BlockStatistics(pooled, collector.influence / tokens, collector.change / tokens)
    return found if earlier is None else earlier.joined(found, sweep, start)


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
