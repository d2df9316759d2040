"""Leaving blocks out, by several published criteria: the controls that every other method is held against."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch

from hf_compress.anatomy.stacks import Stack
from hf_compress.calibration.losses import losses_without
from hf_compress.calibration.progress import bar
from hf_compress.calibration.sensitivity import COST_TOKENS, costs_without
from hf_compress.calibration.statistics import block_statistics
from hf_compress.checks import setting
from hf_compress.methods.base.amounts import AMOUNT
from hf_compress.methods.base.choice import cheapest
from hf_compress.methods.base.context import CalibrationContext
from hf_compress.methods.base.registry import Method, register
from hf_compress.methods.base.settings import CompressionConfig
from hf_compress.methods.base.work import BACKWARD, Work, share_of_tokens
from hf_compress.plan.edits import RemoveBlocks
from hf_compress.plan.plan import Plan

_TRIED = 4  # candidates of which the loss is measured for every block that goes, and the last one's neighbours


@dataclass(frozen=True)
class DropBlocksConfig(CompressionConfig, method="drop_blocks"):
    """Leave blocks out and change nothing else.

    Criteria: "last", the last blocks; "block_influence", those that turn the residual stream least (ShortGPT,
    arXiv 2403.03853); "angular", the run of blocks whose input and output point most alike (arXiv 2403.17887);
    "perplexity", greedily the block whose absence costs least on the calibration data (SLEB, arXiv 2402.09025);
    "random", by `seed`.
    """

    ratio: float | None = setting(None, "share of the blocks to leave out", "(0, 1)", group=AMOUNT)
    num_blocks: int | None = setting(None, "number of blocks to leave out, instead of ratio", "[1, inf)", group=AMOUNT)
    criterion: Literal["block_influence", "angular", "perplexity", "last", "random"] = setting(
        "block_influence", "which blocks go"
    )
    seed: int = setting(0, "for criterion=random", "[0, inf)")
    stack: str | None = setting(None, "path of the residual stack; found when not given")

    def __post_init__(self) -> None:
        if self.amount is None:
            raise ValueError("say how much to leave out: ratio=, a share of the blocks, or num_blocks=")


def plan_removals(config: DropBlocksConfig, context: CalibrationContext) -> Plan:
    """Blocks to leave out."""
    stack = context.stack(config.stack)
    count = _count(config, stack)
    with context.step(f"choose by {config.criterion}"):
        removed, notes = context.journal.facts("choice", lambda: _choose(config, context, stack, count))
    return Plan((RemoveBlocks(stack.path, tuple(removed)),), notes={"criterion": config.criterion, **notes})


def single_removals(config: DropBlocksConfig, context: CalibrationContext) -> list[CompressionConfig]:
    """The settings for one block, as often as there are blocks to leave out."""
    return [replace(config, ratio=None, num_blocks=1)] * _count(config, context.stack(config.stack))


def work_of(config: DropBlocksConfig, context: CalibrationContext) -> Work:
    """A pass to look at the blocks; by loss, gradients once and the few candidates of every choice."""
    stack = context.stack(config.stack)
    if config.criterion in ("last", "random"):
        return Work(rewrites=False)
    if config.criterion != "perplexity":
        return Work(1, sweeps=1, rewrites=False)
    count, weighed = _count(config, stack), share_of_tokens(context, COST_TOKENS).of_all
    passes = count * (1 + _TRIED / 2) + weighed * (1 + BACKWARD)
    return Work(passes, sweeps=2 + count, streams=weighed, rewrites=False)


register(DropBlocksConfig, Method(plan_removals, steps=single_removals, work=work_of, dense=False))


def _count(config: DropBlocksConfig, stack: Stack) -> int:
    assert config.amount is not None, "these settings say how much"
    return config.amount.of_blocks(len(stack))


def _choose(config: DropBlocksConfig, context: CalibrationContext, stack: Stack, count: int) -> tuple[list[int], dict]:
    """The blocks to leave out, and the scores that chose them."""
    total = len(stack)
    if config.criterion == "last":
        return list(range(total - count, total)), {}
    if config.criterion == "random":
        generator = torch.Generator().manual_seed(config.seed)
        return sorted(torch.randperm(total, generator=generator)[:count].tolist()), {"seed": config.seed}
    if config.criterion == "perplexity":
        return _greedy(context, stack, count)
    if config.criterion == "angular":
        angles = block_statistics(context.model, stack, context.calibration, span=count).change.tolist()
        start = min(range(len(angles)), key=angles.__getitem__)
        return list(range(start, start + count)), {"angular_distance": angles}
    influence = block_statistics(context.model, stack, context.calibration).influence.tolist()
    return sorted(sorted(range(total), key=influence.__getitem__)[:count]), {"block_influence": influence}


def _greedy(context: CalibrationContext, stack: Stack, count: int) -> tuple[list[int], dict]:
    """One block after another, each time the one whose absence costs least.

    What each would cost is estimated in one backward sweep. The few that cost least are tried, and so are the
    neighbours of the block that went last.
    """
    model, data = context.model, context.calibration
    left = list(range(len(stack)))
    estimates = costs_without(model, stack, data)
    removed: list[int] = []
    touched: list[int] = []
    history = []
    for _ in bar(range(count), "choosing blocks to leave out"):
        best, losses = cheapest(
            left, estimates, lambda some: losses_without(model, stack, data, some, skipped=removed), touched, _TRIED
        )
        place = left.index(best)
        left.remove(best)
        touched = left[max(0, place - 1) : place + 1]
        removed.append(best)
        history.append({"removed": best, "loss": losses[best]})
    return sorted(removed), {"greedy": history}
