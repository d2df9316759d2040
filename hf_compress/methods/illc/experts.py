"""Experts of a mixture narrowed, each by what it does with the tokens that the router gives it.

A token counts for an expert with the square of the router's weight, since that is how an error of the expert's output
enters the stream. All experts stay equally wide. Each is to give what it gave with all its units, on the compressed
model's own tokens: which tokens an expert sees is a matter of the stream below it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_compress.anatomy.anatomy import Block
from hf_compress.anatomy.experts import check_experts, expert_hidden, expert_writes
from hf_compress.calibration.capture import hooked, stream_tokens
from hf_compress.calibration.runner import BlockRunner
from hf_compress.errors import CalibrationError, UnsupportedModelError
from hf_compress.methods.illc.config import ILLCConfig
from hf_compress.methods.illc.reductions import REDUCTIONS
from hf_compress.methods.illc.units import UnitStatistics
from hf_compress.modules.experts import routed
from hf_compress.numerics.ridge import LeastSquares, is_held_out
from hf_compress.plan.plan import Plan
from hf_compress.rewrite.builders import narrow_experts

Runs = Sequence[tuple[BlockRunner, Tensor]]  # batches, and the stream before the block
_MEMORY = 4 * 2**30  # for the sums of as many experts as are done in one pass
_FEW = 8  # tokens: an expert that gets fewer keeps the units that are largest


@dataclass(frozen=True)
class ExpertUnits:
    """The hidden units of one expert; as `HiddenUnits`, for the reductions."""

    writes: Tensor
    index: int
    name: str
    biased: bool = False
    size: int = 1


class ExpertNarrowing:
    """The experts of one block.

    Raises:
        UnsupportedModelError: experts that cannot be looked into one by one.
    """

    def __init__(self, config: ILLCConfig, block: Block) -> None:
        ffn = block.parts.ffn
        assert ffn is not None
        assert ffn.experts is not None
        self.config, self.block = config, block
        self.name = f"{block.path}.{ffn.experts}"
        self.experts: nn.Module = block.module.get_submodule(ffn.experts)
        check_experts(self.experts, self.name)
        if config.reduction_name == "average":
            raise UnsupportedModelError(f"{self.name}: the units of experts are kept, not merged; take representative")
        if config.compensation_name == "bias":
            raise UnsupportedModelError(f"{self.name}: experts get no bias; take compensation='ridge' or 'none'")
        self.writes = expert_writes(self.experts).detach()
        self.width = ffn.width

    def plan(self, runs: Runs, width: int) -> tuple[Plan, dict[str, Any]]:
        """The plan that leaves each expert `width` hidden units, and how many tokens each has seen."""
        count, _, hidden = self.writes.shape
        at_once = max(1, _MEMORY // (16 * self.width * (self.width + hidden)))
        kept, writes, tokens = [], [], []
        for start in range(0, count, at_once):
            numbers = range(start, min(start + at_once, count))
            for number, statistics in zip(numbers, self._observe(runs, numbers), strict=True):
                units, written = self._reduce(number, statistics, width)
                kept.append(units)
                writes.append(written)
                tokens.append(len(statistics.rows))
        draft = narrow_experts(self.block, torch.stack(kept), torch.stack(writes))
        return draft, {"experts": count, "rows": tokens}

    def _reduce(self, number: int, statistics: UnitStatistics, width: int) -> tuple[Tensor, Tensor]:
        """The units that an expert keeps, (width), and what they write, (width, hidden)."""
        old = self.writes[number].float()
        units = ExpertUnits(old, self.block.index * len(self.writes) + number, f"{self.name} {number}")
        few = len(statistics.rows) < max(_FEW, width if self.config.reduction_name == "representative" else 0)
        reduction = REDUCTIONS["magnitude" if few else self.config.reduction_name](
            self.config, units, statistics, width
        )
        assert reduction.kept is not None
        columns = reduction.columns(old)
        if few or self.config.compensation_name != "ridge":
            return reduction.kept, columns
        return reduction.kept, statistics.take(reduction.inputs()).fit(columns, affine=False).weight.to(columns)

    def _observe(self, runs: Runs, numbers: range) -> list[UnitStatistics]:
        """What some experts do on the compressed model's streams."""
        _, width, hidden = self.writes.shape
        device = self.writes.device
        sums = [[LeastSquares(width, hidden, device) for _ in range(2)] for _ in numbers]
        rows: list[list[Tensor]] = [[] for _ in numbers]
        row_tokens = self.config.rows_of_a_batch(len(runs))
        for batch, (runner, stream) in enumerate(runs):
            states, index, weights = self._routing(runner, stream)
            for place, number in enumerate(numbers):
                token, weight = routed(index, weights, number)
                activations = expert_hidden(self.experts, number, states[token])
                if not bool(torch.isfinite(activations).all()):
                    raise CalibrationError(f"expert {number} of {self.name} has NaN or infinite activations")
                written = activations.double() @ self.writes[number].double()
                sums[place][is_held_out(batch)].update(activations, written, weight.double().square())
                some = activations * weight[:, None].to(activations)
                rows[place].append(some[:: max(1, -(-len(some) // row_tokens))].float().cpu())
        return [UnitStatistics(fitted, held, torch.cat(part)) for (fitted, held), part in zip(sums, rows, strict=True)]

    def _routing(self, runner: BlockRunner, stream: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What the experts are given in a run of the block, of real tokens: states, chosen experts, weights."""
        seen: list[tuple[Any, ...]] = []

        def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen.append((*args, *kwargs.values()))

        with hooked([self.experts.register_forward_pre_hook(keep, with_kwargs=True)]):
            after = runner.run(self.block.index, stream)
        real = stream_tokens(self.block.stack, runner.batch, after).flatten()
        if len(seen) != 1 or len(seen[0]) != 3 or any(len(part.flatten(0, -2)) != len(real) for part in seen[0]):
            raise UnsupportedModelError(f"{self.name} is not given tokens, experts and weights once in a forward pass")
        states, index, weights = (part.flatten(0, -2)[real] for part in seen[0])
        return states, index, weights
