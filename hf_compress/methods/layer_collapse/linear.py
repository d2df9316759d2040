"""How linear the FFNs of a model are, and the linear maps that stand for them best, in closed form.

An FFN is taken for a function from what its projections read (X) to what it writes (Y). The best affine map is the
ridge regression of Y on X; how linear the FFN is, R² = 1 − ‖Y − Ŷ‖² / ‖Y − Ȳ‖² on tokens held out, says how much of it
survives.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from hf_compress.anatomy.anatomy import Block
from hf_compress.anatomy.stacks import Stack
from hf_compress.calibration.capture import hooked, inference, stream_tokens
from hf_compress.calibration.data import Calibration
from hf_compress.calibration.held_out import HELD_OUT, is_held_out
from hf_compress.calibration.memory import working_memory
from hf_compress.calibration.processes import from_one, total
from hf_compress.calibration.sweep import Passed, Sweep
from hf_compress.errors import CalibrationError
from hf_compress.methods.base.ridge import HeldOutSums
from hf_compress.methods.layer_collapse.blend import ffn_of
from hf_compress.numerics.ridge import LeastSquares
from hf_compress.numerics.symmetric import turned
from hf_compress.plan.plan import Plan
from hf_compress.rewrite.builders import linear_ffn

_CONSTANT = 1e-12


@dataclass(frozen=True)
class LinearFit:
    """An affine map Ŷ = X·W + b in the place of an FFN.

    Attributes:
        maps: W (hidden, hidden), or its two factors (hidden, rank) and (rank, hidden).
        bias: b (hidden).
        r2: share of the variance of Y that it explains on held-out tokens; 1 for a linear FFN, below 0 where the mean
            would do better.
        in_stream: what it leaves unexplained, E‖Y − Ŷ‖² on held-out tokens, as a share of the squared length of the
            residual stream that Y is added to (the median over tokens, since a few are far longer than the rest);
            1 − R² where Y is added to nothing.
    """

    maps: tuple[Tensor, ...]
    bias: Tensor
    r2: float
    in_stream: float

    def draft(self, block: Block) -> Plan:
        """The plan that puts it in the place of a block's FFN."""
        return linear_ffn(block, [factor.float() for factor in self.maps], self.bias.float())


def fit_ffns(
    model: PreTrainedModel,
    stack: Stack,
    data: Calibration,
    blocks: Sequence[int],
    penalty: float,
    rank: int | None = None,
) -> dict[int, LinearFit]:
    """The best affine maps for the FFNs of `blocks`, in one pass over the data, block by block.

    The sums of a block take four matrices (hidden, hidden), whatever the amount of data and the number of blocks. The
    maps lie in files, until a few of them are chosen.

    Raises:
        CalibrationError: an FFN that does not run once a token, NaN or infinite activations, or one batch alone.
    """
    if blocks and len(data) < 2:
        raise CalibrationError(
            f"R² is measured on every {HELD_OUT}th batch, or on the last, held out: give at least 2 batches of data "
            f"(more samples, or a smaller batch_size); got {len(data)}"
        )
    held_out = [number for number in range(len(data)) if is_held_out(number)] or [len(data) - 1]
    fits: dict[int, LinearFit] = {}
    aside = working_memory().aside()
    with inference(model):
        sweep = Sweep(model, stack, data)
        for index in sweep.blocks("reading FFNs", max(blocks, default=-1) + 1):
            if index not in blocks:
                continue
            sums = _Sums(Block(model, stack, index))
            with sums.watching() as seen:
                for passed in sweep.past(index):
                    sums.add(passed, seen, held_out=passed.number in held_out)
            sums.reduce()
            found = from_one(partial(sums.solve, penalty, rank))
            fits[index] = replace(found, maps=tuple(map(aside.put, found.maps)))
    return fits


