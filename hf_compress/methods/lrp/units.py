"""Hidden units, heads and blocks left out by their relevance; the projections after them are solved for anew."""

from __future__ import annotations

from contextlib import closing

import torch
from torch import Tensor, nn

from hf_compress.anatomy.anatomy import Anatomy, Block
from hf_compress.anatomy.stacks import Stack
from hf_compress.calibration.sweep import start_pairs
from hf_compress.errors import UnsupportedModelError
from hf_compress.methods.base.amounts import share_of
from hf_compress.methods.base.context import CalibrationContext, Drafts
from hf_compress.methods.base.narrowing import Compensation, Narrowing
from hf_compress.methods.base.units import BlockUnits, Reduction, UnitStatistics, best
from hf_compress.methods.lrp.config import LRPConfig
from hf_compress.methods.lrp.linears import Subject
from hf_compress.methods.lrp.scores import scored
from hf_compress.plan.edits import RemoveBlocks
from hf_compress.plan.plan import Plan
from hf_compress.rewrite.builders import heads_of
from hf_compress.rewrite.record import missing

_Writer = tuple[int, str, nn.Module]  # of a block by its number, the path and the projection that reads its units


def plan_units(config: LRPConfig, context: CalibrationContext, stack: Stack, drafts: Drafts) -> Plan:
    """Leave hidden units, heads or blocks out; of units and heads the model is left without, of blocks not.

    Returns:
        What is not done yet, and notes.

    Raises:
        UnsupportedModelError: the blocks have none, or experts.
        ValueError: nothing would be left of a block.
    """
    writers = _writers(config, context, stack)
    with context.step("score units"):
        scores = context.journal.tensors("scores", lambda: _scores(config, context, stack, writers))
    if config.granularity == "block":
        return _without_blocks(config, stack, writers, scores)
    counts = _counts(config, context, stack, writers, scores)

    def choose(units: BlockUnits, statistics: UnitStatistics, count: int) -> Reduction:
        name = next(path for index, path, module in writers if index == units.index)
        return best(units, scores[name], count)

    heads, widths = (counts, {}) if config.granularity == "head" else ({}, counts)
    with context.step("narrow blocks"):
        pairs = start_pairs(context.model, stack, context.calibration, config.tokens)
        compensation = Compensation("ridge" if config.solves else "none")
        narrowing = Narrowing(context.model, stack, pairs, choose, compensation)
        return Plan(notes={"blocks": narrowing.run(heads, widths, drafts)})


def _scores(config: LRPConfig, context: CalibrationContext, stack: Stack, writers: list[_Writer]) -> dict[str, Tensor]:
    """Of the units that each projection reads, by its path."""
    ends = {name: module for _, name, module in writers}
    found: dict[str, Tensor] = {}
    with closing(scored(Subject(config, context, stack), config.score_name, ends)) as parts:
        for part in parts:
            found |= part.units
    return found


def _writers(config: LRPConfig, context: CalibrationContext, stack: Stack) -> list[_Writer]:
    """The output projections that read the units."""
    found = []
    for index in range(len(stack)):
        parts = Anatomy(context.model).parts(stack, index)
        if parts.ffn is not None and parts.ffn.experts is not None and config.granularity != "head":
            raise UnsupportedModelError(
                f"block {index} of {stack.path} has experts, whose units relevance does not reach one by one: take "
                "ILLCConfig, or granularity='head'"
            )
        ffn = parts.ffn.output if parts.ffn else None
        read_by = {"neuron": (ffn,), "head": (parts.attention_output,), "block": (ffn, parts.attention_output)}
        own = read_by[config.granularity]
        names = [f"{stack.path}.{index}.{path}" for path in own if path]
        found += [(index, name, context.model.get_submodule(name)) for name in names]
    if not found:
        what = "parts that write to the stream" if config.granularity == "block" else f"{config.granularity}s"
        what = f"the blocks of {stack.path} have no {what} that could be left out"
        raise missing(what, context.model, stack.path, ffn=config.granularity == "neuron")
    return found


def _counts(
    config: LRPConfig,
    context: CalibrationContext,
    stack: Stack,
    writers: list[_Writer],
    scores: dict[str, Tensor],
) -> dict[int, int]:
    """How many units (or key and value heads) each block keeps."""
    share = 1 - config.removed
    counts = {}
    everything = torch.cat([scores[name] for _, name, _ in writers])
    least = everything.sort(descending=True).values[share_of(len(everything), share) - 1]
    for index, name, _ in writers:
        if config.granularity == "head":
            counts[index] = share_of(heads_of(Block(context.model, stack, index)).groups, share)
        elif config.variant == "paper":
            counts[index] = int((scores[name] > 0).sum())
        elif config.scope == "model":
            counts[index] = int((scores[name] >= least).sum())
        else:
            counts[index] = share_of(len(scores[name]), share)
        if counts[index] == 0:
            raise ValueError(f"no unit of block {index} of {stack.path} would be left: lower sparsity, or change scope")
    return counts


def _without_blocks(config: LRPConfig, stack: Stack, writers: list[_Writer], scores: dict[str, Tensor]) -> Plan:
    """Blocks whose parts write least relevance to the residual stream."""
    totals = torch.zeros(len(stack), dtype=torch.float32)
    for index, name, _ in writers:
        totals[index] += float(scores[name].sum())
    assert config.amount is not None, "these settings say how much"
    count = config.amount.of_blocks(len(stack))
    removed = sorted(totals.argsort()[:count].tolist())
    return Plan((RemoveBlocks(stack.path, tuple(removed)),), notes={"relevance": totals.tolist()})
