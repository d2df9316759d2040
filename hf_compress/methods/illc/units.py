"""What the hidden units of a block's FFN do on calibration data, and what the FFN has to give."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_compress.anatomy.anatomy import Anatomy
from hf_compress.anatomy.parts import linear_map
from hf_compress.anatomy.stacks import Stack
from hf_compress.calibration.capture import hooked, stream_tokens, watch_module
from hf_compress.calibration.runner import BlockRunner
from hf_compress.errors import CalibrationError
from hf_compress.numerics.ridge import PENALTIES, LeastSquares, RidgeFit, fit_held_out, is_held_out

_CAUTIOUS = (0.1,)
_TOLERANCE = 0.05  # of what comes out of a block, for rounding in half precision


@dataclass
class UnitStatistics:
    """Sums over calibration tokens.

    Attributes:
        fitted, held: of the regression of what the FFN has to write, (tokens, hidden), on its hidden units' activations
            (tokens, width): on most batches, and on every fourth.
        rows: activations of some tokens, (tokens, width) float32: what units are clustered by.
    """

    fitted: LeastSquares
    held: LeastSquares
    rows: Tensor

    @property
    def all(self) -> LeastSquares:
        """The sums of all batches."""
        return self.fitted.merge(self.held)

    def take(self, units: Tensor) -> UnitStatistics:
        """The statistics of some of the units, in that order."""
        return UnitStatistics(self.fitted.take(units), self.held.take(units), self.rows[:, units.cpu()])

    def fit(self, prior: Tensor, affine: bool) -> RidgeFit:
        """The output projection that comes nearest to the target, penalised for leaving `prior` (width, hidden).

        The penalty is chosen on the batches held out, and is a cautious one where one of the two parts has no tokens.
        """
        if self.fitted.count == 0 or self.held.count == 0:
            return fit_held_out(self.all, self.all, _CAUTIOUS, prior.double(), affine)
        return fit_held_out(self.fitted, self.held, PENALTIES, prior.double(), affine)


class Units(Protocol):
    """What a reduction has to know of hidden units, those of an FFN or of one expert."""

    @property
    def writes(self) -> Tensor:
        """The output projection, (width, hidden) float32, a row for each unit."""

    @property
    def index(self) -> int:
        """A number of their own, for those who draw lots."""

    @property
    def name(self) -> str:
        """Whose they are, for messages."""

    @property
    def biased(self) -> bool:
        """Whether a bias is added to what they write."""


class HiddenUnits:
    """The hidden units of one block's FFN, as the model is at the moment.

    Attributes:
        writes: the output projection, (width, hidden) float32, a row for each unit.
        biased: whether it has a bias.
    """

    def __init__(self, model: PreTrainedModel, stack: Stack, index: int) -> None:
        ffn = Anatomy(model).parts(stack, index).ffn
        assert ffn is not None
        assert ffn.output is not None
        self.stack, self.index, self.name = stack, index, f"{stack.path}.{index}"
        self.output: nn.Module = stack.blocks[index].get_submodule(ffn.output)
        self.writes = linear_map(self.output).detach().float()
        self.biased = self.output._parameters.get("bias") is not None

    def run(self, runner: BlockRunner, stream: Tensor) -> Run:
        """Run the block on a stream."""
        with watch_module(self.output) as seen:
            after = runner.run(self.index, stream)
        tokens = after.shape[0] * after.shape[1]
        if seen.given is None or seen.gave is None or seen.gave.numel() != tokens * seen.gave.shape[-1]:
            raise CalibrationError(f"the FFN of {self.name} did not run once for each token; it cannot be narrowed")
        real = stream_tokens(self.stack, runner.batch, after)
        hidden, written = (part.reshape(*real.shape, -1)[real] for part in (seen.given, seen.gave))
        if not bool(torch.isfinite(hidden).all()):
            raise CalibrationError(
                f"the hidden units of the FFN of {self.name} are NaN or infinite on the calibration data; load the "
                "model in float32 or bfloat16, or look for the sample that causes it"
            )
        return Run(after, real, hidden, written)

    def multiplier(self, runner: BlockRunner, stream: Tensor) -> float | None:
        """m, where the stream after the block has m times what the FFN writes in it; None where a norm comes after.

        Measured: the FFN is made to write something else, and the stream has to differ by a multiple of that.
        """
        after = runner.run(self.index, stream).float()
        generator = torch.Generator().manual_seed(0)
        more = torch.randn(after.shape[-1], generator=generator).to(after) * after.std()
        with hooked([self.output.register_forward_hook(lambda module, args, output: output + more.to(output))]):
            change = (runner.run(self.index, stream).float() - after).flatten(0, -2)
        multiplier = float((change @ more).mean() / more.square().sum())
        unexplained = float((change - multiplier * more).norm() / change.norm())
        return multiplier if multiplier > 0 and unexplained < _TOLERANCE else None


class Run(NamedTuple):
    """What a block made of a stream.

    Attributes:
        after: the stream after it, (samples, positions, hidden).
        real: (samples, positions): tokens that may enter a statistic.
        hidden: its hidden units' activations at those, (tokens, width).
        written: what its FFN writes at those, (tokens, hidden).
    """

    after: Tensor
    real: Tensor
    hidden: Tensor
    written: Tensor


def observe(
    runs: Iterable[Run],
    targets: Callable[[int, Run], Tensor],
    weights: Sequence[Tensor] | None,
    row_tokens: int,
) -> UnitStatistics:
    """Sum up what hidden units do in runs of their block, one a batch.

    Args:
        targets: what the FFN would have to write in a run, given the number of the batch: (tokens, hidden).
        weights: per batch, (tokens): how much each counts; alike when None.
        row_tokens: of how many tokens of a batch to keep the activations, at least one.
    """
    parts: list[LeastSquares] = []  # fitted, held
    rows = []
    for number, run in enumerate(runs):
        if not parts:
            parts = [LeastSquares(run.hidden.shape[1], run.written.shape[1], run.hidden.device) for _ in range(2)]
        counts = None if weights is None else weights[number]
        parts[is_held_out(number)].update(run.hidden, targets(number, run), counts)
        some = run.hidden if counts is None else run.hidden * counts[:, None].sqrt().to(run.hidden)
        rows.append(some[:: max(1, -(-len(some) // row_tokens))].float().cpu())
    return UnitStatistics(parts[0], parts[1], torch.cat(rows))
