"""The default: FFNs collapsed one after another in closed form, without training."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

from hf_compress.anatomy.anatomy import Anatomy, Block
from hf_compress.anatomy.parts import FFN, linear_widths
from hf_compress.anatomy.stacks import Stack
from hf_compress.anatomy.undo import Undo
from hf_compress.calibration.capture import inference
from hf_compress.calibration.losses import LossSweep
from hf_compress.calibration.progress import bar
from hf_compress.errors import UnsupportedModelError
from hf_compress.methods.base.choice import cheapest
from hf_compress.methods.base.context import CalibrationContext
from hf_compress.methods.layer_collapse.config import LayerCollapseConfig
from hf_compress.methods.layer_collapse.linear import LinearFit, fit_ffns
from hf_compress.plan.plan import Plan
from hf_compress.rewrite.apply import carry_out
from hf_compress.rewrite.record import missing

_NO_FFN = "has no FFN with an activation"


def plan_closed_form(config: LayerCollapseConfig, context: CalibrationContext) -> Plan:
    """Fit, choose, collapse, and again, until enough are collapsed.

    Raises:
        UnsupportedModelError: no FFN of the stack can be one linear map, or none would become smaller.
        ValueError: more FFNs asked for than there are.
        CalibrationError: too little data, or activations that are not finite.
    """
    stack = context.stack(config.stack)
    left = collapsible(context, stack, config.rank)
    count = len(left) if config.target_r2 is not None else count_of(config, len(left))
    steps: list[dict[str, Any]] = []
    with inference(context.model), context.drafts() as drafts:
        some = context.calibration.some(config.choice_samples) if config.criterion == "loss" else []
        tried = LossSweep(context.model, stack, some)
        for number in bar(range(count), "collapsing FFNs"):
            draft = context.journal.plan(f"collapse {number}", partial(_next, config, context, stack, left, tried))
            if not draft.edits:
                break
            drafts.add(replace(draft, notes={}))
            left = [index for index in left if index != draft.notes["block"]]
            steps.append(draft.notes)
    if not steps:
        raise ValueError(f"no FFN has R² of at least {config.target_r2}: {_r2(draft.notes['r2'])}; lower target_r2")
    return replace(drafts.plan, notes={"criterion": config.criterion, "collapsed": steps})


def _next(
    config: LayerCollapseConfig, context: CalibrationContext, stack: Stack, left: list[int], tried: LossSweep
) -> Plan:
    """The plan for the next FFN of those that are left, with what led to it as notes; without edits where none will."""
    with context.step("fit the FFNs"):
        fits = fit_ffns(context.model, stack, context.calibration, left, config.penalty, config.rank)
    r2 = {str(index): fit.r2 for index, fit in fits.items()}
    able = [index for index in left if config.target_r2 is None or fits[index].r2 >= config.target_r2]
    if not able:
        return Plan(notes={"r2": r2})
    with context.step("choose"):
        best, costs = _choose(config.criterion, {index: fits[index] for index in able}, tried)
    notes = {"block": best, "r2": r2, "cost": {str(index): cost for index, cost in costs.items()}}
    return replace(fits[best].draft(Block(context.model, stack, best)), notes=notes)


def collapsible(context: CalibrationContext, stack: Stack, rank: int | None) -> list[int]:
    """The blocks whose FFN can be one linear map of fewer parameters."""
    reasons: dict[int, str] = {}
    for index, block in enumerate(stack.blocks):
        ffn = Anatomy(context.model).parts(stack, index).ffn
        maps = [block.get_submodule(path) for path in projections(ffn)]
        if not maps:
            reasons[index] = "has experts" if ffn is not None and ffn.experts else _NO_FFN
            continue
        hidden = linear_widths(maps[-1])[1]
        before = sum(p.numel() for module in maps for p in module.parameters())
        after = (2 * hidden * rank if rank else hidden * hidden) + hidden
        if after >= before:
            reasons[index] = f"has an FFN of {before:,} parameters, and the map would have {after:,}"
    if len(reasons) == len(stack):
        no_ffn = f"no FFN of {stack.path} can be made one linear map: block 0 {reasons[0]}"
        if reasons[0] == _NO_FFN:
            raise missing(no_ffn, context.model, stack.path, ffn=True)
        raise UnsupportedModelError(no_ffn + ("; give a rank" if "would have" in reasons[0] else ""))
    return [index for index in range(len(stack)) if index not in reasons]


def projections(ffn: FFN | None) -> tuple[str, ...]:
    """The paths of an FFN's projections, the output's last; none where no linear map can take their place."""
    if ffn is None or ffn.output is None or not ffn.inputs or ffn.activation is None:
        return ()
    return (*ffn.inputs, ffn.output)


def count_of(config: LayerCollapseConfig, total: int) -> int:
    """How many FFNs: all of them may go, as the stream goes on past them."""
    assert config.amount is not None, "these settings say how much"
    count = config.amount.of(total)
    if count > total:
        raise ValueError(f"num_layers={count} asks for more FFNs than the {total} that can be collapsed")
    return count


def _choose(criterion: str, fits: dict[int, LinearFit], tried: LossSweep) -> tuple[int, dict[int, float]]:
    """The FFN whose collapse costs least by a criterion, and what that of each costs which was looked at."""
    if criterion == "loss":
        in_stream = {index: fit.in_stream for index, fit in fits.items()}
        return cheapest(fits, in_stream, lambda some: _losses({index: fits[index] for index in some}, tried))
    costs = {index: -fit.r2 if criterion == "linearity" else fit.in_stream for index, fit in fits.items()}
    return min(costs, key=costs.__getitem__), costs


def _losses(fits: dict[int, LinearFit], tried: LossSweep) -> dict[int, float]:
    """Mean loss of the model as it is now with one more FFN collapsed, for each of them."""
    tried.keep()
    losses = {}
    for index, fit in fits.items():
        with Undo() as undo:
            carry_out(fit.draft(Block(tried.model, tried.stack, index)), tried.model, undo)
            losses[index] = tried.loss_after(index, tried.run(index))
    return losses


def _r2(found: dict[str, float]) -> str:
    return ", ".join(f"block {index} {r2:.3f}" for index, r2 in found.items())
