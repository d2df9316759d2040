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
from hf_compress.calibration.sweep import Streams
from hf_compress.calibration.together import Together
from hf_compress.methods.base.choice import VERIFIED, cheapest
from hf_compress.methods.base.context import CalibrationContext, Drafts
from hf_compress.methods.mka.writers import Rows, Writers
from hf_compress.numerics.team import ALONE, Team

# Penalty of the local fits, which are many and on little data: of so many tokens.
LOCAL_PENALTY = 0.1
LOCAL_TOKENS = 4096
FEW = 6  # candidates that are all tried


class Chooser:
    """Compares candidates on a few batches: of three, one to score, and of the others as many as the fits need.

    What a block is to give when it absorbs others is always the stream of the model as it was. So a fit stays what it
    is until a choice touches one of its blocks.

    Args:
        batches: at least one.
    """

    def __init__(self, context: CalibrationContext, stack: Stack, batches: Sequence[Batch]) -> None:
        self.context, self.stack = context, stack
        fitting = [batch for i, batch in enumerate(batches) if i % 3 != 2 or len(batches) < 3]
        scoring = [batch for i, batch in enumerate(batches) if i % 3 == 2]
        fitting = _of_tokens(fitting, LOCAL_TOKENS)
        self.fitting = Streams(context.model, stack, fitting)
        self.scoring = LossSweep(context.model, stack, scoring or fitting)
        self.absorbed: list[int] = []
        self._changes: dict[int, Tensor | None] = {}  # by which the block before a candidate absorbs it, of those tried
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
        self.fitting.keep()
        self.scoring.keep()
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
                best, losses = journal.facts(f"choice {number}", attempt)
                history.append({"absorbed": best, "losses": {str(index): loss for index, loss in losses.items()}})
                keeper = self._before(best)
                with trial.hold(self.stack.blocks[keeper]):
                    self._absorb(best, trial.undo)
                self.absorbed = sorted([*self.absorbed, best])
                candidates.remove(best)
                touched = [keeper, *(index for index in candidates if self._before(index) == keeper)]
                for index in (best, *touched):
                    self._changes.pop(index, None)
                if number + 1 < count:
                    self.scoring.go_on(keeper, self.absorbed)
        finally:
            trial.undo_all()
            self._changes.clear()
        return {"absorbed": self.absorbed, "history": history}

    def _estimates(self, candidates: Sequence[int]) -> dict[int, float]:
        return estimated_costs(self.scoring, candidates, self._errors)

    def loss_without(self, absorbed: Sequence[int]) -> float:
        """Mean loss of the model as it is now, without the blocks `absorbed`, on the batches to score.

        Blocks before the first that absorbs another are the model's own.
        """
        self.scoring.go_on(min(absorbed) - 1, absorbed)
        return self.scoring.loss()

    def _before(self, index: int) -> int:
        """The block that is to absorb a candidate."""
        return max(i for i in range(index) if i not in self.absorbed)

    def _behind(self, index: int) -> int:
        """The block that follows a candidate, or the end of the stack."""
        return min(i for i in range(index + 1, len(self.stack) + 1) if i not in self.absorbed)

    def _absorb(self, index: int, undo: Undo) -> None:
        """Have the block before a candidate absorb it."""
        (change,) = self._changes_for([index])
        if change is not None:
            self._writers(index).apply(change, undo)

    def _writers(self, index: int) -> Writers:
        """Of the block that absorbs block `index`."""
        return Writers(self.context.model, self.stack, self._before(index))

    def _changes_for(self, candidates: Sequence[int]) -> list[Tensor | None]:
        """For each candidate, the change by which the block before it absorbs it: solved for where it is not known."""
        new = [index for index in candidates if index not in self._changes]
        for index, change in zip(new, self._solved(new), strict=True):
            self._changes[index] = None if change is None else self.scoring.memory.keep(0, change.cpu())
        return [self._changes[index] for index in candidates]

    def _solved(self, candidates: Sequence[int]) -> Iterator[Tensor | None]:
        """The local fit for each candidate, of no more than there are processes: each solves one; of few, all each."""
        rank, world = here()
        assert len(candidates) <= world, "a process solves one"
        if 2 * len(candidates) <= world:
            return (self._solved_by(index, self._rows_for(index, None), Together()) for index in candidates)
        rows = [self._rows_for(index, place) for place, index in enumerate(candidates)]
        return spread(candidates, lambda index: self._solved_by(index, rows.pop(rank), ALONE))

    def _rows_for(self, index: int, rank: int | None) -> Rows | None:
        """What one process, or each, has to know for the local fit of a candidate."""
        sweep, writers = self.fitting, self._writers(index)
        starts, targets = sweep.at(writers.index), sweep.at(self._behind(index))
        return writers.local_rows(sweep.numbers, sweep.runners, starts, targets, rank)

    def _solved_by(self, index: int, rows: Rows | None, together: Team) -> Tensor | None:
        return self._writers(index).local_change(rows, LOCAL_PENALTY, LOCAL_TOKENS, together)

    def _after_absorbing(self, candidates: Sequence[int]) -> list[list[Tensor]]:
        """For each of as many candidates as there are processes, at most, the streams behind its block once the one
        before it has absorbed it, one a batch to score."""
        with ExitStack() as held:
            for index in candidates:
                held.enter_context(resident(self.stack.blocks[self._before(index)]))
            self._changes_for(candidates)
            found = []
            for index in candidates:
                with Undo() as trial:
                    self._absorb(index, trial)
                    found.append(self.scoring.run(self._before(index)))
            return found

    def _losses_after_absorbing(self, candidates: Sequence[int]) -> dict[int, float]:
        """Mean loss on the batches to score once the block before each candidate has absorbed it."""
        losses: dict[int, float] = {}
        self._changes = {index: change for index, change in self._changes.items() if index in candidates}
        for turn in _turns(candidates):
            for index, streams in zip(turn, self._after_absorbing(turn), strict=True):
                losses[index] = self.scoring.loss_after(index, streams)
        return losses

    def _errors(self, index: int) -> list[Tensor]:
        """What is left behind a block of the difference that its absence makes, for each batch to score.

        Asked for from the last block to the first.
        """
        if index not in self._ahead:
            turn = next(_turns(range(index, 0, -1)))
            self._ahead = dict(zip(turn, self._after_absorbing(turn), strict=True))
            self._changes.clear()  # of all blocks, they would be as much as the model
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
