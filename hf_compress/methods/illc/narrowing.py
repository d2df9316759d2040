"""FFNs narrowed one after another, each with the errors of those before it in sight.

Two streams pair up the stack, the original model's and that of the model compressed so far. In each block the hidden
units are reduced by what they do on the compressed stream; then the output projection is solved for anew. With R the
part of the stream that the FFN does not write, it is to make up what the original stream has beyond that:

    min over W, b of  Σ_tokens | W h̃ + b − (y − R̃) / m |²  +  λ · |W − W₀|²,

h̃ the activations of the units that are left, y the original stream after the block, R̃ what the compressed stream has
there without the FFN, m a constant of the model, W₀ the columns of the units kept. λ is chosen on batches held out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

from torch import Tensor

from hf_compress.anatomy.anatomy import Block
from hf_compress.anatomy.stacks import Stack
from hf_compress.anatomy.undo import Undo
from hf_compress.calibration.capture import stream_tokens, watch_module
from hf_compress.calibration.streams import StreamPair
from hf_compress.methods.base.context import CalibrationContext
from hf_compress.methods.illc.config import ILLCConfig
from hf_compress.methods.illc.experts import ExpertNarrowing
from hf_compress.methods.illc.reductions import REDUCTIONS
from hf_compress.methods.illc.units import (
    AttentionHeads,
    BlockUnits,
    HiddenUnits,
    Reduction,
    Run,
    UnitStatistics,
    observe,
)
from hf_compress.numerics.ridge import LeastSquares
from hf_compress.plan.plan import Plan
from hf_compress.rewrite.apply import carry_out
from hf_compress.rewrite.builders import Affine


class Narrowing:
    """Narrows the FFNs of a stack from the first block up; changes last until `undo` is rolled back.

    Args:
        pairs: batches before the first block; they go up with it.
        weights: per batch, (tokens): how much each counts; alike when None.
        choose: how so many units are chosen, in the place of the config's reduction.
    """

    def __init__(
        self,
        config: ILLCConfig,
        context: CalibrationContext,
        stack: Stack,
        pairs: list[StreamPair],
        weights: Sequence[Tensor] | None = None,
        choose: Callable[[BlockUnits, UnitStatistics, int], Reduction] | None = None,
    ) -> None:
        self.config, self.model, self.stack, self.pairs, self.weights = config, context.model, stack, pairs, weights
        self.choose = choose or partial(REDUCTIONS.resolve(config.reduction_name), config)

    def skip(self, index: int) -> None:
        """Pass a block by, as it is."""
        for pair in self.pairs:
            same = pair.compressed is pair.original  # nothing was changed yet
            pair.original = pair.runner.run(index, pair.original)
            pair.compressed = pair.original if same else pair.runner.run(index, pair.compressed)

    def narrow(self, index: int, heads: int | None, width: int | None, undo: Undo) -> tuple[Plan, list[dict[str, Any]]]:
        """Narrow a block to so many key and value heads, then to so many hidden units, and go past it; None for all.

        Returns:
            The plan, and what there is to tell of the attention and of the FFN.
        """
        before = [pair.original for pair in self.pairs]
        block = Block(self.model, self.stack, index)
        attention = [] if heads is None else [(AttentionHeads(block), heads)]
        parts_of = block.parts
        experts = width is not None and parts_of.ffn is not None and parts_of.ffn.kind == "experts"
        ffn = [] if width is None or experts else [(HiddenUnits(block), width)]
        parts: list[tuple[BlockUnits, int]] = [*attention, *ffn]
        targets = self._targets(index, [units for units, _ in parts])
        plan, notes = Plan(), []
        for (units, count), target in zip(parts, targets, strict=True):
            draft, told = self._narrow_units(units, count, target, before)
            carry_out(draft, self.model, undo)
            plan += draft
            notes.append({"block": index, "width": count} | ({} if units.size == 1 else {"part": "attention"}) | told)
        if experts:
            assert width is not None
            draft, told = self._experts(index, width, before)
            carry_out(draft, self.model, undo)
            plan += draft
            notes.append({"block": index, "width": width, **told})
        if self.config.iterative:
            for pair in self.pairs:
                pair.compressed = pair.runner.run(index, pair.compressed)
        return plan, notes

    def _targets(self, index: int, parts: list[BlockUnits]) -> list[_Targets]:
        """Take the original stream past a block; what each of its parts has to write from then on."""
        after: list[Tensor] = []
        written: list[list[Tensor]] = [[] for _ in parts]
        multipliers = [self._multiplier(units) for units in parts]
        for pair in self.pairs:
            with ExitStack() as hooks:
                seen = [hooks.enter_context(watch_module(units.output)) for units in parts]
                pair.original = pair.runner.run(index, pair.original)
            real = stream_tokens(self.stack, pair.runner.batch, pair.original)
            for units, one, kept, multiplier in zip(parts, seen, written, multipliers, strict=True):
                run = units.read(one, pair.original, real)
                kept.append(run.written if multiplier is None else run.written[:0])
            after.append(pair.original)
        return [_Targets(after, *part) for part in zip(written, multipliers, strict=True)]

    def _multiplier(self, units: BlockUnits) -> float | None:
        if not self.config.iterative or self.config.target != "stream":
            return None
        return units.multiplier(self.pairs[0].runner, self.pairs[0].compressed)

    def _narrow_units(
        self, units: BlockUnits, count: int, target: _Targets, before: list[Tensor]
    ) -> tuple[Plan, dict[str, Any]]:
        """The plan for one part of a block, and what there is to tell of it."""
        statistics = self._observe(units, target, before)
        reduction = self.choose(units, statistics, count)
        writes, notes = self._solve(units, reduction, statistics, target, before)
        if reduction.labels is not None:
            notes["clusters"] = reduction.labels.tolist()
        return units.draft(reduction, writes), notes

    def _experts(self, index: int, width: int, before: list[Tensor]) -> tuple[Plan, dict[str, Any]]:
        streams = [pair.compressed for pair in self.pairs] if self.config.iterative else before
        runs = [(pair.runner, stream) for pair, stream in zip(self.pairs, streams, strict=True)]
        return ExpertNarrowing(self.config, Block(self.model, self.stack, index)).plan(runs, width)

    def _observe(self, units: BlockUnits, target: _Targets, before: list[Tensor]) -> UnitStatistics:
        """What the units do on the compressed stream; on the original one where no layer is to see another."""

        def runs() -> Iterator[Run]:
            for pair, original in zip(self.pairs, before, strict=True):
                yield units.run(pair.runner, pair.compressed if self.config.iterative else original)

        return observe(runs(), target, self.weights, self.config.rows_of_a_batch(len(self.pairs)))

    def _solve(
        self,
        units: BlockUnits,
        reduction: Reduction,
        statistics: UnitStatistics,
        target: _Targets,
        before: list[Tensor],
    ) -> tuple[Affine, dict[str, Any]]:
        """The output projection of the units that are left, and how far from the target it ends."""
        columns = reduction.columns(units.writes, units.size)
        if self.config.compensation_name == "none":
            return (columns, None), {}
        if reduction.kept is not None:
            left = statistics.take(reduction.inputs(units.size))
        else:
            with Undo() as trial:
                carry_out(units.draft(reduction, None), self.model, trial)
                left = self._observe(HiddenUnits(units.block), target, before)
        affine = units.biased or (self.config.bias and units.size == 1)
        if self.config.compensation_name == "bias":
            return (columns, _mean_gap(left.all, columns).float() if affine or units.size == 1 else None), {}
        fit = left.fit(columns, affine)
        bias = None if fit.bias is None else fit.bias.float()
        return (fit.weight.float(), bias), {"error": fit.error, "penalty": fit.penalty}


class _Targets:
    """What a part of a block has to write, given what it writes in a run.

    Args:
        after: the original stream after the block, per batch.
        written: what the part wrote there, where `multiplier` is None.
        multiplier: of what the part writes, in the stream after the block; None where only its own output can be
            compared, since something else of the block follows.
    """

    def __init__(self, after: list[Tensor], written: list[Tensor], multiplier: float | None) -> None:
        self.after, self.written, self.multiplier = after, written, multiplier

    def __call__(self, number: int, run: Run) -> Tensor:
        if self.multiplier is None:
            return self.written[number]
        missing = (self.after[number] - run.after)[run.real].double() / self.multiplier
        return run.written.double() + missing


def _mean_gap(sums: LeastSquares, weight: Tensor) -> Tensor:
    """The bias with which x · weight has the mean of y."""
    return (sums.y_sum - sums.x_sum @ weight.to(sums.x_sum)) / sums.count
