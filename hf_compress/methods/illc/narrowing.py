"""FFNs narrowed one after another, each with the errors of those before it in sight.

Two streams walk up the stack, the original model's and that of the model compressed so far. In each block the hidden
units are reduced by what they do on the compressed stream; then the output projection is solved for anew. With R the
part of the stream that the FFN does not write, it is to make up what the original stream has beyond that:

    min over W, b of  Σ_tokens | W h̃ + b − (y − R̃) / m |²  +  λ · |W − W₀|²,

h̃ the activations of the units that are left, y the original stream after the block, R̃ what the compressed stream has
there without the FFN, m a constant of the model, W₀ the columns of the units kept. λ is chosen on batches held out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from hf_compress.anatomy.anatomy import Anatomy
from hf_compress.anatomy.stacks import Stack
from hf_compress.anatomy.undo import Undo
from hf_compress.apply import carry_out
from hf_compress.calibration.walks import Walk
from hf_compress.drafts import Affine
from hf_compress.methods.illc.experts import ExpertNarrowing
from hf_compress.methods.illc.reductions import REDUCTIONS, Reduction
from hf_compress.methods.illc.units import HiddenUnits, Run, UnitStatistics, observe
from hf_compress.numerics.ridge import LeastSquares
from hf_compress.plan import Plan
from hf_compress.workbench import Workbench

if TYPE_CHECKING:
    from hf_compress.methods.illc.config import ILLCConfig


class Narrowing:
    """Narrows the FFNs of a stack from the first block up; changes last until `undo` is rolled back.

    Args:
        walks: batches before the first block; they go up with it.
        weights: per batch, (tokens): how much each counts; alike when None.
    """

    def __init__(
        self, config: ILLCConfig, bench: Workbench, stack: Stack, walks: list[Walk], weights: Sequence[Tensor] | None
    ) -> None:
        self.config, self.model, self.stack, self.walks, self.weights = config, bench.model, stack, walks, weights

    def skip(self, index: int) -> None:
        """Pass a block by, as it is."""
        for walk in self.walks:
            same = walk.compressed is walk.original  # nothing was changed yet
            walk.original = walk.runner.run(index, walk.original)
            walk.compressed = walk.original if same else walk.runner.run(index, walk.compressed)

    def narrow(self, index: int, width: int, undo: Undo) -> tuple[Plan, dict[str, Any]]:
        """Narrow the FFN of a block to `width` hidden units and go past it; the plan for it, and what there is to tell.

        The last streams of the walks come from the narrowed block.
        """
        ffn = Anatomy(self.model).parts(self.stack, index).ffn
        if ffn is not None and ffn.kind == "experts":
            return self._narrow_experts(index, width, undo)
        units = HiddenUnits(self.model, self.stack, index)
        before = [walk.original for walk in self.walks]
        targets = self._targets(units)
        statistics = self._observe(units, targets, before)
        reduction = REDUCTIONS.resolve(self.config.reduction_name)(self.config, units, statistics, width)
        writes, notes = self._solve(units, reduction, statistics, targets, before)
        draft = reduction.draft(self.model, self.stack, index, writes)
        carry_out(draft, self.model, undo)
        self._pass(index)
        if reduction.labels is not None:
            notes["clusters"] = reduction.labels.tolist()
        return draft, {"block": index, "width": width, **notes}

    def _narrow_experts(self, index: int, width: int, undo: Undo) -> tuple[Plan, dict[str, Any]]:
        for walk in self.walks:
            original = walk.runner.run(index, walk.original)
            if not self.config.iterative:
                walk.compressed = walk.original  # nobody is to see the compressed layers below
            walk.original = original
        draft, notes = ExpertNarrowing(self.config, self.model, self.stack, index).plan(self.walks, width)
        carry_out(draft, self.model, undo)
        self._pass(index)
        return draft, {"block": index, "width": width, **notes}

    def _pass(self, index: int) -> None:
        """Take the compressed stream past a block that is narrowed."""
        if self.config.iterative:
            for walk in self.walks:
                walk.compressed = walk.runner.run(index, walk.compressed)

    def _targets(self, units: HiddenUnits) -> _Targets:
        """Take the original stream past the block; what the FFN has to write from then on."""
        first = self.walks[0]
        multiplier = None
        if self.config.iterative and self.config.target == "stream":
            multiplier = units.multiplier(first.runner, first.compressed)
        written = []
        for walk in self.walks:
            run = units.run(walk.runner, walk.original)
            walk.original = run.after
            written.append(run.written if multiplier is None else run.written[:0])
        return _Targets([walk.original for walk in self.walks], written, multiplier)

    def _observe(self, units: HiddenUnits, targets: _Targets, before: list[Tensor]) -> UnitStatistics:
        """What the hidden units do on the compressed stream; on the original one where no layer is to see another."""

        def runs() -> Iterator[Run]:
            for walk, original in zip(self.walks, before, strict=True):
                yield units.run(walk.runner, walk.compressed if self.config.iterative else original)

        row_tokens = -(-self.config.cluster_tokens // len(self.walks))
        return observe(runs(), targets, self.weights, row_tokens)

    def _solve(
        self,
        units: HiddenUnits,
        reduction: Reduction,
        statistics: UnitStatistics,
        targets: _Targets,
        before: list[Tensor],
    ) -> tuple[Affine, dict[str, Any]]:
        """The output projection of the units that are left, and how far from the target it ends."""
        columns = reduction.columns(units.writes)
        if self.config.compensation_name == "none":
            return (columns, None), {}
        if reduction.kept is not None:
            left = statistics.take(reduction.kept)
        else:
            with Undo() as trial:
                carry_out(reduction.draft(self.model, self.stack, units.index), self.model, trial)
                left = self._observe(HiddenUnits(self.model, self.stack, units.index), targets, before)
        if self.config.compensation_name == "bias":
            return (columns, _mean_gap(left.all, columns).float()), {}
        fit = left.fit(columns, units.biased or self.config.bias)
        bias = None if fit.bias is None else fit.bias.float()
        return (fit.weight.float(), bias), {"error": fit.error, "penalty": fit.penalty}


class _Targets:
    """What the FFN of a block has to write, given what it writes in a run.

    Args:
        after: the original stream after the block, per batch.
        written: what its FFN wrote there, where `multiplier` is None.
        multiplier: of what the FFN writes, in the stream after the block; None where only the FFN's own part can be
            compared.
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
