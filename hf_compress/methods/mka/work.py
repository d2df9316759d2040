"""What MKA has to do."""

from __future__ import annotations

from hf_compress.anatomy.anatomy import Anatomy
from hf_compress.anatomy.parts import linear_widths
from hf_compress.methods.base.choice import VERIFIED
from hf_compress.methods.base.context import CalibrationContext
from hf_compress.methods.base.work import (
    BACKWARD,
    Work,
    factor,
    gram,
    held_out_fit,
    hidden_of,
    share_of_samples,
    share_of_tokens,
    solve,
)
from hf_compress.methods.mka.choice import FEW, LOCAL_TOKENS
from hf_compress.methods.mka.config import MKAConfig


def work_of(config: MKAConfig, context: CalibrationContext) -> Work:
    """Of the paper a pass for each merge; else the choice, and streams past every block with a fit for each."""
    stack = context.stack(config.stack)
    blocks = len(stack)
    merges = config.amount.of_blocks(blocks) if config.amount is not None else blocks - 1
    if config.variant == "paper":
        again = merges - 1 if config.iterative else 0
        return Work(passes=1 + again / 2, sweeps=1 + again)  # from the block on that has changed, which may be any
    hidden = hidden_of(stack)
    parts = Anatomy(context.model).parts(stack, 0)
    inputs = sum(linear_widths(stack.blocks[0].get_submodule(path))[0] for path in parts.writers)
    few = blocks - 1 <= FEW
    tried = sum(range(blocks - merges, blocks)) if few else merges * (VERIFIED + 2)
    fits = (
        blocks - 1 + 2 * (merges - 1) + (0 if few else VERIFIED)
    )  # of all candidates, then of those that a choice touches
    choice = share_of_samples(context, config.choice_samples)
    local = min(LOCAL_TOKENS, 2 * choice.tokens // 3)
    passes = choice.of_all * (1 + (merges + tried) / 6 + 1 / 3 + fits / blocks / 2 + (0 if few else BACKWARD / 3))
    one = solve(local, inputs) / 2 + factor(local) + solve(local, hidden)
    data = share_of_tokens(context, config.refit_tokens)
    kept = blocks - merges
    size = min(inputs, data.tokens)  # of the systems: the tokens' where those are fewer
    fit = gram(size, max(inputs, data.tokens)) + inputs * hidden * data.tokens
    fit += held_out_fit(size, hidden)
    streams = choice.of_all * (local / max(1, choice.tokens) + 1 / 3)
    return Work(passes + 3 * data.of_all, fits * one + kept * fit, sweeps=3 + 2 * merges, streams=streams)
