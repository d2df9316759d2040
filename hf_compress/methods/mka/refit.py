"""The default: one block takes over the work of two, by solving for its output projections; then the rest is corrected.

Averaging two blocks' parameters is worse than leaving one out, since the two do not do the same thing; they add to the
same stream. What one block can take over of the next is what is linear in its own attention and hidden units, and that
has a closed form (`Writers.fit`).

First *choose* (see `choice`). Then *correct*, from the original weights: pair up the stack,
with the original model beside, and solve each block for the original stream at the next block's input. So a block that
absorbed others learns what they gave, and the ones above undo what errors still reach them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from hf_compress.anatomy.residency import resident
from hf_compress.anatomy.stacks import Stack
from hf_compress.calibration.capture import inference
from hf_compress.calibration.progress import bar
from hf_compress.calibration.sweep import StreamPair, Streams, start_pairs
from hf_compress.errors import CalibrationError
from hf_compress.methods.base.context import CalibrationContext, Drafts
from hf_compress.methods.mka.choice import Chooser
from hf_compress.methods.mka.config import MKAConfig
from hf_compress.methods.mka.writers import Writers
from hf_compress.numerics.aside import give_back
from hf_compress.plan.edits import Edit, MergeBlocks
from hf_compress.plan.plan import Plan

# A block that cannot take away even a hundredth of the error left is the last to be solved until one absorbs another.
_SETTLED = 0.99


def plan_by_refitting(config: MKAConfig, context: CalibrationContext) -> Plan:
    """Choose the blocks to absorb, then solve for the projections of those that stay.

    Raises:
        ValueError: no block would be left; fewer than eight calibration samples.
    """
    stack = context.stack(config.stack)
    assert config.amount is not None, "these settings say how much"
    count = config.amount.of_blocks(len(stack))
    if context.calibration.samples < 8:
        raise CalibrationError(
            f"{context.calibration.samples} calibration samples are too few to solve for projections: "
            "at least 8 are needed, some hundreds are better"
        )
    with inference(context.model):
        with context.step("choose which blocks to merge"):
            chooser = Chooser(context, stack, context.calibration.some(config.choice_samples, least=3))
            absorbed, merges = chooser.choose(count)
            plain = chooser.loss_without(absorbed)
        with context.drafts() as drafts:
            with context.step("solve for the projections"):
                fits = _correct(context, stack, absorbed, config.refit_tokens, drafts, chooser.fitting)
                refitted = chooser.loss_without(absorbed)
            if not refitted < plain:  # what does not help on the choice's own samples is not kept
                drafts.take_back()
    notes = {"merges": merges, "fits": fits, "loss": {"blocks left out": plain, "refitted": refitted}}
    return Plan(tuple(_edits(stack, absorbed)), drafts.plan.tensors, notes)


def _edits(stack: Stack, absorbed: Sequence[int]) -> list[Edit]:
    """One merge for every block that absorbs some."""
    kept = [index for index in range(len(stack)) if index not in absorbed]
    groups = {k: tuple(range(k + 1, n)) for k, n in zip(kept, [*kept[1:], len(stack)], strict=True)}
    return [MergeBlocks(stack.path, index, group) for index, group in groups.items() if group]


def _correct(
    context: CalibrationContext, stack: Stack, absorbed: Sequence[int], tokens: int, drafts: Drafts, known: Streams
) -> list[dict[str, Any]]:
    """Solve every block that stays, from the first that absorbs another on, for the original stream after it.

    The streams of as many batches as hold `tokens` tokens are kept, two a batch and no more.

    Args:
        known: streams of the model as it was, of some of the batches, maybe.

    Returns:
        Each block's held-out error and penalty.
    """
    pairs = start_pairs(context.model, stack, context.calibration, tokens)
    originals = [_known_of(pair, known) for pair in pairs]
    kept = [index for index in range(len(stack)) if index not in absorbed]
    fits: list[dict[str, Any]] = []
    settled = True  # whether what follows need not be corrected: at first, because both models are one
    for index, end in bar(list(zip(kept, [*kept[1:], len(stack)], strict=True)), "solving"):
        if settled and index > max(absorbed):
            break
        give_back()  # what was freed lies between what is still in use, and here memory is at its highest
        with drafts.hold(stack.blocks[index]):
            for passed in range(index, end):
                with resident(stack.blocks[passed]):
                    for pair, streams in zip(pairs, originals, strict=True):
                        _take_original(pair, passed, streams)
            if not settled or end > index + 1:
                fit = _fit(context, stack, index, pairs, drafts)
                fits.append({"block": index, "absorbed": list(range(index + 1, end))} | fit)
                settled = fit["error"] > _SETTLED
            for pair in pairs:
                if not fits:
                    pair.compressed = pair.original
                elif end < len(stack):
                    pair.take_compressed(index)
    return fits


def _known_of(pair: StreamPair, known: Streams) -> dict[int, Tensor]:
    """The streams of a pair's batch that are known: then it goes on with what ran the blocks on it."""
    found = known.of(pair.runner.batch)
    if found is None:
        return {}
    pair.runner.stop()
    pair.runner, streams = found
    return streams


def _take_original(pair: StreamPair, index: int, known: dict[int, Tensor]) -> None:
    """Take the original stream past a block, unless it is known what it is there."""
    if index + 1 in known:
        pair.original = known[index + 1]
    else:
        pair.take_original(index)


def _fit(
    context: CalibrationContext, stack: Stack, index: int, pairs: list[StreamPair], drafts: Drafts
) -> dict[str, Any]:
    """Solve for one block's projections and write them; how far from the target they end, and the penalty."""
    writers = Writers(context.model, stack, index)

    def solved() -> Plan:
        streams, targets = [w.compressed for w in pairs], [w.original for w in pairs]
        fit = writers.fit([w.runner for w in pairs], streams, targets, numbers=[w.number for w in pairs])
        if fit is None:
            return Plan(notes={"error": 1.0, "penalty": None})
        return Plan((), {"change": fit.weight}, {"error": fit.error, "penalty": fit.penalty})

    found = drafts.journal.plan(f"solve block {index}", solved)
    if found.tensors:
        writers.apply(found.tensors["change"], drafts.undo)
        drafts.rewrite(f"{stack.path}.{index}.{name}" for name, _ in stack.blocks[index].named_parameters())
    return found.notes
