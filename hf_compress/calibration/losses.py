"""What a model loses on calibration data by one change or another, to choose between them.

A batch goes through the model once, and the residual stream is kept before every block: as many streams as blocks. The
model with a change in block l then has to run only from there on.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any

from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from hf_compress.anatomy.stacks import Stack
from hf_compress.calibration.capture import inference
from hf_compress.calibration.data import Batch
from hf_compress.calibration.objective import batch_loss, mean_loss, reference_for
from hf_compress.calibration.runner import BlockRunner

Loss = tuple[float, float]  # of a batch: its sum, and the weight to divide it by


class LossRunner(BlockRunner):
    """One batch, and what changes of the model cost on it.

    Attributes:
        streams: before every block and behind the last, of the model as it was kept last.
        skipped: the blocks that it was kept without.
    """

    def __init__(self, model: PreTrainedModel, stack: Stack, batch: Batch) -> None:
        super().__init__(model, stack, batch)
        self.streams: dict[int, Tensor] = {}
        self.skipped: Collection[int] = ()
        self._reference: tuple[Tensor | None] | None = None

    def keep(self, skipped: Collection[int] = ()) -> Loss:
        """Keep the streams of the model as it is, without the blocks `skipped`; its loss.

        The first time, with nothing changed or skipped: that is what the outputs of other models are held to.
        """
        output, self.streams = self.record(skipped)
        self.skipped = skipped
        self._reference = self._reference or (reference_for(self.model, output, self.batch),)
        return self._loss(output)

    def go_on(self, start: int, skipped: Collection[int]) -> None:
        """Keep the streams behind block `start` on, which has changed, without the blocks `skipped`."""
        self.record_from(start, self.streams, skipped)
        self.skipped = skipped

    def loss_after(self, index: int, stream: Tensor) -> Loss:
        """The loss where `stream` is what comes out of block `index`; the blocks after it are as they were kept."""
        return self._loss(self.finish(index + 1, stream, self.skipped))

    def _loss(self, output: Any) -> Loss:
        assert self._reference is not None
        return batch_loss(self.model, output, self.batch, *self._reference)


def mean_of(losses: Iterable[Loss]) -> float:
    """The mean loss over batches."""
    sums, weights = zip(*losses, strict=True)
    return mean_loss(sum(sums), sum(weights))


def losses_without(
    model: PreTrainedModel,
    stack: Stack,
    batches: Iterable[Batch],
    candidates: Sequence[int],
    skipped: Sequence[int] = (),
) -> dict[int, float]:
    """Loss of the model without block l, for every l of `candidates`; all of `skipped` are left out besides.

    No streams are kept but those of one batch.

    Returns:
        Candidate -> mean loss (see `batch_loss`) over `batches`.
    """
    losses: dict[int, list[Loss]] = {candidate: [] for candidate in candidates}
    with inference(model):
        for batch in tqdm(batches, desc="trying to do without each block", disable=None):
            runner = LossRunner(model, stack, batch)
            runner.keep()
            if skipped:
                runner.keep(skipped)
            for candidate, own in losses.items():
                own.append(runner.loss_after(candidate, runner.streams[candidate]))
    return {candidate: mean_of(own) for candidate, own in losses.items()}
