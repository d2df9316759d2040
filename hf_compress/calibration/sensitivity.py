"""What an error of the residual stream costs, by the Fisher information of the model's outputs there.

An error e of the stream behind a block moves the distribution of the model's outputs by a Kullback-Leibler divergence
of about ½ Σ E (gᵀ e)², summed over tokens. g is the gradient there of the log-probability of an output that is drawn
from the model; what errors of two tokens do to each other is left out. One backward sweep tells g behind every block,
so what changes of any number of blocks would cost is estimated without running the model once for each.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from hf_compress.anatomy.stacks import Stack
from hf_compress.calibration.capture import inference, stream_of_output, stream_tokens
from hf_compress.calibration.data import Batch
from hf_compress.calibration.losses import LossRunner
from hf_compress.calibration.objective import drawn_gradient, first_tensor


def estimated_costs(
    runners: Sequence[LossRunner],
    candidates: Collection[int],
    error: Callable[[int], Sequence[Tensor]],
    seed: int = 0,
) -> dict[int, float]:
    """What an error behind each of some blocks would cost, in nats a token (of a language model).

    Blocks come from the last to the first. The graph of one of them, for one batch, is in memory at a time, and of each
    batch one gradient.

    Args:
        runners: batches, whose streams have been kept (see `LossRunner.keep`).
        candidates: blocks.
        error: of the stream behind a block: for each batch (samples, positions, width).
        seed: of the outputs that are drawn.

    Returns:
        Candidate -> cost. Where no gradient comes through the model, the mean square of the error.
    """
    generator = torch.Generator().manual_seed(seed)
    gradients: list[Tensor] | None = _or_none(lambda: [_at_the_end(runner, generator) for runner in runners])
    costs = {}
    for index in reversed(range(len(runners[0].stack))):
        if index in candidates:
            costs[index] = _cost(runners, error(index), gradients)
        if gradients is not None and index not in runners[0].skipped:
            behind = gradients
            gradients = _or_none(
                lambda index=index, behind=behind: [  # type: ignore[misc]
                    _before(runner, index, gradient) for runner, gradient in zip(runners, behind, strict=True)
                ]
            )
    return costs


def costs_without(model: PreTrainedModel, stack: Stack, batches: Iterable[Batch]) -> dict[int, float]:
    """What it would cost to leave out each block of a stack, by its number; see `estimated_costs`.

    No streams are kept but those of one batch.
    """
    sums = dict.fromkeys(range(len(stack)), 0.0)
    with inference(model):
        for number, batch in enumerate(tqdm(batches, desc="weighing errors", disable=None)):
            runner = LossRunner(model, stack, batch)
            runner.keep()
            streams = runner.streams
            costs = estimated_costs([runner], sums, lambda i, s=streams: [s[i] - s[i + 1]], number)  # type: ignore[misc]
            tokens = int(stream_tokens(stack, batch, streams[0]).sum())
            sums = {index: total + tokens * costs[index] for index, total in sums.items()}
    return sums


def _cost(runners: Sequence[LossRunner], errors: Sequence[Tensor], gradients: Sequence[Tensor] | None) -> float:
    total, tokens = 0.0, 0
    for number, (runner, error) in enumerate(zip(runners, errors, strict=True)):
        real = stream_tokens(runner.stack, runner.batch, error)
        rows = error[real].float()
        if gradients is None:
            total += float(rows.square().mean(dim=-1).sum())
        else:
            total += float((rows * gradients[number][real].float()).sum(dim=-1).square().sum()) / 2
        tokens += len(rows)
    return total / max(1, tokens)


def _at_the_end(runner: LossRunner, generator: torch.Generator) -> Tensor:
    """The gradient of a drawn output at the stream behind the last block."""
    end = len(runner.stack)
    with torch.enable_grad():
        given = runner.streams[end].detach().requires_grad_()
        output = runner.finish(end, given.clone(), ())
        start = drawn_gradient(runner.model, output, runner.batch, generator)
        return torch.autograd.grad(first_tensor(output), given, start)[0]


def _before(runner: LossRunner, index: int, behind: Tensor) -> Tensor:
    """The gradient before a block, of what has the gradient `behind` behind it."""
    with torch.enable_grad():
        given = runner.streams[index].detach().requires_grad_()
        after = stream_of_output(runner.output(index, given.clone()))  # a block may write into what it is given
        return torch.autograd.grad(after, given, behind)[0]


def _or_none(gradients: Callable[[], list[Tensor]]) -> list[Tensor] | None:
    """None where a model has parts that no gradient comes through."""
    try:
        return gradients()
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, AssertionError):
        return None
