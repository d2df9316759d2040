"""What a model loses on calibration data without some of its blocks, for all candidates in one go.

A batch goes through the model once, and the residual stream is kept before every candidate: as many streams as blocks,
of one batch. The model without block l then has to run only from block l + 1 on, with the earlier blocks handing the
kept stream through.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from hf_compress.anatomy.stacks import Stack
from hf_compress.calibration.capture import forward, inference, stream_of, with_stream
from hf_compress.calibration.data import Batch
from hf_compress.calibration.objective import batch_loss, first_tensor

# (the block's own forward, its arguments) -> what the block returns
BlockForward = Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]


@contextmanager
def replaced_forwards(stack: Stack, replacements: dict[int, BlockForward]) -> Iterator[None]:
    """Give single blocks, not their class, another forward for a while."""
    for index, replacement in replacements.items():
        own = stack.blocks[index].forward

        def patched(*args: Any, _own: Callable[..., Any] = own, _new: BlockForward = replacement, **kwargs: Any) -> Any:
            return _new(_own, args, kwargs)

        vars(stack.blocks[index])["forward"] = patched
    try:
        yield
    finally:
        for index in replacements:
            vars(stack.blocks[index]).pop("forward", None)


def losses_without(
    model: PreTrainedModel,
    stack: Stack,
    batches: Sequence[Batch] | Iterable[Batch],
    candidates: Sequence[int],
    skipped: Sequence[int] = (),
) -> dict[int, float]:
    """Loss of the model without block l, for every l of `candidates`; all of `skipped` are left out besides.

    Returns:
        Candidate -> mean loss (see `batch_loss`) over `batches`.
    """
    sums = {candidate: [0.0, 0.0] for candidate in candidates}
    with inference(model):
        for batch in tqdm(batches, desc="trying to do without each block", disable=None):
            trial = _Trial(model, stack, batch, set(skipped))
            for candidate in candidates:
                loss, weight = trial.without(candidate)
                sums[candidate][0] += loss
                sums[candidate][1] += weight
    return {candidate: loss / max(weight, 1e-300) for candidate, (loss, weight) in sums.items()}


class _Trial:
    """One batch, run through the model once, and then again from any block on."""

    def __init__(self, model: PreTrainedModel, stack: Stack, batch: Batch, skipped: set[int]) -> None:
        self.model, self.stack, self.batch, self.skipped = model, stack, batch, skipped
        self.streams: dict[int, Tensor] = {}
        self.forms: dict[int, Any] = {}
        with replaced_forwards(stack, {i: self._recorded(i, skip=False) for i in range(len(stack))}):
            self.reference = first_tensor(forward(model, batch))
        if skipped:
            with replaced_forwards(stack, {i: self._recorded(i, i in skipped) for i in range(len(stack))}):
                forward(model, batch)

    def _recorded(self, index: int, skip: bool) -> BlockForward:
        """Keep the stream before the block, and what its return value looks like."""

        def run(own: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            self.streams[index] = stream = stream_of(args, kwargs)
            if skip:
                return with_stream(self.forms[index], stream)
            output = own(*args, **kwargs)
            self.forms[index] = with_stream(output, stream)
            return output

        return run

    def _handing(self, index: int, stream: Tensor | None) -> BlockForward:
        """Return `stream`, or else what came in."""
        return lambda own, args, kwargs: with_stream(
            self.forms[index], stream if stream is not None else stream_of(args, kwargs)
        )

    def without(self, candidate: int) -> tuple[float, float]:
        """Loss and weight of the batch when `candidate` is left out as well."""
        replacements = {i: self._handing(i, self.streams[candidate]) for i in range(candidate + 1)}
        replacements |= {i: self._handing(i, None) for i in self.skipped if i > candidate}
        with replaced_forwards(self.stack, replacements):
            return batch_loss(self.model, forward(self.model, self.batch), self.batch, self.reference)
