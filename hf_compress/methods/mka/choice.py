"""Which blocks are absorbed by those before them: again and again, the one whose absorption costs least.

A candidate is a block that the one before it absorbs by a local fit on a few calibration samples. What the error that
is left costs is estimated for all of them in one backward sweep; the few of the least cost are tried on the model, by
its loss on other samples, and so are those that the last choice has touched.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

from torch import Tensor

from hf_compress.anatomy.residency import resident
from hf_compress.anatomy.stacks import Stack
from hf_compress.anatomy.undo import Undo
from hf_compress.calibration.data import Batch
from hf_compress.calibration.losses import LossSweep
from hf_compress.calibration.processes import here, spread
from hf_compress.calibration.progress import bar
from hf_compress.calibration.sensitivity import estimated_costs
from hf_compress.methods.base.choice import VERIFIED, cheapest
from hf_compress.methods.base.context import CalibrationContext, Drafts
from hf_compress.methods.mka.writers import Rows, Writers

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
        self._best_change: Tensor | None = None  # of the candidates that were tried last
        self._ahead: dict[int, list[Tensor]] = {}

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
            for number in bar(range(count), "choosing blocks to merge"):
                attempt = partial(cheapest, candidates, estimates, self._losses_after_absorbing, touched, tried)
                known = journal.has(name := f"choice {number}")
                best, losses = journal.facts(name, attempt)
                if known:
                    ((self._best_change, _),) = self._after_absorbing([best])
                history.append({"absorbed": best, "losses": {str(index): loss for index, loss in losses.items()}})
                keeper = self._before(best)
                with trial.hold(self.stack.blocks[keeper]):
                    if self._best_change is not None:
                        self._writers(best).apply(self._best_change, trial.undo)
                self.absorbed = sorted([*self.absorbed, best])
                candidates.remove(best)
                touched = [keeper, *(index for index in candidates if self._before(index) == keeper)]
                for sweep in self.sweeps:
                    sweep.go_on(keeper, self.absorbed)
        finally:
            trial.undo_all()
            self._best_change = None
        return {"absorbed": self.absorbed, "history": history}

    def _estimates(self, candidates: Sequence[int]) -> dict[int, float]:
        return estimated_costs(self.scoring, candidates, self._errors)

    def loss_without(self, absorbed: Sequence[int]) -> float:
        """Mean loss of the model as it is now, without the blocks `absorbed`, on the batches to score."""
        self.scoring.go_on(0, absorbed)
        return self.scoring.loss()

    def _before(self, index: int) -> int:
        return max(i for i in range(index) if i not in self.absorbed)

    def _writers(self, index: int) -> Writers:
        """Of the block that absorbs block `index`."""
        return Writers(self.context.model, self.stack, self._before(index))

    def _changes(self, candidates: Sequence[int]) -> Iterator[Tensor | None]:
        """For each candidate, the local fit by which the block before it absorbs it; several processes fit at once."""
        rank, rows = here()[0], list[Rows | None]()
        sweep = self.fitting
        for place, index in enumerate(candidates):
            writers = self._writers(index)
            starts, targets = sweep.at(writers.index), sweep.at(index + 1)
            found = writers.local_rows(sweep.numbers, sweep.runners, starts, targets, place)
            rows += [found] if place == rank else []

        def change(index: int) -> Tensor | None:
            return self._writers(index).local_change(rows.pop(), LOCAL_PENALTY, LOCAL_TOKENS)

        return spread(candidates, change)

    def _after_absorbing(self, candidates: Sequence[int]) -> list[tuple[Tensor | None, list[Tensor]]]:
        """For each of as many candidates as there are processes, at most, the change, and the streams behind its block
        once the one before it has absorbed it, one a batch to score."""
        with ExitStack() as held:
            for index in candidates:
                held.enter_context(resident(self.stack.blocks[self._before(index)]))
            found = []
            for index, change in zip(candidates, self._changes(candidates), strict=True):
                with Undo() as trial:
                    if change is not None:
                        self._writers(index).apply(change, trial)
                    found.append((change, self.scoring.run(self._before(index))))
            return found

    def _losses_after_absorbing(self, candidates: Sequence[int]) -> dict[int, float]:
        """Mean loss on the batches to score once the block before each candidate has absorbed it."""
        losses: dict[int, float] = {}
        for turn in _turns(candidates):
            for index, (change, streams) in zip(turn, self._after_absorbing(turn), strict=True):
                loss = self.scoring.loss_after(index, streams)
                if not losses or loss < min(losses.values()):
                    self._best_change = change
                losses[index] = loss
        return losses

    def _errors(self, index: int) -> list[Tensor]:
        """What is left behind a block of the difference that its absence makes, for each batch to score.

        Asked for from the last block to the first.
        """
        if index not in self._ahead:
            turn = next(_turns(range(index, 0, -1)))
            self._ahead = {one: streams for one, (_, streams) in zip(turn, self._after_absorbing(turn), strict=True)}
        pairs = zip(self._ahead.pop(index), self.scoring.at(index + 1), strict=True)
        return [after - wanted for after, wanted in pairs]


def _turns(candidates: Sequence[int]) -> Iterator[Sequence[int]]:
    """As many at once as there are processes."""
    world = here()[1]
    return (candidates[start : start + world] for start in range(0, len(candidates), world))


def _of_tokens(batches: Sequence[Batch], tokens: int) -> list[Batch]:
    """The first of some batches that hold so many tokens; all, where there are fewer."""
    some: list[Batch] = []
    for batch in batches:
        some.append(batch)
        tokens -= batch.samples if batch.real is None else int(batch.real.sum())
        if tokens <= 0:
            break
    return some
