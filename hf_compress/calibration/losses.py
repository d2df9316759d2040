"""What a model loses on calibration data by one change or another, to choose between them.

Batches go through the model once, and the residual stream is kept before every block. The model with a change in block
l then has to run only from there on. All batches go past a block before they go past the next (see `sweep`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor
from transformers import PreTrainedModel

from hf_compress.anatomy.stacks import Stack
from hf_compress.calibration.capture import inference, stream_of_output
from hf_compress.calibration.data import Batch
from hf_compress.calibration.memory import working_memory
from hf_compress.calibration.objective import batch_loss, first_tensor, mean_loss, speaks
from hf_compress.calibration.processes import own, total
from hf_compress.calibration.runner import BlockRunner
from hf_compress.calibration.sweep import Streams, turns

_LEFT, _WHOLE = -1, -2  # streams of the model without the blocks that are left out, and with all of them


class Losses:
    """The loss of a model on some batches, by the output that their last streams lead to.

    Args:
        runners: of the batches.
        whole: the streams of the unchanged model behind the last block, one a batch: where the model is no language
            model, its outputs are held to what these lead to.
    """

    def __init__(self, runners: Sequence[BlockRunner], whole: Sequence[Tensor]) -> None:
        self.runners = runners
        self._references = [
            None if speaks(r.model, r.batch) else first_tensor(r.finish(stream))
            for r, stream in zip(runners, whole, strict=True)
        ]

    def of(self, streams: Sequence[Tensor]) -> float:
        """Mean loss, over the batches of all processes, where these are the streams behind the last block.

        One a batch; see `batch_loss`.
        """
        found = [
            batch_loss(runner.model, runner.finish(stream), runner.batch, reference)
            for runner, stream, reference in zip(self.runners, streams, self._references, strict=True)
        ]
        return mean_loss(*total(sum(loss for loss, _ in found), sum(weight for _, weight in found)))


class LossSweep(Streams):
    """Batches, and what changes of the model cost on them."""

    def __init__(self, model: PreTrainedModel, stack: Stack, batches: Iterable[Batch]) -> None:
        super().__init__(model, stack, batches)
        self._losses: Losses | None = None

    def keep(self) -> None:
        """Keep the streams of the model as it is. The first time, with nothing changed."""
        super().keep()
        self._losses = self._losses or Losses(self.runners, self.at(len(self.stack)))

    def loss(self) -> float:
        """The mean loss of the model as it was kept last."""
        return self._loss(self.at(len(self.stack)))

    def _loss(self, streams: Sequence[Tensor]) -> float:
        assert self._losses is not None, "the streams have not been kept"
        return self._losses.of(streams)

    def loss_after(self, index: int, streams: Sequence[Tensor]) -> float:
        """The mean loss where `streams` come out of block `index`; the blocks after it are as they were kept."""
        streams = list(streams)
        for later in turns(self.stack, range(index + 1, len(self.stack)), "trying"):
            if later not in self.skipped:
                streams = [_through(r, later, stream) for r, stream in zip(self.runners, streams, strict=True)]
        return self._loss(streams)


def losses_without(
    model: PreTrainedModel,
    stack: Stack,
    batches: Iterable[Batch],
    candidates: Sequence[int],
    skipped: Sequence[int] = (),
) -> dict[int, float]:
    """Loss of the model without block l, for every l of `candidates`; all of `skipped` are left out besides.

    In one sweep, in which the streams of each candidate branch off where its block is.

    Returns:
        Candidate -> mean loss (see `batch_loss`) over `batches`.
    """
    with inference(model):
        runners, memory = [BlockRunner(model, stack, batch) for _, batch in own(batches)], working_memory()
        lanes = {_LEFT: [runner.start() for runner in runners]}
        if skipped and not all(speaks(model, runner.batch) for runner in runners):
            lanes[_WHOLE] = list(lanes[_LEFT])
        for index in turns(stack, range(len(stack)), "trying to do without each block"):
            if index in candidates:
                lanes[index] = list(lanes[_LEFT])
            passing = [lane for lane in lanes if lane != index and (lane == _WHOLE or index not in skipped)]
            for number, runner in enumerate(runners):
                if index in skipped:  # how the model goes on behind a block is known when it has run
                    runner.run(index, lanes[_LEFT][number])
                for lane in passing:
                    past = _through if lane >= 0 else BlockRunner.run
                    after = past(runner, index, lanes[lane][number])
                    lanes[lane][number] = memory.keep(number * len(lanes), after)
        losses = Losses(runners, lanes.get(_WHOLE, lanes[_LEFT]))
        return {candidate: losses.of(lanes[candidate]) for candidate in candidates}


def _through(runner: BlockRunner, index: int, stream: Tensor) -> Tensor:
    """What a block that has run before makes of a stream; NaN is no error here: its loss is infinite."""
    return stream_of_output(runner.output(index, stream))
