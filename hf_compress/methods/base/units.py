"""Units of a block, hidden ones of its FFN or heads of its attention: what they do on calibration data."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from hf_compress.anatomy.anatomy import Block
from hf_compress.anatomy.parts import linear_map
from hf_compress.calibration.capture import Seen, hooked, stream_tokens, watch_module
from hf_compress.calibration.held_out import is_held_out
from hf_compress.calibration.processes import gathered
from hf_compress.calibration.runner import BlockRunner
from hf_compress.errors import CalibrationError
from hf_compress.methods.base.ridge import HeldOutSums
from hf_compress.numerics.elimination import entries
from hf_compress.plan.plan import Plan
from hf_compress.rewrite.builders import Affine, heads_of, merge_units, narrow_attention, narrow_ffn

_FEW = 128  # inputs: sums of these in float64 cost nothing, and two processes come to the same as one
_TOLERANCE = 0.05  # of what comes out of a block, for rounding in half precision


@dataclass(frozen=True)
class Reduction:
    """Hidden units kept, clusters of them, or both: then each cluster is stood for by one unit of its own.

    Attributes:
        labels: cluster of each unit, (width).
        kept: units, a number for each new one, in the order of the clusters if there are any.
    """

    labels: Tensor | None = None
    kept: Tensor | None = None

    def inputs(self, size: int = 1) -> Tensor:
        """The inputs of the output projection that are left of units of `size` inputs, where units are kept."""
        assert self.kept is not None
        return entries(self.kept, size)

    def columns(self, writes: Tensor, size: int = 1) -> Tensor:
        """What is left of an output projection (inputs, hidden) if nothing is solved for.

        Rows of the units kept, or sums over clusters.
        """
        if self.labels is None:
            return writes[self.inputs(size).to(writes.device)]
        labels = self.labels.to(writes.device)
        return writes.new_zeros(int(labels.max()) + 1, writes.shape[1]).index_add_(0, labels, writes)


@dataclass
class UnitStatistics(HeldOutSums):
    """Sums over calibration tokens of the regression of what has to be written on what the units give.

    Attributes:
        rows: what they give at some tokens, (tokens, inputs) float32: what units are clustered by. Where they are not,
            of experts no more is kept than how many tokens there are, (tokens, 0).
    """

    rows: Tensor

    def take(self, inputs: Tensor) -> UnitStatistics:
        """The statistics of some of the inputs, in that order."""
        rows = self.rows[:, inputs.cpu()] if self.rows.shape[1] else self.rows
        return UnitStatistics(self.fitted.take(inputs), self.held.take(inputs), rows)


class Units(Protocol):
    """What a reduction has to know of units: hidden ones of an FFN or of one expert, or heads of an attention.

    Attributes:
        writes: the output projection, (inputs, hidden) float32, a row or several for each unit.
        size: how many rows a unit has there.
        index: a number of their own, for those who draw lots.
        name: whose they are, for messages.
        biased: whether a bias is added to what they write.
    """

    writes: Tensor
    size: int
    index: int
    name: str
    biased: bool


class BlockUnits(ABC):
    """Units of one block, by the projection that they write to the residual stream with, as the model is at the moment.

    Attributes:
        output: the projection.
        writes: its matrix, (inputs, hidden) float32.
        biased: whether it has a bias.
    """

    size: int = 1

    def __init__(self, block: Block, output: str) -> None:
        self.block, self.index, self.name = block, block.index, block.path
        self.output: nn.Module = block.module.get_submodule(output)
        self.writes = linear_map(self.output).detach().float()
        self.biased = self.output._parameters.get("bias") is not None

    @abstractmethod
    def draft(self, reduction: Reduction, writes: Affine | None) -> Plan:
        """The plan that leaves fewer units, with another output projection if one is given."""

    def run(self, number: int, runner: BlockRunner, stream: Tensor) -> Run:
        """Run the block on a stream of the batch of this number."""
        with watch_module(self.output) as seen:
            after = runner.run(self.index, stream)
        return self.read(number, seen, after, stream_tokens(self.block.stack, runner.batch, after))

    def read(self, number: int, seen: Seen, after: Tensor, real: Tensor) -> Run:
        """A run of the block from what the projection was seen to do in it."""
        if seen.given is None or seen.gave is None or seen.gave.numel() != real.numel() * seen.gave.shape[-1]:
            raise CalibrationError(f"{self.name} did not run once for each token; it cannot be narrowed")
        hidden, written = (part.reshape(*real.shape, -1)[real] for part in (seen.given, seen.gave))
        if not bool(torch.isfinite(hidden).all()):
            raise CalibrationError(
                f"the units of {self.name} have NaN or infinite activations on the calibration data; load the model in "
                "float32 or bfloat16, or look for the sample that causes it"
            )
        return Run(number, after, real, hidden, written)

    def multiplier(self, runner: BlockRunner, stream: Tensor, after: Tensor) -> float | None:
        """m, where the stream after the block has m times what they write in it; None where more comes after.

        Measured: they are made to write something else, and the stream has to differ by a multiple of that.
        """
        after = after.float()
        generator = torch.Generator().manual_seed(0)
        more = torch.randn(after.shape[-1], dtype=torch.float32, generator=generator).to(after) * after.std()
        with hooked([self.output.register_forward_hook(lambda module, args, output: output + more.to(output))]):
            change = (runner.run(self.index, stream).float() - after).flatten(0, -2)
        return checked_multiplier(float((change @ more).mean() / more.square().sum()), change, more)


class HiddenUnits(BlockUnits):
    """The hidden units of a block's FFN."""

    def __init__(self, block: Block) -> None:
        ffn = block.parts.ffn
        assert ffn is not None
        assert ffn.output is not None
        super().__init__(block, ffn.output)
        self.name = f"the FFN of {self.name}"

    def draft(self, reduction: Reduction, writes: Affine | None) -> Plan:
        if reduction.kept is not None:
            return narrow_ffn(self.block, reduction.kept, writes)
        assert reduction.labels is not None
        return merge_units(self.block, reduction.labels, writes)


