"""Terms added to the loss that a model computes for itself, in the share that a micro-batch has in a step."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

# From the arguments and the output of a forward pass, and the weight of the micro-batch (see `item_weight`), the loss
# that it has without the terms and the terms.
Terms = Callable[[dict[str, Any], Any, Tensor | None, Tensor], tuple[Tensor | None, Tensor | None]]


class Objective:
    """Changes the loss of a model's next training forward pass, each time that it is armed.

    What does so comes off as the pass begins, so that nothing is left on a model when training ends in any way, by an
    interruption in the middle of the pass too; evaluation never sees it. (A hook would stay: `always_call` is for
    errors alone.)
    """

    def __init__(self, model: PreTrainedModel, terms: Terms) -> None:
        self.model, self.terms = model, terms
        self.added = self.reached = False
        self._undo: Callable[[], None] | None = None

    def arm(self) -> None:
        """Have the next forward pass get the terms."""
        self.disarm()
        model, own, forward = self.model, vars(self.model).get("forward"), self.model.forward

        @wraps(forward)
        def once(*args: Any, **kwargs: Any) -> Any:
            self.disarm()
            output = forward(*args, **kwargs)
            return self._with_terms(kwargs, output) if model.training else output

        vars(model)["forward"] = once
        self._undo = partial(vars(model).pop, "forward") if own is None else partial(setattr, model, "forward", own)

    def disarm(self) -> None:
        """Have it left alone."""
        if self._undo is not None:
            self._undo()
            self._undo = None

    def check(self) -> None:
        """Raise if the terms of the passes since the last check have not come into any gradient."""
        added, reached = self.added, self.reached
        self.added = self.reached = False
        if added and not reached:
            raise ValueError(
                "the Trainer does not train on the loss that the model gives, so nothing can be added to it: use a "
                "Trainer whose compute_loss returns the model's own loss"
            )

    def _with_terms(self, kwargs: dict[str, Any], output: Any) -> Any:
        named = isinstance(output, dict)
        own = output.get("loss") if named else output[0]
        if not named and not (isinstance(own, Tensor) and own.ndim == 0):
            own = None
        loss, term = self.terms(kwargs, output, own, item_weight(self.model, kwargs))
        if term is not None:
            self.added = True
            if term.requires_grad:
                term.register_hook(self._reach)
            else:
                self.reached = True
            loss = term if loss is None else loss + term
        if not named:
            return (loss, *output[1:]) if own is not None else (loss, *output)
        output["loss"] = loss
        return output

    def _reach(self, gradient: Tensor) -> None:
        self.reached = True


class ObjectiveCallback(TrainerCallback):
    """Arms an objective for every micro-batch of a Trainer.

    Attributes:
        objective: set when training begins; None for the model's own loss alone.
    """

    objective: Objective | None = None

    def disarm(self) -> None:
        """Leave the model's next pass alone."""
        if self.objective is not None:
            self.objective.disarm()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.objective is not None:
            self.objective.arm()

    on_substep_end = on_step_begin  # the next micro-batch follows

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.objective is not None:
            self.objective.check()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.disarm()


def item_weight(model: PreTrainedModel, kwargs: dict[str, Any]) -> Tensor:
    """The share that a micro-batch has in the loss of its optimizer's step; 1 where the Trainer averages afterwards.

    With `num_items_in_batch`, the number of labels in all micro-batches of all processes, a model's loss is a part of
    the whole, and the Trainer only sums up. A term that does not depend on the data is then cut into the same parts, so
    that its gradient is that of the term, whatever the number of accumulation steps and processes.
    """
    items = kwargs.get("num_items_in_batch")
    labels = kwargs.get("shift_labels")
    if labels is None:
        labels = kwargs.get("labels")
        if labels is not None and shifts_labels(model):
            labels = labels[..., 1:]
    if items is None or labels is None:
        return torch.ones((), dtype=torch.float32, device=model.device)
    total = items if isinstance(items, Tensor) else torch.tensor(items)
    return labels.ne(-100).sum().float().to(model.device) / total.to(model.device)


def shifts_labels(model: PreTrainedModel) -> bool:
    """Whether a model's loss compares each position with the label of the next, as causal language models do."""
    causal = LOSS_MAPPING.get(getattr(model, "loss_type", None) or "") is ForCausalLMLoss
    return causal and not model.config.is_encoder_decoder
