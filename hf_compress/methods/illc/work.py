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
    hidden_of,
    inverse,
    share_of_tokens,
    solve,
)
from hf_compress.methods.illc.config import ILLCConfig

_FITS = 4  # factorisations of a fit: the penalties that are tried, and the last one on all tokens
_MIXTURES = 64  # right sides that a penalty is chosen by
_CURVE = 16  # fits, of all widths, that an error curve takes


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
        fit = _FITS * (factor(kept) + solve(kept, _MIXTURES)) + 2 * solve(kept, hidden)
        curve = _CURVE * (factor(wide) + solve(wide, hidden)) / 3 if curves else 0.0
        products += (1 + curves) * sums + experts_in(block, ffn) * (choice + fit + curve)
    return Work((4 if curves else 3) * data.of_all, products, sweeps=1 + curves)