class AttentionHeads(BlockUnits):
    """The key and value heads of a block's attention, each with the queries that read it."""

    def __init__(self, block: Block) -> None:
        heads = heads_of(block)
        super().__init__(block, heads.output)
        self.name = f"the attention of {self.name}"
        self.size = heads.per_group * heads.width

    def draft(self, reduction: Reduction, writes: Affine | None) -> Plan:
        assert reduction.kept is not None
        return narrow_attention(self.block, reduction.kept, writes)


class Run(NamedTuple):
    """What a block made of a stream.

    Attributes:
        number: of the batch, among those of all processes.
        after: the stream after it, (samples, positions, hidden).
        real: (samples, positions): tokens that may enter a statistic.
        hidden: what its units give at those, (tokens, inputs of their projection).
        written: what that writes, (tokens, hidden).
    """

    number: int
    after: Tensor
    real: Tensor
    hidden: Tensor
    written: Tensor


def observe(
    runs: Iterable[Run],
    targets: Callable[[int, Run], Tensor],
    weights: Sequence[Tensor] | None,
    row_tokens: int,
    affine: bool,
) -> UnitStatistics:
    """Sum up what units do in runs of their block, one a batch, over all processes.

    Args:
        targets: what they would have to write in a run, given its place among this process's: (tokens, hidden).
        weights: per batch of this process, (tokens): how much each counts; alike when None.
        row_tokens: of how many tokens of a batch to keep the activations, at least one.
        affine: whether the regression is to have a bias.
    """
    sums: HeldOutSums | None = None
    rows: dict[int, Tensor] = {}
    for place, run in enumerate(runs):
        target = targets(place, run)
        if sums is None:
            like = run.hidden if run.hidden.shape[1] > _FEW else run.hidden.double()
            sums = HeldOutSums.like_first(like, target.to(run.written), affine)
        counts = None if weights is None else weights[place]
        sums.update(run.hidden, target, counts, held=is_held_out(run.number))
        some = run.hidden if counts is None else run.hidden * counts[:, None].sqrt().to(run.hidden)
        rows[run.number] = some_rows(some, row_tokens)
    if sums is None:
        sums = HeldOutSums.like_first(None, None, affine)
    sums.reduce()
    return UnitStatistics(sums.fitted, sums.held, torch.cat(gathered(rows)))


def checked_multiplier(multiplier: float, change: Tensor, written: Tensor) -> float | None:
    """The multiplier, where a stream changed by that many times what was written; None where more comes between.

    Args:
        multiplier: as it was measured; NaN where nothing was written.
        change: of the stream, (tokens, hidden).
        written: (tokens, hidden), or (hidden) where it was the same for all tokens.
    """
    unexplained = float((change - multiplier * written).norm() / change.norm())
    return multiplier if multiplier > 0 and unexplained < _TOLERANCE else None


def some_rows(rows: Tensor, count: int) -> Tensor:
    """About so many of some rows, at equal distances, float32 on the CPU."""
    return rows[:: max(1, -(-len(rows) // count))].float().cpu()


def best(units: Units, scores: Tensor, count: int) -> Reduction:
    """Keep the units whose inputs score highest together."""
    scores = scores.view(-1, units.size).sum(dim=1)
    return Reduction(kept=scores.topk(count).indices.sort().values.cpu())
