"""Experts of a mixture narrowed, each by what it does with the tokens that the router gives it.

A token counts for an expert with the square of the router's weight, since that is how an error of the expert's output
enters the stream. All experts stay equally wide. Each is to give what it gave with all its units, on the compressed
model's own tokens: which tokens an expert sees is a matter of the stream below it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from hf_compress.anatomy.anatomy import Block
from hf_compress.anatomy.experts import check_experts, expert_hidden, expert_writes
from hf_compress.calibration.capture import stream_tokens, watch_arguments
from hf_compress.calibration.held_out import is_held_out
from hf_compress.calibration.processes import gathered, spread, total
from hf_compress.calibration.runner import BlockRunner
from hf_compress.errors import CalibrationError, UnsupportedModelError
from hf_compress.methods.base.grams import few_at_once
from hf_compress.methods.base.narrowing import Runs
from hf_compress.methods.base.ridge import HeldOutSums
from hf_compress.methods.base.units import UnitStatistics, some_rows
from hf_compress.methods.illc.config import ILLCConfig
from hf_compress.methods.illc.reductions import REDUCTIONS
from hf_compress.modules.experts import routed
from hf_compress.plan.plan import Plan
from hf_compress.rewrite.builders import narrow_experts

_FEW = 8  # tokens: an expert that gets fewer keeps the units that are largest


@dataclass
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

    def plan(self, width: int, runs: Runs) -> Plan:
        """The plan that leaves each expert `width` hidden units; its notes say how many tokens each has seen."""
        count, _, hidden = self.writes.shape
        kept, writes, tokens = [], [], []
        for numbers in few_at_once(dict.fromkeys(range(count), 8 * self.width * (self.width + hidden))):
            observed = self._observe(runs, numbers)
            work = [(number, one, width) for number, one in zip(numbers, observed, strict=True)]
            for units, written in spread(work, lambda one: self._reduce(*one)):
                kept.append(units)
                writes.append(written)
            tokens += [len(statistics.rows) for statistics in observed]
        draft = narrow_experts(self.block, torch.stack(kept), torch.stack(writes))
        return replace(draft, notes={"experts": count, "rows": tokens})

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

    def _observe(self, runs: Runs, numbers: list[int]) -> list[UnitStatistics]:
        """What some experts do on the compressed model's streams."""
        _, width, hidden = self.writes.shape
        dtype = torch.promote_types(self.writes.dtype, torch.float32)
        sums = [HeldOutSums.empty(width, hidden, self.writes.device, dtype) for _ in numbers]
        rows: list[dict[int, Tensor]] = [{} for _ in numbers]
        row_tokens = self.config.rows_of_a_batch(round(total(len(runs))[0]))
        for batch, runner, stream in runs:
            states, index, weights = self._routing(runner, stream)
            for place, number in enumerate(numbers):
                token, weight = routed(index, weights, number)
                activations = expert_hidden(self.experts, number, states[token])
                if not bool(torch.isfinite(activations).all()):
                    raise CalibrationError(f"expert {number} of {self.name} has NaN or infinite activations")
                written = activations.to(dtype) @ self.writes[number].to(dtype)
                sums[place].update(activations, written, weight.double().square(), held=is_held_out(batch))
                own = some_rows(activations * weight[:, None].to(activations), row_tokens)
                rows[place][batch] = own if self.config.clusters else own[:, :0]
        HeldOutSums.reduce_all(sums)
        seen = [torch.cat(gathered(part)) for part in rows]
        return [UnitStatistics(one.fitted, one.held, part) for one, part in zip(sums, seen, strict=True)]

    def _routing(self, runner: BlockRunner, stream: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What the experts are given in a run of the block, of real tokens: states, chosen experts, weights."""
        with watch_arguments({self.name: self.experts}) as given:
            after = runner.run(self.block.index, stream)
        seen = given[self.name]
        real = stream_tokens(self.block.stack, runner.batch, after).flatten()
        if len(seen) != 1 or len(seen[0]) != 3 or any(len(part.flatten(0, -2)) != len(real) for part in seen[0]):
            raise UnsupportedModelError(f"{self.name} is not given tokens, experts and weights once in a forward pass")
        states, index, weights = (part.flatten(0, -2)[real] for part in seen[0])
        return states, index, weights
