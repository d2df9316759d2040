"""The projections by which a block writes to the residual stream, solved anew by ridge regression.

A pre-norm block gives  y = x + m (W_o a + b_o + W_d h + b_d),  a from its attention, h from its FFN, m a constant of
the model. To give `target` instead, with a and h as they are, the change of [W_o W_d b] is a linear regression of
(target - y) / m on [a h 1]. Penalised is the change, not the weight, so that what the data does not speak of stays.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import chain

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_compress.anatomy.anatomy import Anatomy
from hf_compress.anatomy.parts import linear_map, linear_widths
from hf_compress.anatomy.stacks import Stack
from hf_compress.anatomy.undo import Undo
from hf_compress.calibration.capture import stream_tokens, watch_arguments
from hf_compress.calibration.held_out import is_held_out
from hf_compress.calibration.processes import from_one, gathered, gathered_at, told, total
from hf_compress.calibration.runner import BlockRunner
from hf_compress.methods.base.few_rows import HeldOutRows
from hf_compress.methods.base.ridge import HeldOutSums, RidgeFit, dtype_of_sums
from hf_compress.methods.base.units import checked_multiplier
from hf_compress.numerics.row_ridge import solve_rows
from hf_compress.numerics.team import ALONE, Team

# Penalties tried, relative to the mean square of the inputs.
PENALTIES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
_FEW = 512  # tokens that tell the multiplier

Rows = tuple[Tensor, Tensor]  # (tokens, inputs), and what they are to give, (tokens, width)


class Writers:
    """The output projections of one block.

    Attributes:
        modules: attention's, then the FFN's, as far as the block has them.
        widths: of their inputs, and 1 where they have a bias: attention and FFN share one penalty.
    """

    def __init__(self, model: PreTrainedModel, stack: Stack, index: int) -> None:
        block = stack.blocks[index]
        self.index = index
        self.modules: list[nn.Module] = [block.get_submodule(p) for p in Anatomy(model).parts(stack, index).writers]
        self.biases = [bias for module in self.modules if isinstance(bias := getattr(module, "bias", None), Tensor)]
        self.biased = bool(self.biases)
        self.widths = [*(linear_widths(module)[0] for module in self.modules), *([1] if self.biased else [])]
        self.inputs = sum(self.widths)

    def features(self, runner: BlockRunner, stream: Tensor) -> tuple[Tensor, Tensor]:
        """What the block makes of `stream`, and its projections' inputs side by side, (samples, positions, inputs)."""
        with watch_arguments(dict(enumerate(self.modules))) as given:
            output = runner.run(self.index, stream)
        rows = output.shape[0] * output.shape[1]
        parts = [
            part.reshape(*output.shape[:2], width)
            for calls, width in zip(given.values(), self.widths, strict=False)
            for part, *_ in calls
            if part.numel() == rows * width
        ]
        if self.biased:
            parts.append(torch.ones_like(output[..., :1]))
        return output, torch.cat(parts, dim=-1) if parts else output[..., :0]

    def weight(self) -> Tensor:
        """The projections as one map, (inputs, width) float32, with the sum of their biases as the last row."""
        rows = [linear_map(module).detach().float() for module in self.modules]
        if self.biased:
            rows.append(torch.stack([bias.detach().float() for bias in self.biases]).sum(dim=0)[None])
        return torch.cat(rows)

    def multiplier(self, stream: Tensor, output: Tensor, features: Tensor, real: Tensor) -> float | None:
        """m, or None where the block does not add its projections' outputs to the stream (a norm comes after, say).

        Args:
            stream, output, features: of a batch, see `features`.
            real: (samples, positions): its tokens that count; a few of them tell.
        """
        weight = self.weight() if self.modules else output[:0, 0]
        if features.shape[-1] != self.inputs or output.shape[-1] != weight.shape[-1] or not self.modules:
            return None  # a projection did not run, or more than once, or not on the stream
        added, written = (output - stream)[real][:_FEW].float(), features[real][:_FEW].float() @ weight
        return checked_multiplier(((added * written).sum() / written.square().sum()).item(), added, written)

    def apply(self, change: Tensor, undo: Undo) -> None:
        """Add a solved change to the weights, and its last row to the first bias that there is."""
        for module, rows in zip(self.modules, change.split(self.widths), strict=False):
            weight = linear_map(module)
            undo.write(weight, weight.detach() + rows.to(weight.device))
        if self.biased:
            bias = self.biases[0]
            undo.write(bias, bias.detach() + change[-1].to(bias.device))

    def local_rows(
        self,
        numbers: Sequence[int],
        runners: Sequence[BlockRunner],
        streams: Sequence[Tensor],
        targets: Sequence[Tensor],
        rank: int | None,
    ) -> Rows | None:
        """What `local_change` needs to know of all processes' batches, in one of them, or in all.

        Returns:
            None in the others, and where the block is not of the kind.
        """
        found = dict(self._rows(numbers, runners, streams, targets))
        collected = gathered if rank is None else partial(gathered_at, rank)
        features = collected({number: rows for number, (rows, _) in found.items()})
        missing = collected({number: rows for number, (_, rows) in found.items()})
        return (torch.cat(features), torch.cat(missing)) if features else None

    def local_change(self, rows: Rows | None, penalty: float, tokens: int, together: Team = ALONE) -> Tensor | None:
        """The change with which the block gives what it is to give, solved from about so many tokens.

        Args:
            together: how processes that all have the rows do it together.

        Returns:
            As the weight of `fit`, float32; None where there are no rows.
        """
        if rows is None:
            return None
        every = max(1, len(rows[0]) // tokens)
        return solve_rows(rows[0][::every], rows[1][::every], penalty, self.widths, together)

    def _rows(
        self,
        numbers: Sequence[int],
        runners: Sequence[BlockRunner],
        streams: Sequence[Tensor],
        targets: Sequence[Tensor],
    ) -> Iterator[tuple[int, Rows]]:
        """Of each batch, the projections' inputs at real tokens, and what they would have to write besides, over m.

        Nothing where the block is not of the kind. The first batch of all tells m.
        """
        multiplier: float | None = None
        for number, runner, stream, target in zip(numbers, runners, streams, targets, strict=True):
            output, features = self.features(runner, stream)
            real = stream_tokens(runner.stack, runner.batch, stream)
            if multiplier is None:
                multiplier = from_one(partial(self.multiplier, stream, output, features, real))
                if multiplier is None:
                    return
            yield number, (features[real], (target - output)[real].float() / multiplier)
        if not numbers:
            from_one(lambda: None)

    def fit(
        self,
        runners: Sequence[BlockRunner],
        streams: Sequence[Tensor],
        targets: Sequence[Tensor],
        penalties: Sequence[float] = PENALTIES,
        numbers: Sequence[int] | None = None,
    ) -> RidgeFit | None:
        """Solve for the change with which the block turns `streams` into `targets`, tensors of one batch each.

        Of several processes each has its own batches, whose `numbers` among all it gives. Where tokens are fewer than
        inputs, they are kept in the place of sums.

        Returns:
            The change, (inputs, width) with rows in the order of `features`, and what it leaves of the squared distance
            from the target on held-out tokens; None where it would not help there, or the block is not of the kind.
        """
        weight = self.weight() if self.modules else torch.zeros(0, 1)
        dtype = dtype_of_sums((targets[0] if targets else weight).dtype, penalties)
        width, device = (targets[0].shape[-1], targets[0].device) if targets else (weight.shape[-1], weight.device)
        found = self._rows(range(len(runners)) if numbers is None else numbers, runners, streams, targets)
        if self._tokens(runners, streams) < self.inputs:
            fit = self._fit_few(found, penalties)
            return fit if fit is not None and fit.error < 1 else None
        sums = HeldOutSums.empty(self.inputs, width, device, dtype)
        for number, (features, missing) in found:
            sums.update(features, missing, held=is_held_out(number))
        sums.reduce()
        if sums.fitted.energy + sums.held.energy == 0:  # the target is what the block gives already, or is out of reach
            return None
        fit = sums.fit(penalties=penalties, parts=self.widths)
        return fit if fit.error < 1 else None

    def _tokens(self, runners: Sequence[BlockRunner], streams: Sequence[Tensor]) -> int:
        """How many tokens count, in the batches of all processes."""
        real = (stream_tokens(one.stack, one.batch, stream) for one, stream in zip(runners, streams, strict=True))
        (tokens,) = total(sum(int(mask.sum()) for mask in real))
        return int(tokens)

    def _fit_few(self, found: Iterator[tuple[int, Rows]], penalties: Sequence[float]) -> RidgeFit | None:
        """The fit from all rows, by the first process; None where there is nothing to fit."""
        own = dict(found)
        numbers = sorted(chain.from_iterable(told(list(own))))
        features, missing = (gathered_at(0, {number: rows[part] for number, rows in own.items()}) for part in (0, 1))

        def solved() -> RidgeFit | None:
            rows = HeldOutRows(self.widths)
            for number, x, y in zip(numbers, features, missing, strict=True):
                rows.update(x, y, held=is_held_out(number))
            return rows.fit(penalties) if rows.energy else None

        return from_one(solved)
