"""Which blocks are absorbed by those before them: again and again, the one whose absorption costs least.

A candidate is a block that the one before it absorbs by a local fit on a few calibration samples. What the error that
is left costs is estimated for all of them in one backward sweep; the few of the least cost are tried on the model, by
its loss on other samples, and so are those that the last choice has touched.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from tqdm import tqdm

from hf_compress.anatomy.stacks import Stack
from hf_compress.anatomy.undo import Undo
from hf_compress.calibration.data import Batch
from hf_compress.calibration.losses import LossRunner, mean_of
from hf_compress.calibration.sensitivity import estimated_costs
from hf_compress.methods.base.choice import cheapest
from hf_compress.methods.base.context import CalibrationContext
from hf_compress.methods.mka.writers import Writers

# Penalty of the local fits, which are many and on little data: of so many tokens.
LOCAL_PENALTY = 0.1
LOCAL_TOKENS = 2048


class Chooser:
    """Compares candidates on a few batches: of three, one to score, and of the others as many as the fits need.

    Args:
        batches: at least one.
    """

    def __init__(self, context: CalibrationContext, stack: Stack, batches: Sequence[Batch]) -> None:
        self.context, self.stack = context, stack
        runners = [LossRunner(context.model, stack, batch) for batch in batches]
        self.fitting = _of_tokens([r for i, r in enumerate(runners) if i % 3 != 2 or len(runners) < 3], LOCAL_TOKENS)
        self.scoring = [r for i, r in enumerate(runners) if i % 3 == 2] or self.fitting
        self.runners = list(dict.fromkeys([*self.fitting, *self.scoring]))
        self.absorbed: list[int] = []

    def choose(self, count: int) -> tuple[list[int], list[dict[str, Any]]]:
        """The blocks to absorb, in rising order, and for every choice the losses of the candidates tried.

        The first block has none before it to absorb it, and is never a candidate.
        """
        for runner in self.runners:
            runner.keep()
        candidates = list(range(1, len(self.stack)))
        estimates = estimated_costs(self.scoring, candidates, self._errors)
        history: list[dict[str, Any]] = []
        touched: list[int] = []
        with self.context.trial() as undo:
            for _ in tqdm(range(count), desc="choosing blocks to merge", disable=None):
                best, losses = cheapest(candidates, estimates, self._losses_after_absorbing, touched)
                history.append({"absorbed": best, "losses": {str(index): loss for index, loss in losses.items()}})
                keeper = self._before(best)
                self._absorb(best, undo)
                self.absorbed = sorted([*self.absorbed, best])
                candidates.remove(best)
                touched = [keeper, *(index for index in candidates if self._before(index) == keeper)]
                for runner in self.runners:
                    runner.go_on(keeper, self.absorbed)
        return self.absorbed, history

    def loss_without(self, absorbed: Sequence[int]) -> float:
        """Mean loss of the model as it is now, without the blocks `absorbed`, on the samples of the choice."""
        return mean_of([runner.keep(absorbed) for runner in self.runners])

    def _before(self, index: int) -> int:
        return max(i for i in range(index) if i not in self.absorbed)

    def _change(self, index: int) -> tuple[Writers, Tensor | None]:
        """The projections of the block before `index`, and how they change to absorb it."""
        writers = Writers(self.context.model, self.stack, self._before(index))
        starts = [runner.streams[writers.index] for runner in self.fitting]
        targets = [runner.streams[index + 1] for runner in self.fitting]
        return writers, writers.local_change(self.fitting, starts, targets, LOCAL_PENALTY, LOCAL_TOKENS)

    def _absorb(self, index: int, undo: Undo) -> int:
        """Have the block before `index` absorb it; its number."""
        writers, change = self._change(index)
        if change is not None:
            writers.apply(change, undo)
        return writers.index

    def _losses_after_absorbing(self, candidates: Sequence[int]) -> dict[int, float]:
        """Mean loss on the batches to score once the block before each candidate has absorbed it."""
        losses = {}
        for index in candidates:
            with Undo() as trial:
                keeper = self._absorb(index, trial)
                scores = [r.loss_after(index, r.run(keeper, r.streams[keeper])) for r in self.scoring]
                losses[index] = mean_of(scores)
        return losses

    def _errors(self, index: int) -> list[Tensor]:
        """What is left behind a block of the difference that its absence makes, for each batch to score."""
        with Undo() as trial:
            keeper = self._absorb(index, trial)
            return [runner.run(keeper, runner.streams[keeper]) - runner.streams[index + 1] for runner in self.scoring]


def _of_tokens(runners: Sequence[LossRunner], tokens: int) -> list[LossRunner]:
    """The first of some batches that hold so many tokens; all, where there are fewer."""
    some: list[LossRunner] = []
    for runner in runners:
        some.append(runner)
        tokens -= runner.batch.samples if runner.batch.real is None else int(runner.batch.real.sum())
        if tokens <= 0:
            break
    return some
