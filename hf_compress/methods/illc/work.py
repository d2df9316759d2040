"""What ILLC has to do."""

from __future__ import annotations

from hf_compress.anatomy.anatomy import Anatomy
from hf_compress.methods.base.amounts import share_of
from hf_compress.methods.base.context import CalibrationContext
from hf_compress.methods.base.work import (
    Work,
    experts_in,
    factor,
    gram,
    held_out_fit,
    hidden_of,
    inverse,
    share_of_tokens,
    solve,
)
from hf_compress.methods.illc.allocation import STEPS
from hf_compress.methods.illc.config import ILLCConfig


def work_of(config: ILLCConfig, context: CalibrationContext) -> Work:
    """Both streams past each block, and once more to observe it; per FFN the sums, the elimination, and a fit."""
    stack = context.stack(config.stack)
    data, hidden, products = share_of_tokens(context, config.tokens), hidden_of(stack), 0.0
    curves = config.allocation == "adaptive"
    for index, block in enumerate(stack.blocks):
        ffn = Anatomy(context.model).parts(stack, index).ffn
        if ffn is None or config.amount is None:
            continue
        wide, kept = ffn.width, config.width or share_of(ffn.width, config.kept)
        sums = gram(wide, data.tokens) + 2 * wide * hidden * data.tokens
        choice = inverse(wide) + (wide - kept) * wide**2 / 2
        fit = held_out_fit(kept, hidden)
        curve = STEPS * (factor(wide) + solve(wide, hidden)) / 3 if curves else 0.0
        products += (1 + curves) * sums + experts_in(block, ffn) * (choice + fit + curve)
    return Work((4 if curves else 3) * data.of_all, products, sweeps=1 + curves)
