"""What an error of the residual stream costs, by the Fisher information of the model's outputs there.

An error e of the stream behind a block moves the distribution of the model's outputs by a Kullback-Leibler divergence
of about ½ Σ E (gᵀ e)², summed over tokens. g is the gradient there of the log-probability of an output that is drawn
from the model; what errors of two tokens do to each other is left out. One backward sweep tells g behind every block,
so what changes of any number of blocks would cost is estimated without running the model once for each.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from itertools import repeat
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_compress.anatomy.stacks import Stack
from hf_compress.calibration.capture import inference, stream_of_output, stream_tokens
from hf_compress.calibration.data import Calibration
from hf_compress.calibration.losses import LossSweep
from hf_compress.calibration.objective import drawn_gradient, draws, first_tensor
from hf_compress.calibration.processes import any_of, total
from hf_compress.calibration.runner import BlockRunner
from hf_compress.calibration.sweep import turns

COST_TOKENS = 8192


def estimated_costs(
    sweep: LossSweep, candidates: Collection[int], error: Callable[[int], Sequence[Tensor]], seed: int = 0
) -> dict[int, float]:
    """What an error behind each of some blocks would cost, in nats a token (of a language model).

    Blocks come from the last to the first. The graph of one of them, for one batch, is in memory at a time, and of each
    batch one gradient.

    Args:
        sweep: batches, whose streams have been kept.
        candidates: blocks.
        error: of the stream behind a block: for each batch (samples, positions, width).
        seed: of the outputs that are drawn.

    Returns:
        Candidate -> cost. Where no gradient comes through the model, the mean square of the error.
    """
    end = len(sweep.stack)
    generators = [draws(seed, number) for number in sweep.numbers]
    gradients = _or_none(_at_the_end, zip(sweep.runners, sweep.at(end), generators, strict=True))
    costs = {}
    for index in turns(sweep.stack, reversed(range(end)), "weighing errors"):
        if index in candidates:
            costs[index] = _cost(sweep, error(index), gradients)
        if gradients is not None and index not in sweep.skipped:
            gradients = _or_none(_before, zip(sweep.runners, repeat(index), sweep.at(index), gradients))
    return costs


def costs_without(model: PreTrainedModel, stack: Stack, data: Calibration) -> dict[int, float]:
    """What it would cost to leave out each block of a stack, by its number; see `estimated_costs`.

    From batches that hold about 8,192 tokens, spread over the data.
    """
    with inference(model):
        sweep = LossSweep(model, stack, data.about(COST_TOKENS, data.tokens or data.samples, least=2))
        sweep.keep()

        def error(index: int) -> list[Tensor]:
            return [before - after for before, after in zip(sweep.at(index), sweep.at(index + 1), strict=True)]

        return estimated_costs(sweep, range(len(stack)), error)


def _cost(sweep: LossSweep, errors: Sequence[Tensor], gradients: Sequence[Tensor] | None) -> float:
    sums, tokens = 0.0, 0
    for number, (runner, error) in enumerate(zip(sweep.runners, errors, strict=True)):
        real = stream_tokens(runner.stack, runner.batch, error)
        rows = error[real].float()
        if gradients is None:
            sums += float(rows.square().mean(dim=-1).sum())
        else:
            sums += float((rows * gradients[number][real].float()).sum(dim=-1).square().sum()) / 2
        tokens += len(rows)
    sums, count = total(sums, tokens)
    return sums / max(1, count)


def _at_the_end(runner: BlockRunner, stream: Tensor, generator: torch.Generator) -> Tensor:
    """The gradient of a drawn output at the stream behind the last block."""
    with torch.enable_grad():
        given = stream.detach().requires_grad_()
        output = runner.finish(given.clone())
        start = drawn_gradient(runner.model, output, runner.batch, generator)
        return torch.autograd.grad(first_tensor(output), given, start)[0]


def _before(runner: BlockRunner, index: int, stream: Tensor, behind: Tensor) -> Tensor:
    """The gradient before a block, of what has the gradient `behind` behind it; none is taken of weights."""
    with torch.enable_grad():
        given = stream.detach().requires_grad_()
        after = stream_of_output(runner.output(index, given.clone()))  # a block may write into what it is given
        return torch.autograd.grad(after, given, behind)[0]


def _or_none(gradient: Callable[..., Tensor], batches: Iterable[tuple[Any, ...]]) -> list[Tensor] | None:
    """Of each batch; None where a model has parts that no gradient comes through."""
    found: list[Tensor] | None = None
    try:
        found = [gradient(*batch) for batch in batches]
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, AssertionError):
        pass
    return None if any_of(found is None) else found