class _Sums:
    """What one FFN reads and writes, summed up."""

    def __init__(self, block: Block) -> None:
        ffn = ffn_of(block)
        assert ffn.output is not None
        self.stack, self.name = block.stack, block.path
        self.reader, self.writer = block.module.get_submodule(ffn.inputs[0]), block.module.get_submodule(ffn.output)
        self.sums: HeldOutSums | None = None
        self.residual = True
        self.lengths: list[float] = []  # of the stream: the median of each batch, squared
        self.length = 0.0  # their mean

    @contextmanager
    def watching(self) -> Iterator[dict[str, Tensor]]:
        """Have the FFN keep what it reads, x, and writes, y, when it runs."""
        seen: dict[str, Tensor] = {}

        def hooks() -> Iterator[RemovableHandle]:
            yield self.reader.register_forward_pre_hook(lambda _, args: seen.__setitem__("x", args[0]))
            yield self.writer.register_forward_hook(lambda _, args, output: seen.__setitem__("y", output))

        with hooked(hooks()):
            yield seen

    def add(self, passed: Passed, seen: dict[str, Tensor], held_out: bool) -> None:
        """What the FFN did when its block ran on a batch."""
        stream, x, y = passed.before, seen.pop("x", None), seen.pop("y", None)
        if x is None or y is None or x.shape[:-1] != y.shape[:-1] or _rows(x) != _rows(stream):
            raise CalibrationError(f"the FFN of {self.name} did not run once for each token; it cannot be collapsed")
        real = stream_tokens(self.stack, passed.batch, stream)
        self.residual = passed.after is not y
        if x.ndim == 2:  # some families have laid the samples end to end
            x, y = x.view(*real.shape, -1), y.view(*real.shape, -1)
        x, y = x[real].cpu(), y[real].cpu()
        if not (torch.isfinite(x).all() and torch.isfinite(y).all()):
            raise CalibrationError(
                f"the FFN of {self.name} reads or writes NaN or infinite activations on the calibration data; load the "
                "model in float32 or bfloat16, or look for the sample that causes it"
            )
        if self.sums is None:
            self.sums = HeldOutSums.like_first(x, y, affine=True)
        self.sums.update(x, y, held=held_out)
        if real.any():
            self.lengths.append(float(stream[real].float().square().sum(-1).median()))

    def reduce(self) -> None:
        """Make these the sums over the batches of all processes."""
        self.sums = self.sums or HeldOutSums.like_first(None, None, affine=True)
        self.sums.reduce()
        length, count = total(sum(self.lengths), len(self.lengths))
        self.length = length / max(1, count)
        self.residual = from_one(lambda: self.residual)

    def solve(self, penalty: float, rank: int | None) -> LinearFit:
        """Fitted without the held-out batches to be judged by them, then with them."""
        assert self.sums is not None
        judged, bias = _affine(self.sums.fitted, penalty, rank)
        held = self.sums.held
        error = held.error(_product(judged), bias)
        energy = held.energy / held.count
        variance = held.energy_about(held.y_mean) / held.count
        # Of an output that does not vary, rounding is all that could be explained.
        r2 = 1.0 if variance <= _CONSTANT * energy else 1 - error / variance
        in_stream = error / max(self.length, 1e-300) if self.residual else 1 - r2
        return LinearFit(*_affine(self.sums.all, penalty, rank), r2, in_stream)


def _affine(sums: LeastSquares, penalty: float, rank: int | None) -> tuple[tuple[Tensor, ...], Tensor]:
    """Ridge regression, of reduced rank where one is given: then projected on the main directions of its predictions.

    Source: A. J. Izenman, "Reduced-rank regression for the multivariate linear model", 1975.
    """
    weight, bias = sums.solve_affine(penalty)
    if rank is None:
        return (weight,), bias
    directions = turned(torch.linalg.eigh(weight.T @ sums.centred_gram @ weight).eigenvectors[:, -rank:])
    maps = (weight @ directions, directions.T)
    return maps, sums.y_mean - sums.mean @ _product(maps).double()


def _rows(x: Tensor) -> int:
    """Number of tokens in (…, width)."""
    return x.shape[:-1].numel()


def _product(maps: Sequence[Tensor]) -> Tensor:
    return maps[0] if len(maps) == 1 else maps[0] @ maps[1]
