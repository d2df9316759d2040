"""How linear the FFNs of a model are, and the linear maps that stand for them best, in closed form.

An FFN is taken for a function from what its projections read (X) to what it writes (Y). The best affine map is the
ridge regression of Y on X; how linear the FFN is, R² = 1 − ‖Y − Ŷ‖² / ‖Y − Ȳ‖² on tokens held out, says how much of it
survives.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel

from hf_compress.anatomy.anatomy import Anatomy, Block
from hf_compress.anatomy.parts import hidden_size, linear_widths
from hf_compress.anatomy.stacks import Stack
from hf_compress.calibration.capture import forward, hooked, inference, stream_of, stream_of_output, stream_tokens
from hf_compress.calibration.data import Batch, Calibration
from hf_compress.errors import CalibrationError
from hf_compress.numerics.ridge import HELD_OUT, LeastSquares, is_held_out
from hf_compress.plan.plan import Plan
from hf_compress.rewrite.builders import linear_ffn

_MEMORY = 4 * 2**30
_CONSTANT = 1e-12


@dataclass(frozen=True)
class LinearFit:
    """An affine map Ŷ = X·W + b in the place of an FFN.

    Attributes:
        maps: W (hidden, hidden), or its two factors (hidden, rank) and (rank, hidden); float64.
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
    """The best affine maps for the FFNs of `blocks`.

    The sums of a block take four matrices (hidden, hidden) in float64, whatever the amount of data. As many blocks as
    their sums fit into 4 GiB are done in one pass over it.

    Raises:
        CalibrationError: an FFN that does not run once a token, NaN or infinite activations, or one batch alone.
    """
    if blocks and len(data) < 2:
        raise CalibrationError(
            f"R² is measured on every {HELD_OUT}th batch, or on the last, held out: give at least 2 batches of data "
            f"(more samples, or a smaller batch_size); got {len(data)}"
        )
    held_out = [number for number in range(len(data)) if is_held_out(number)] or [len(data) - 1]
    at_once = max(1, _MEMORY // (32 * hidden_size(stack.configs[0][0]) ** 2))
    fits: dict[int, LinearFit] = {}
    for start in range(0, len(blocks), at_once):
        sums = {index: _Sums(model, stack, index) for index in blocks[start : start + at_once]}
        with inference(model):
            for number, batch in enumerate(tqdm(data, desc="reading FFNs", disable=None)):
                with _watching(sums.values()):
                    forward(model, batch)
                for one in sums.values():
                    one.add(batch, held_out=number in held_out)
        fits |= {index: one.solve(penalty, rank) for index, one in sums.items()}
    return fits


class _Sums:
    """What one FFN reads and writes, summed up."""

    def __init__(self, model: PreTrainedModel, stack: Stack, index: int) -> None:
        ffn = Anatomy(model).parts(stack, index).ffn
        assert ffn is not None
        assert ffn.output is not None
        block = stack.blocks[index]
        self.stack, self.name = stack, f"{stack.path}.{index}"
        self.reader, self.writer = block.get_submodule(ffn.inputs[0]), block.get_submodule(ffn.output)
        hidden = linear_widths(self.reader)[0]
        self.fitted, self.held = LeastSquares(hidden, hidden), LeastSquares(hidden, hidden)
        self.block = block
        self.residual = True
        self.lengths: list[float] = []  # of the stream: the median of each batch, squared
        self.seen: dict[str, Tensor] = {}

    def add(self, batch: Batch, held_out: bool) -> None:
        stream, x, y, out = (self.seen.pop(name, None) for name in ("stream", "x", "y", "out"))
        if stream is None or x is None or y is None or x.shape[:-1] != y.shape[:-1] or _rows(x) != _rows(stream):
            raise CalibrationError(f"the FFN of {self.name} did not run once for each token; it cannot be collapsed")
        real = stream_tokens(self.stack, batch, stream)
        self.residual = out is not y
        if x.ndim == 2:  # some families have laid the samples end to end
            x, y = x.view(*real.shape, -1), y.view(*real.shape, -1)
        x, y = x[real].cpu(), y[real].cpu()
        if not (torch.isfinite(x).all() and torch.isfinite(y).all()):
            raise CalibrationError(
                f"the FFN of {self.name} reads or writes NaN or infinite activations on the calibration data; load the "
                "model in float32 or bfloat16, or look for the sample that causes it"
            )
        (self.held if held_out else self.fitted).update(x, y)
        if real.any():
            self.lengths.append(float(stream[real].float().square().sum(-1).median()))

    def solve(self, penalty: float, rank: int | None) -> LinearFit:
        """Fitted without the held-out batches to be judged by them, then with them."""
        judged, bias = _affine(self.fitted, penalty, rank)
        error = self.held.error(_product(judged), bias)
        mean = self.held.y_sum / self.held.count
        energy = self.held.energy / self.held.count
        variance = energy - float(mean @ mean)
        # Of an output that does not vary, rounding is all that could be explained.
        r2 = 1.0 if variance <= _CONSTANT * energy else 1 - error / variance
        length = sum(self.lengths) / len(self.lengths)
        in_stream = error / max(length, 1e-300) if self.residual else 1 - r2
        return LinearFit(*_affine(self.fitted.merge(self.held), penalty, rank), r2, in_stream)


def _affine(sums: LeastSquares, penalty: float, rank: int | None) -> tuple[tuple[Tensor, ...], Tensor]:
    """Ridge regression, of reduced rank where one is given: then projected on the main directions of its predictions.

    Source: A. J. Izenman, "Reduced-rank regression for the multivariate linear model", 1975.
    """
    weight, bias = sums.solve_affine(penalty)
    if rank is None:
        return (weight,), bias
    centred = sums.gram - torch.outer(sums.x_sum, sums.x_sum) / sums.count
    directions = torch.linalg.eigh(weight.T @ centred @ weight).eigenvectors[:, -rank:]
    maps = (weight @ directions, directions.T)
    mean = sums.x_sum / sums.count
    return maps, sums.y_sum / sums.count - mean @ _product(maps)


def _rows(x: Tensor) -> int:
    """Number of tokens in (…, width)."""
    return x.shape[:-1].numel()


def _product(maps: Sequence[Tensor]) -> Tensor:
    return maps[0] if len(maps) == 1 else maps[0] @ maps[1]


@contextmanager
def _watching(sums: Iterable[_Sums]) -> Iterator[None]:
    """Have the FFNs keep what they read and write, for one batch."""
    handles = []
    for one in sums:

        def read(module: nn.Module, args: tuple[Any, ...], one: _Sums = one) -> None:
            one.seen["x"] = args[0]

        def wrote(module: nn.Module, args: tuple[Any, ...], output: Tensor, one: _Sums = one) -> None:
            one.seen["y"] = output

        def entered(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], one: _Sums = one) -> None:
            one.seen["stream"] = stream_of(args, kwargs)

        def left(module: nn.Module, args: tuple[Any, ...], output: Any, one: _Sums = one) -> None:
            one.seen["out"] = stream_of_output(output)

        handles += [
            one.reader.register_forward_pre_hook(read),
            one.writer.register_forward_hook(wrote),
            one.block.register_forward_pre_hook(entered, with_kwargs=True),
            one.block.register_forward_hook(left),
        ]
    with hooked(handles):
        yield
