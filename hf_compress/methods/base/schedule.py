"""What a method does while a model is trained. `training.callback` runs it inside a `transformers.Trainer`."""

from __future__ import annotations

from torch import Tensor
from transformers import PreTrainedModel

from hf_compress.methods.base.context import CalibrationContext
from hf_compress.methods.base.settings import CompressionConfig
from hf_compress.plan.plan import Plan


class TrainingSchedule:
    """What happens to a model before, while and after it is trained: a method overrides `prepare`, and what it needs.

    No modules may come or go between `prepare` and `finish`: the optimizer, and in several processes the gradients'
    exchange, hold on to the parameters that there were at the beginning. What changes in between are values: masks,
    gates, shares.

    `progress` is the share of the optimizer's steps that are done, in [0, 1].

    Attributes:
        config: the method's settings.
        steps: of the optimizer, in the whole run; known from `begin` on.
    """

    def __init__(self, config: CompressionConfig) -> None:
        self.config = config
        self.steps = 1

    def prepare(self, context: CalibrationContext) -> Plan:
        """The structure to train with. Asked for when the Trainer is made, before it makes its optimizer."""
        raise NotImplementedError

    def begin(self, model: PreTrainedModel, progress: float) -> None:
        """Called before the first step, also of a run that is resumed."""

    def penalty(self, progress: float) -> Tensor | None:
        """What is added to the loss of an optimizer's step, a scalar with a gradient; None for nothing."""
        return None

    def step(self, progress: float, loss_scale: float) -> None:
        """Called before each step of the optimizer. Gradients are `loss_scale` times too large, as in float16."""

    def finish(self, context: CalibrationContext) -> Plan | None:
        """What to make of the trained model; None where nothing is left to do."""
        return None

    def logs(self) -> dict[str, float]:
        """What the Trainer's reporters show beside the loss."""
        return {}

    def state(self) -> dict[str, Tensor]:
        """All that is not in the model and that a resumed run has to know, on the CPU."""
        return {}

    def restore(self, state: dict[str, Tensor]) -> None:
        """The inverse of `state`, called after `begin`."""
