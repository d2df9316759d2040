"""Gradients on their way down a stack, of which one block's graph for one batch is in memory at a time.

Batches have gone up before (see `Streams`); from what came before a block, it runs once more, and the gradient behind
it is taken back. What looks at the block meanwhile sees what it would in a backward pass of the whole model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from hf_compress.calibration.capture import stream_of_output
from hf_compress.calibration.runner import BlockRunner
from hf_compress.calibration.sweep import Streams, resident_around, turns
from hf_compress.errors import CalibrationError, UnsupportedModelError

# What is raised where blocks do not run alone; in memory all of the model may, at once, and says better what it is.
NOT_BY_BLOCKS = (UnsupportedModelError, CalibrationError, RuntimeError, AssertionError)


class Descent:
    """Batches, and the gradient of each at some block.

    descent = Descent(streams, end)
    for index in descent.blocks("weighing"):
        for number in range(len(streams.runners)):
            with watching(stack.blocks[index]):
                descent.take_past(index, number)

    The model's parameters require no gradients.

    Args:
        streams: of batches, kept.
        end: what is taken back: given a batch and its stream behind the last block, from which it has `finish` go on,
            the gradient at that stream.
        through_first: whether gradients come to the stream before the first block, as to embeddings that require any.
    """

    def __init__(
        self, streams: Streams, end: Callable[[BlockRunner, Tensor], Tensor], through_first: bool = True
    ) -> None:
        self.streams, self._through_first = streams, through_first
        with resident_around(streams.model, streams.stack):
            last = streams.at(len(streams.stack))
            self._gradients = [end(runner, stream) for runner, stream in zip(streams.runners, last, strict=True)]

    def blocks(self, description: str) -> Iterator[int]:
        """Blocks from the last to the first, each held in memory while it is its turn."""
        yield from turns(self.streams.stack, reversed(range(len(self.streams.stack))), description)

    def take_past(self, index: int, number: int) -> None:
        """Take the gradient of a batch past a block."""
        runner, stream = self.streams.runners[number], self.streams.at(index)[number]
        needed = index > 0 or self._through_first
        self._gradients[number] = gradient_before(runner, index, stream, self._gradients[number], needed)


@torch.enable_grad()
def gradient_before(runner: BlockRunner, index: int, stream: Tensor, behind: Tensor, needed: bool = True) -> Tensor:
    """The gradient before a block, of what has the gradient `behind` behind it; 0 where it is not needed.

    All gradients in the block are taken, those too which do not come to the stream.
    """
    given = stream.detach().requires_grad_(needed)
    after = stream_of_output(runner.output(index, given.clone()))  # a block may write into what it is given
    if after.requires_grad:
        torch.autograd.backward(after, behind)
    for leaf in runner.handed(index):
        leaf.grad = None
    return torch.zeros_like(given) if given.grad is None else given.grad
