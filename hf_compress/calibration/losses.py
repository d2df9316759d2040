"""What a model loses on calibration data without some of its blocks, for all candidates in one go.

A batch goes through the model once, and the residual stream is kept before every block: as many streams as blocks, of
one batch. The model without block l then has to run only from block l + 1 on.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tqdm import tqdm
from transformers import PreTrainedModel

from hf_compress.anatomy.stacks import Stack
from hf_compress.calibration.capture import inference
from hf_compress.calibration.data import Batch
from hf_compress.calibration.objective import batch_loss, mean_loss, reference_for
from hf_compress.calibration.runner import BlockRunner


def losses_without(
    model: PreTrainedModel,
    stack: Stack,
    batches: Iterable[Batch],
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
            runner = BlockRunner(model, stack, batch)
            whole, streams = runner.record()
            reference = reference_for(model, whole, batch)
            if skipped:
                _, streams = runner.record(skipped)
            for candidate in candidates:
                output = runner.finish(candidate + 1, streams[candidate], skipped)
                loss, weight = batch_loss(model, output, batch, reference)
                sums[candidate][0] += loss
                sums[candidate][1] += weight
    return {candidate: mean_loss(loss, weight) for candidate, (loss, weight) in sums.items()}
