"""Which blocks are absorbed by those before them: again and again, the one whose absorption costs least.

A candidate is a block that the one before it absorbs by a local fit on a few calibration samples. What the error that
is left costs is estimated for all of them in one backward sweep; the few of the least cost are tried on the model, by
its loss on other samples, and so are those that the last choice has touched.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor
from tqdm import tqdm

from hf_compress.anatomy.residency import resident
from hf_compress.anatomy.stacks import Stack
from hf_compress.anatomy.undo import Undo
from hf_compress.calibration.data import Batch
from hf_compress.calibration.losses import LossSweep
from hf_compress.calibration.sensitivity import estimated_costs
from hf_compress.methods.base.choice import VERIFIED, cheapest
from hf_compress.methods.base.context import CalibrationContext, Drafts
from hf_compress.methods.mka.writers import Writers

# Penalty of the local fits, which are many and on little data: of so many tokens.
LOCAL_PENALTY = 0.1
LOCAL_TOKENS = 4096
FEW = 6  # candidates that are all tried


class Chooser:
    """Compares candidates on a few batches: of three, one to score, and of the others as many as the fits need.

    Args:
        batches: at least one.
    """

    def __init__(self, context: CalibrationContext, stack: Stack, batches: Sequence[Batch]) -> None:
        self.context, self.stack = context, stack
        fitting = [batch for i, batch in enumerate(batches) if i % 3 != 2 or len(batches) < 3]
        scoring = [batch for i, batch in enumerate(batches) if i % 3 == 2]
        self.fitting = LossSweep(context.model, stack, _of_tokens(fitting, LOCAL_TOKENS))
        self.scoring = LossSweep(context.model, stack, scoring) if scoring else self.fitting
        self.sweeps = list({id(sweep): sweep for sweep in (self.fitting, self.scoring)}.values())
        self.absorbed: list[int] = []

    def choose(self, count: int) -> tuple[list[int], list[dict[str, Any]]]:
        """The blocks to absorb, in rising order, and for every choice the losses of the candidates tried.

        The first block has none before it to absorb it, and is never a candidate.
        """
        found = self.context.journal.facts("choices", lambda: self._choices(count))
        self.absorbed = found["absorbed"]
        if not self.scoring.streams:  # of a run that has chosen before
            self.scoring.keep()
        return self.absorbed, found["history"]

    def _choices(self, count: int) -> dict[str, Any]:
        journal = self.context.journal
        for sweep in self.sweeps:
            sweep.keep()
        candidates = list(range(1, len(self.stack)))
        few = len(candidates) <= FEW  # then estimates would cost more than they spare
        tried = len(candidates) if few else VERIFIED
        estimates = dict.fromkeys(candidates, 0.0)
        if not few:
            weighed = journal.facts("estimates", lambda: list(self._estimates(candidates).items()))
            estimates = dict(weighed)
        history: list[dict[str, Any]] = []
        touched: list[int] = []
        trial = Drafts(self.context.model, keeps_tensors=False)
        try:
            for number in tqdm(range(count), desc="choosing blocks to merge", disable=None):
                attempt = partial(cheapest, candidates, estimates, self._losses_after_absorbing, touched, tried)
                best, losses = journal.facts(f"choice {number}", attempt)
                history.append({"absorbed": best, "losses": {str(index): loss for index, loss in losses.items()}})
                keeper = self._before(best)
                with trial.hold(self.stack.blocks[keeper]):
                    self._absorb(best, trial.undo)
                self.absorbed = sorted([*self.absorbed, best])
                candidates.remove(best)
                touched = [keeper, *(index for index in candidates if self._before(index) == keeper)]
                for sweep in self.sweeps:
                    sweep.go_on(keeper, self.absorbed)
        finally:
            trial.undo_all()
        return {"absorbed": self.absorbed, "history": history}

    def _estimates(self, candidates: Sequence[int]) -> dict[int, float]:
        return estimated_costs(self.scoring, candidates, self._errors)

    def loss_without(self, absorbed: Sequence[int]) -> float:
        """Mean loss of the model as it is now, without the blocks `absorbed`, on the batches to score."""
        self.scoring.go_on(0, absorbed)
        return self.scoring.loss()

    def _before(self, index: int) -> int:
        return max(i for i in range(index) if i not in self.absorbed)

    def _absorb(self, index: int, undo: Undo) -> None:
        """Have the block before `index`, which is in memory, absorb it by a local fit."""
        writers = Writers(self.context.model, self.stack, self._before(index))
        starts, targets = self.fitting.at(writers.index), self.fitting.at(index + 1)
        change = writers.local_change(self.fitting.runners, starts, targets, LOCAL_PENALTY, LOCAL_TOKENS)
        if change is not None:
            writers.apply(change, undo)

    def _after_absorbing(self, index: int) -> list[Tensor]:
        """The streams behind a block once the one before it has absorbed it, for each batch to score."""
        keeper = self._before(index)
        with resident(self.stack.blocks[keeper]), Undo() as trial:
            self._absorb(index, trial)
            return self.scoring.run(keeper)

    def _losses_after_absorbing(self, candidates: Sequence[int]) -> dict[int, float]:
        """Mean loss on the batches to score once the block before each candidate has absorbed it."""
        return {index: self.scoring.loss_after(index, self._after_absorbing(index)) for index in candidates}

    def _errors(self, index: int) -> list[Tensor]:
        """What is left behind a block of the difference that its absence makes, for each batch to score."""
        pairs = zip(self._after_absorbing(index), self.scoring.at(index + 1), strict=True)
        return [after - wanted for after, wanted in pairs]


def _of_tokens(batches: Sequence[Batch], tokens: int) -> list[Batch]:
    """The first of some batches that hold so many tokens; all, where there are fewer."""
    some: list[Batch] = []
    for batch in batches:
        some.append(batch)
        tokens -= batch.samples if batch.real is None else int(batch.real.sum())
        if tokens <= 0:
            break
    return some
