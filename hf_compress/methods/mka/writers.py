"""The projections by which a block writes to the residual stream, solved anew by ridge regression.

A pre-norm block gives  y = x + m (W_o a + b_o + W_d h + b_d),  a from its attention, h from its FFN, m a constant of
the model. To give `target` instead, with a and h as they are, the change of [W_o W_d b] is a linear regression of
(target - y) / m on [a h 1]. Penalised is the change, not the weight, so that what the data does not speak of stays.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_compress.anatomy.anatomy import Anatomy
from hf_compress.anatomy.parts import linear_map, linear_widths
from hf_compress.anatomy.stacks import Stack
from hf_compress.anatomy.undo import Undo
from hf_compress.calibration.capture import hooked, stream_tokens
from hf_compress.calibration.runner import BlockRunner
from hf_compress.numerics.ridge import LeastSquares, is_held_out, solve_ridge

# Penalties tried, relative to the mean square of the inputs.
PENALTIES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
# Part of the stream's change that the projections may leave unexplained, for rounding in half precision.
_TOLERANCE = 0.05


@dataclass(frozen=True)
class Fit:
    """A solved change of a block's projections.

    Attributes:
        change: (inputs, width) float64, rows in the order of `Writers.features`.
        error: squared distance from the target on held-out tokens, as a share of what it was without the change.
        penalty: the one that did best there.
    """

    change: Tensor
    error: float
    penalty: float


class Writers:
    """The output projections of one block.

    Attributes:
        modules: attention's, then the FFN's, as far as the block has them.
    """

    def __init__(self, model: PreTrainedModel, stack: Stack, index: int) -> None:
        block = stack.blocks[index]
        self.index = index
        self.modules: list[nn.Module] = [block.get_submodule(p) for p in Anatomy(model).parts(stack, index).writers]
        self.biases = [bias for module in self.modules if isinstance(bias := getattr(module, "bias", None), Tensor)]
        self.biased = bool(self.biases)
        self.inputs = sum(linear_widths(module)[0] for module in self.modules) + self.biased

    @contextmanager
    def _watched(self) -> Iterator[list[list[Tensor]]]:
        """Collects what each projection is given while a block runs, whichever of them runs first."""
        seen: list[list[Tensor]] = [[] for _ in self.modules]
        handles = [
            module.register_forward_pre_hook(lambda _, args, inputs=inputs: inputs.append(args[0]))
            for module, inputs in zip(self.modules, seen, strict=True)
        ]
        with hooked(handles):
            yield seen

    def features(self, runner: BlockRunner, stream: Tensor) -> tuple[Tensor, Tensor]:
        """What the block makes of `stream`, and its projections' inputs side by side, (samples, positions, inputs)."""
        with self._watched() as seen:
            output = runner.run(self.index, stream)
        rows = output.shape[0] * output.shape[1]
        widths = [linear_widths(module)[0] for module in self.modules]
        parts = [
            part.reshape(*output.shape[:2], width)
            for inputs, width in zip(seen, widths, strict=True)
            for part in inputs
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

    def multiplier(self, runner: BlockRunner, stream: Tensor) -> float | None:
        """m, or None where the block does not add its projections' outputs to the stream (a norm comes after, say)."""
        if not self.modules:
            return None
        output, features = self.features(runner, stream)
        fits = features.shape[-1] == self.inputs and output.shape[-1] == self.weight().shape[-1]
        if not fits:  # a projection did not run, or more than once, or not on the stream
            return None
        real = stream_tokens(runner.stack, runner.batch, stream)
        added, written = (output - stream)[real].float(), features[real].float() @ self.weight()
        size = written.square().sum()
        if size == 0:
            return None
        multiplier = ((added * written).sum() / size).item()
        unexplained = (added - multiplier * written).norm() / added.norm()
        return multiplier if unexplained < _TOLERANCE and multiplier > 0 else None

    def apply(self, change: Tensor, undo: Undo) -> None:
        """Add a solved change to the weights, and its last row to the first bias that there is."""
        start = 0
        for module in self.modules:
            weight = linear_map(module)
            rows = change[start : start + len(weight)].to(weight.device)
            undo.write(weight, weight.detach().double() + rows)
            start += len(weight)
        if self.biased:
            bias = self.biases[0]
            undo.write(bias, bias.detach().double() + change[-1].to(bias.device))

    def _scales(self, statistics: LeastSquares) -> Tensor:
        """Root mean square of each projection's inputs, for every feature: attention and FFN share one penalty."""
        squares = statistics.gram.diagonal() / max(1, statistics.count)
        widths = [linear_widths(module)[0] for module in self.modules] + [1] * self.biased
        means = [part.mean().clamp(min=1e-12).expand(len(part)) for part in squares.split(widths)]
        return torch.cat(means).sqrt()

    def fit(
        self,
        runners: Sequence[BlockRunner],
        streams: Sequence[Tensor],
        targets: Sequence[Tensor],
        penalties: Sequence[float] = PENALTIES,
    ) -> Fit | None:
        """Solve for the change with which the block turns `streams` into `targets`, tensors of one batch each.

        The penalty is chosen on every fourth batch, held out; the solution then takes them all. With fewer than four
        batches nothing is held out, so `penalties` should hold one.

        Returns:
            The change, or None where it would not help on the held-out batches, or the block is not of the kind.
        """
        multiplier = self.multiplier(runners[0], streams[0])
        if multiplier is None:
            return None
        width = targets[0].shape[-1]
        fitted, held = (LeastSquares(self.inputs, width, targets[0].device) for _ in range(2))
        for number, (runner, stream, target) in enumerate(zip(runners, streams, targets, strict=True)):
            output, features = self.features(runner, stream)
            real = stream_tokens(runner.stack, runner.batch, stream)
            part = held if is_held_out(number) else fitted
            part.update(features[real], (target - output)[real].double() / multiplier)
        if held.count == 0 or held.energy == 0:
            held = fitted
        if held.energy == 0:  # the target is what the block gives already
            return None
        best = min(((self._held_out(fitted, held, p), p) for p in penalties), default=(1.0, 1.0))
        if not best[0] < 1:
            return None
        everything = fitted if held is fitted else fitted.merge(held)
        return Fit(self._solve(everything, best[1]), *best)

    def _solve(self, statistics: LeastSquares, penalty: float) -> Tensor:
        scales = self._scales(statistics)[:, None]
        return solve_ridge(statistics.gram / scales / scales.T, statistics.cross / scales, penalty) / scales

    def _held_out(self, fitted: LeastSquares, held: LeastSquares, penalty: float) -> float:
        """Error on the held-out tokens as a share of what it is without a change."""
        return held.error(self._solve(fitted, penalty)) * held.count / held.energy
