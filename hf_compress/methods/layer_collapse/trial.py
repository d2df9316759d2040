"""What the collapse of each FFN would cost the model, measured on a few calibration batches."""

from __future__ import annotations

from hf_compress.anatomy.anatomy import Block
from hf_compress.anatomy.stacks import Stack
from hf_compress.anatomy.undo import Undo
from hf_compress.calibration.objective import batch_loss, mean_loss, reference_for
from hf_compress.calibration.runner import BlockRunner
from hf_compress.methods.base.context import CalibrationContext
from hf_compress.methods.layer_collapse.linear import LinearFit
from hf_compress.rewrite.apply import carry_out


class Trial:
    """Compares candidates by the loss; made before anything is collapsed, whose outputs other models are held to."""

    def __init__(self, context: CalibrationContext, stack: Stack, samples: int) -> None:
        self.context, self.stack = context, stack
        self.runners = [BlockRunner(context.model, stack, batch) for batch in context.calibration.some(samples)]
        self.references = [reference_for(context.model, r.record()[0], r.batch) for r in self.runners]

    def losses(self, fits: dict[int, LinearFit]) -> dict[int, float]:
        """Mean loss of the model as it is now with one more FFN collapsed, for each of them."""
        streams = [runner.record()[1] for runner in self.runners]
        losses = {}
        for index, fit in fits.items():
            draft = fit.draft(Block(self.context.model, self.stack, index))
            with Undo() as undo:
                carry_out(draft, self.context.model, undo)
                pairs = []
                for runner, before, reference in zip(self.runners, streams, self.references, strict=True):
                    output = runner.finish(index + 1, runner.run(index, before[index]), ())
                    pairs.append(batch_loss(self.context.model, output, runner.batch, reference))
            losses[index] = mean_loss(sum(loss for loss, _ in pairs), sum(weight for _, weight in pairs))
        return losses
