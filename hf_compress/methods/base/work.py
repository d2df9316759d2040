"""How much a method has to do, counted before it does it: what an estimate of its time is made of.

What is counted are passes of the calibration tokens through the blocks, and the multiplications of the solvers. It is a
count of what takes long, and no more exact than that.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from hf_compress.anatomy.parts import FFN, is_linear, linear_widths
from hf_compress.anatomy.stacks import Stack
from hf_compress.methods.base.context import CalibrationContext
from hf_compress.methods.base.ridge import MIXTURES

BACKWARD = 2  # plain passes that one for gradients takes besides
_FACTORS = 5  # of a fit: the penalties that are tried, the best once more, and then on all tokens


@dataclass(frozen=True)
class Work:
    """
    Attributes:
        passes: of all calibration tokens through all blocks; 1 is a plain forward pass over the data.
        products: multiplications of the solvers, in float32.
        sweeps: how often all blocks are gone through, and read where they are offloaded.
        streams: of all calibration tokens, kept at every block at a time; 1 is of all of them.
        rewrites: whether blocks get new weights, which a workdir keeps.
    """

    passes: float = 0.0
    products: float = 0.0
    sweeps: float = 0.0
    streams: float = 0.0
    rewrites: bool = True

    def __add__(self, other: Work) -> Work:
        return Work(
            self.passes + other.passes,
            self.products + other.products,
            self.sweeps + other.sweeps,
            max(self.streams, other.streams),
            self.rewrites or other.rewrites,
        )


@dataclass(frozen=True)
class Share:
    """Some of the calibration data.

    Attributes:
        tokens: how many tokens (or samples) it has.
        of_all: as a share of all.
    """

    tokens: int
    of_all: float


def share_of_tokens(context: CalibrationContext, tokens: int) -> Share:
    """What a method takes that asks for about so many tokens."""
    data = context.calibration
    total = data.tokens or data.samples
    taken = min(total, tokens)
    return Share(taken, taken / max(1, total))


def share_of_samples(context: CalibrationContext, samples: int) -> Share:
    """What a method takes that asks for about so many samples."""
    data = context.calibration
    share = min(1.0, samples / max(1, data.samples))
    return Share(round(share * (data.tokens or data.samples)), share)


def linear_sizes(stack: Stack, indices: Iterable[int] | None = None) -> list[tuple[int, int]]:
    """Inputs and outputs of the linear maps in blocks of a stack; in all of them when None."""
    blocks = stack.blocks if indices is None else [stack.blocks[index] for index in indices]
    return [linear_widths(part) for block in blocks for part in block.modules() if is_linear(part)]


def hidden_of(stack: Stack) -> int:
    """The width of the residual stream, as the last linear map of the first block has it."""
    return linear_sizes(stack, [0])[-1][1]


def experts_in(block: nn.Module, ffn: FFN) -> int:
    """How many experts a block has; 1 where its FFN is a plain one."""
    if ffn.experts is None:
        return 1
    return max((len(p) for p in block.get_submodule(ffn.experts).parameters() if p.ndim == 3), default=1)


def gram(width: int, tokens: int) -> float:
    """Σ x xᵀ, one half of it."""
    return width**2 * tokens / 2


def factor(width: int) -> float:
    """A Cholesky factor."""
    return width**3 / 6


def inverse(width: int) -> float:
    """An inverse, its factor included."""
    return width**3 / 2


def solve(width: int, outputs: int) -> float:
    """A system that is factored, for so many right sides."""
    return float(width**2 * outputs)


def held_out_fit(width: int, outputs: int) -> float:
    """A ridge regression whose penalty is chosen on tokens held out, sums not included; see `HeldOutSums.fit`."""
    return _FACTORS * (factor(width) + solve(width, MIXTURES)) + 2 * solve(width, outputs)
