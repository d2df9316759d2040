"""One learner on its way through the schedule: steps of Adam, in all processes alike, and a stop where it diverges."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hf_compress.calibration.processes import from_one, here, summed, total
from hf_compress.methods.adaptive_compress.learner import Learner, Terms
from hf_compress.modules.bottleneck import Bottleneck

_KEEP_EVERY = 50  # steps
_DIVERGED = 10.0  # times the variance of the stream, or the first error


class LearnerRun:
    """
    Attributes:
        learner: what learns.
        curve: see `FittedBottleneck`.
        stopped: why it stopped early.
    """

    def __init__(self, learner: Learner) -> None:
        self.learner = learner
        self.curve: dict[str, list[float]] = {"step": [], "retention": [], "error": [], "active": []}
        self.stopped = ""
        if here()[1] > 1:  # all from the first one's start, whatever the others' last digits
            learner.restore(from_one(learner.state))
        trained = [parameter for parameter in learner.module.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.Adam(trained, lr=learner.config.rate)
        self._good = (0, _copied(learner.state()))

    @property
    def goes_on(self) -> bool:
        """Whether there is anything left to learn."""
        return self.learner.trains and not self.stopped

    def learn(self, rows: Tensor, step: int, steps: int) -> None:
        """Take the tokens (tokens, hidden) of a batch in `updates` steps, from `step` of `steps` on, in any order."""
        if not self.goes_on:
            return
        config = self.learner.config
        self.learner.module.to(rows.device)
        for state in self.optimizer.state.values():  # of a run that goes on: it was read to the CPU
            state |= {name: value.to(rows.device) for name, value in state.items() if name != "step"}
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(config.seed * 1_000_003 + step))
        parts = rows[order.to(rows.device)].tensor_split(config.updates)
        for part in parts:
            if self.goes_on:
                self._step(part, step, steps)
            step += 1
        if step == steps and self.goes_on:  # no step comes after it that would notice
            self._told(parts[0], step)

    @torch.enable_grad()
    def _step(self, rows: Tensor, step: int, steps: int) -> None:
        retention = self.learner.config.retention(step, steps)
        self.learner.retain(retention)
        self.optimizer.zero_grad()
        told = self._told(rows, step)
        if told is None:
            return
        self.learner.constrain_gradients()
        for group in self.optimizer.param_groups:
            group["lr"] = self.learner.config.rate * min(1.0, 3 * (1 - step / steps))
        self.optimizer.step()
        self.learner.after_step(told[2:])
        self.note(step, retention, told)

    def note(self, step: int, retention: float, told: Tensor) -> None:
        """Add a step to the curve; `told` begins with its error and its active features."""
        for name, value in zip(self.curve, (step, retention, told[0].item(), told[1].item()), strict=True):
            self.curve[name].append(value)

    def _told(self, rows: Tensor, step: int) -> Tensor | None:
        """Of all processes' tokens the error, the active features and the energy, and as gradients those of the loss.

        None where there is nothing to learn from: no process has a token, or the bottleneck has diverged.
        """
        terms = self.learner.terms(rows) if len(rows) else None
        if terms is not None and terms.loss.requires_grad:
            terms.loss.backward()  # type: ignore[no-untyped-call]
        (tokens,) = total(len(rows))
        if not tokens:
            return None
        told = _mean_of_all(self.learner, terms, len(rows) / tokens)
        return None if self._diverges(told[0].item(), step) else told

    def _diverges(self, error: float, step: int) -> bool:
        """Whether an error is worse than all sense; the last good state is then put back."""
        first = self.curve["error"][0] if self.curve["error"] else error
        if error <= _DIVERGED * max(1.0, first) < math.inf:  # not so where it is NaN
            if step % _KEEP_EVERY == 0:
                self._good = (step, _copied(self.learner.state()))
            return False
        step_kept, state = self._good
        self.learner.restore(state)
        self.stopped = (
            f"diverged in step {step} (error {error:.3g} times the variance): it is as it was in step {step_kept}; "
            "lower learning_rate="
        )
        return True

    def finished(self) -> tuple[Bottleneck, Tensor]:
        """The bottleneck as it is to be used, on the CPU, and which of its features it has."""
        self.learner.module.to("cpu")
        if not self.stopped:
            self.learner.retain(self.learner.config.kept)
        module, kept = self.learner.finished()
        return module.requires_grad_(False), kept

    def state(self) -> dict[str, Tensor]:
        """All that changes but the curve; with the last good state, for where it diverges."""
        moments = {
            f"adam.{index}.{name}": value
            for index, one in self.optimizer.state_dict()["state"].items()
            for name, value in one.items()
        }
        step, good = self._good
        kept = {f"good.{name}": value for name, value in good.items()} | {"good_step": torch.tensor(step)}
        return self.learner.state() | moments | kept

    def restore(self, state: dict[str, Tensor]) -> None:
        """The inverse of `state`."""
        self.learner.restore({name: value for name, value in state.items() if not name.startswith(("adam.", "good"))})
        good = {name.removeprefix("good."): value for name, value in state.items() if name.startswith("good.")}
        self._good = (int(state["good_step"]), _copied(good))
        whole = self.optimizer.state_dict()
        whole["state"] = {}
        for name, value in state.items():
            if name.startswith("adam."):
                _, index, key = name.split(".")
                whole["state"].setdefault(int(index), {})[key] = value
        self.optimizer.load_state_dict(whole)


def _mean_of_all(learner: Learner, terms: Terms | None, share: float) -> Tensor:
    """The error, the active features and the energy of a step, and in its place the gradient, over all processes."""
    trained = [parameter for parameter in learner.module.parameters() if parameter.requires_grad]
    told = torch.zeros(2 + len(learner.importance), dtype=torch.float32, device=trained[0].device)
    if terms is not None:
        told = terms.told
    if here()[1] > 1:
        tensors = [told, *(_gradient(parameter) for parameter in trained)]
        for tensor in tensors:
            tensor *= share
        summed(tensors)
    return told


def _gradient(parameter: Tensor) -> Tensor:
    if parameter.grad is None:  # a process without tokens, or a part that the loss does not hang on
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad


def _copied(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in state.items()}
