"""Blocks narrowed one after another, each with the errors of those before it in sight.

Two streams pair up the stack, the original model's and that of the model compressed so far. In each block the hidden
units, or the heads, are reduced by what they do on the compressed stream; then the output projection is solved for
anew. With R the part of the stream that the FFN does not write, it is to make up what the original has beyond that:

    min over W, b of  Σ_tokens | W h̃ + b − (y − R̃) / m |²  +  λ · |W − W₀|²,

h̃ the activations of the units that are left, y the original stream after the block, R̃ what the compressed stream has
there without the FFN, m a constant of the model, W₀ the columns of the units kept. λ is chosen on batches held out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, islice
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from hf_compress.anatomy.anatomy import Block
from hf_compress.anatomy.stacks import Stack
from hf_compress.anatomy.undo import Undo
from hf_compress.calibration.capture import Seen, stream_tokens, watch_module
from hf_compress.calibration.processes import from_one
from hf_compress.calibration.runner import BlockRunner
from hf_compress.calibration.sweep import StreamPair, advance, turns
from hf_compress.methods.base.context import Drafts
from hf_compress.methods.base.journal import Journal
from hf_compress.methods.base.units import (
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

Runs = Sequence[tuple[int, BlockRunner, Tensor]]  # batches by their numbers, and the stream before the block
_Taken = tuple[StreamPair, Tensor, list[Seen]]
ExpertNarrower = Callable[[int, int, Runs], Plan]  # of a block, to a width


@dataclass(frozen=True)
class Compensation:
    """How what is left of a block makes up for what has gone.

    Attributes:
        by: "ridge" (the output projection is solved anew), "bias" (it gets the bias that keeps the mean), or "none".
        target: "stream", what the original block left in the stream, or "ffn", what its part wrote.
        iterative: whether a block sees the stream of the compressed blocks below; else the original's.
        bias: whether FFNs' output projections without a bias get one.
    """

    by: str = "ridge"
    target: str = "stream"
    iterative: bool = True
    bias: bool = False


@dataclass
class Narrowing:
    """Narrows a stack from the first block up.

    Attributes:
        pairs: batches before the first block; they go up with it.
        choose: which units of a part are to be left, given what they do and how many.
        weights: per batch, (tokens): how much each counts; alike when None.
        row_tokens: of how many tokens of a batch `choose` is told what the units give.
        experts: narrows the experts of a block, where there may be any.
    """

    model: PreTrainedModel
    stack: Stack
    pairs: list[StreamPair]
    choose: Callable[[BlockUnits, UnitStatistics, int], Reduction]
    compensation: Compensation
    weights: Sequence[Tensor] | None = None
    row_tokens: int = 1
    experts: ExpertNarrower | None = None

    def run(self, heads: Mapping[int, int], widths: Mapping[int, int], drafts: Drafts) -> list[dict[str, Any]]:
        """Narrow blocks to so many key and value heads and to so many hidden units, by the number of the block.

        Returns:
            Notes of every part that was narrowed.
        """
        notes, last = [], max([*heads, *widths])
        for index in turns(self.stack, range(last + 1), "narrowing blocks", drafts.hold):
            if index not in heads and index not in widths:
                for pair in self.pairs:
                    pair.take_both(index)
                continue
            for count, draft in self._narrowed(index, heads.get(index), widths.get(index), drafts.journal):
                drafts.add(replace(draft, notes={}))
                notes.append({"block": index, "width": count, **draft.notes})
                del draft  # its weights, while the next are solved for
            if self.compensation.iterative and index < last:
                advance(self.pairs, index)
        return notes

    def _narrowed(
        self, index: int, heads: int | None, width: int | None, journal: Journal
    ) -> Iterator[tuple[int, Plan]]:
        """For each part of a block that is to be narrowed, how many units stay and the plan, to be carried out at once.

        The original stream goes past the block.
        """
        before = [pair.original for pair in self.pairs]
        block = Block(self.model, self.stack, index)
        ffn = block.parts.ffn
        experts = ffn is not None and ffn.kind == "experts"
        parts: list[tuple[BlockUnits, int]] = []
        if heads is not None:
            parts.append((AttentionHeads(block), heads))
        if width is not None and not experts:
            parts.append((HiddenUnits(block), width))
        targets = self._targets(index, [units for units, _ in parts])
        for (units, count), target in zip(parts, targets, strict=True):
            yield count, journal.plan(f"narrow {units.name}", partial(self._plan, units, count, target, before))
        if width is not None and experts:
            assert self.experts is not None
            runs = self._runs(before)
            yield width, journal.plan(f"narrow the experts of {block.path}", partial(self.experts, index, width, runs))

    def _runs(self, before: list[Tensor]) -> Runs:
        """Of the streams that a block is to see: of the compressed blocks below, or of the original ones."""
        streams = [pair.compressed for pair in self.pairs] if self.compensation.iterative else before
        return [(pair.number, pair.runner, stream) for pair, stream in zip(self.pairs, streams, strict=True)]

    def _targets(self, index: int, parts: list[BlockUnits]) -> list[_Targets]:
        """Take the original stream past a block; what each of its parts has to write from then on."""
        after: list[Tensor] = []
        written: list[list[Tensor]] = [[] for _ in parts]
        taken = self._original_past(index, parts)
        first = list(islice(taken, 1))
        multipliers = [self._multiplier(units, first) for units in parts]
        for pair, _, seen in chain(first, taken):
            real = stream_tokens(self.stack, pair.runner.batch, pair.original)
            for units, one, kept, multiplier in zip(parts, seen, written, multipliers, strict=True):
                run = units.read(pair.number, one, pair.original, real)
                one.given = one.gave = None  # not to be held while the next batch runs
                kept.append(run.written if multiplier is None else run.written[:0])
                del run
            after.append(pair.original)
        return [_Targets(after, *part) for part in zip(written, multipliers, strict=True)]

    def _affine(self, units: BlockUnits) -> bool:
        """Whether its output projection has a bias, or is to get one."""
        return units.biased or (self.compensation.bias and units.size == 1)

    def _original_past(self, index: int, parts: list[BlockUnits]) -> Iterator[_Taken]:
        """Pairs whose original stream is past a block, what it was before, and what parts of the block did there."""
        for pair in self.pairs:
            with ExitStack() as hooks:
                seen = [hooks.enter_context(watch_module(units.output)) for units in parts]
                before = pair.take_original(index)
            yield pair, before, seen

    def _multiplier(self, units: BlockUnits, first: list[_Taken]) -> float | None:
        """Of what units write, by the first batch, which the first process has."""
        if not self.compensation.iterative or self.compensation.target != "stream":
            return None

        def measured() -> float | None:
            pair, before, _ = first[0]
            return units.multiplier(pair.runner, before, pair.original)

        return from_one(measured)

    def _plan(self, units: BlockUnits, count: int, target: _Targets, before: list[Tensor]) -> Plan:
        """The plan for one part of a block; its notes tell of it."""
        statistics = self._observe(units, target, before)
        reduction = self.choose(units, statistics, count)
        if reduction.kept is not None:
            statistics = statistics.take(reduction.inputs(units.size))  # wide sums are not held any longer
        writes, notes = self._solve(units, reduction, statistics, target, before)
        if units.size > 1:
            notes["part"] = "attention"
        if reduction.labels is not None:
            notes["clusters"] = reduction.labels.tolist()
        return replace(units.draft(reduction, writes), notes=notes)

    def _observe(self, units: BlockUnits, target: _Targets, before: list[Tensor]) -> UnitStatistics:
        """What the units do on the compressed stream; on the original one where no layer is to see another."""
        runs = (units.run(*one) for one in self._runs(before))
        return observe(runs, target, self.weights, self.row_tokens, self._affine(units))

    def _solve(
        self,
        units: BlockUnits,
        reduction: Reduction,
        left: UnitStatistics,
        target: _Targets,
        before: list[Tensor],
    ) -> tuple[Affine, dict[str, Any]]:
        """The output projection of the units that are left, and how far from the target it ends.

        Args:
            left: statistics of the units kept; of all units where they are merged.
        """
        columns = reduction.columns(units.writes, units.size)
        if self.compensation.by == "none":
            return (columns, None), {}
        if reduction.kept is None:
            with Undo() as trial:
                carry_out(units.draft(reduction, None), self.model, trial)
                left = self._observe(HiddenUnits(units.block), target, before)
        affine = self._affine(units)
        if self.compensation.by == "bias":
            biased = affine or units.size == 1
            return (columns, from_one(lambda: _mean_gap(left.all, columns).float()) if biased else None), {}
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
