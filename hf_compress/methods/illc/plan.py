"""The plan of ILLC: which FFNs become how narrow, and then one after another."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_compress.anatomy.anatomy import Anatomy, Block
from hf_compress.anatomy.stacks import Stack
from hf_compress.anatomy.undo import Undo
from hf_compress.calibration.capture import inference
from hf_compress.calibration.processes import any_of, total
from hf_compress.calibration.sweep import StreamPair, start_pairs
from hf_compress.errors import CalibrationError, UnsupportedModelError
from hf_compress.evaluation.faithfulness import similarity
from hf_compress.methods.base.amounts import share_of
from hf_compress.methods.base.context import CalibrationContext
from hf_compress.methods.base.narrowing import Compensation, Narrowing
from hf_compress.methods.illc.alignment import aligned, tile_of
from hf_compress.methods.illc.allocation import adaptive_widths
from hf_compress.methods.illc.config import ILLCConfig
from hf_compress.methods.illc.experts import ExpertNarrowing
from hf_compress.methods.illc.reductions import REDUCTIONS
from hf_compress.plan.plan import Plan
from hf_compress.rewrite.builders import heads_of
from hf_compress.rewrite.record import missing, record, recorded

_CLUSTERS_KEPT = 16_384  # units whose clusters are noted, in all: networks to look at are not larger


def plan_narrower(config: ILLCConfig, context: CalibrationContext) -> Plan:
    """Decide the widths, then narrow FFNs from the first block up.

    Raises:
        UnsupportedModelError: no FFN of the stack can be narrowed.
        ValueError: more units asked for than there are; an `example` that is no sample of the model's.
        CalibrationError: no data, or too little to tell units apart; activations that are not finite.
    """
    stack = context.stack(config.stack)
    widths = _widths(config, context, stack) if config.amount is not None else {}
    heads = _heads(config, context, stack) if config.head_gamma else {}
    with inference(context.model):
        with context.step("start"):
            pairs = start_pairs(context.model, stack, context.calibration, config.tokens)
            weights = _similarities(config, pairs)
        if config.allocation == "adaptive" and widths:
            with context.step("allocate widths"):
                found = context.journal.facts(
                    "widths", lambda: list(adaptive_widths(config, context, stack, pairs, widths).items())
                )
                widths = dict(found)
        with context.step("narrow blocks"):
            narrowing = Narrowing(
                context.model,
                stack,
                pairs,
                partial(REDUCTIONS.resolve(config.reduction_name), config),
                Compensation(config.compensation_name, config.target, config.iterative, config.bias),
                weights,
                config.rows_of_a_batch(round(total(len(pairs))[0])) if config.clusters else 1,
                lambda index, *asked: ExpertNarrowing(config, Block(context.model, stack, index)).plan(*asked),
            )
            with context.drafts() as drafts:
                blocks = narrowing.run(heads, widths, drafts)
                if config.plain:
                    _check_plain(context.model, drafts.plan)
    if sum(len(told.get("clusters", ())) for told in blocks) > _CLUSTERS_KEPT:
        for told in blocks:
            told.pop("clusters", None)
    summary = {"reduction": config.reduction_name, "compensation": config.compensation_name, "blocks": blocks}
    return replace(drafts.plan, notes=summary)


def _check_plain(model: PreTrainedModel, plan: Plan) -> None:
    """Raise where the config of a model that a plan has been carried out on cannot say so."""
    with Undo() as trial:
        record(model, [*recorded(model.config), *plan.module_edits], trial)
        said = recorded(model.config)
    if said:
        raise ValueError(
            f"plain=True asks for what stock Transformers can load, but the config of {type(model).__name__} cannot "
            f"say what becomes of {said[0].paths[-1]}: leave out plain, or narrow the model's other stacks alike"
        )


def _widths(config: ILLCConfig, context: CalibrationContext, stack: Stack) -> dict[int, int]:
    """How many hidden units the FFN of each block keeps, if all keep the same share."""
    widths: dict[int, int] = {}
    for index in range(len(stack)):
        ffn = Anatomy(context.model).parts(stack, index).ffn
        if ffn is None:
            continue
        if config.width is not None and config.width > ffn.width:
            raise ValueError(f"width={config.width} asks for more hidden units than block {index} has, {ffn.width}")
        if ffn.kind == "experts" and config.allocation == "adaptive":
            raise UnsupportedModelError(
                f"block {index} of {stack.path} has experts, which all get one width: leave out allocation='adaptive'"
            )
        widths[index] = config.width or aligned(ffn.width * config.kept, tile_of(config, ffn), ffn.width)
    if not widths:
        none = f"no FFN of {stack.path} can be narrowed, since none was found"
        raise missing(none, context.model, stack.path, ffn=True)
    return widths


def _heads(config: ILLCConfig, context: CalibrationContext, stack: Stack) -> dict[int, int]:
    """How many key and value heads the attention of each block keeps."""
    groups = [heads_of(Block(context.model, stack, index)).groups for index in range(len(stack))]
    return {index: share_of(count, config.head_gamma or 1) for index, count in enumerate(groups)}


def _similarities(config: ILLCConfig, pairs: list[StreamPair]) -> list[Tensor] | None:
    """How near each sample is to the example, per batch; None without one."""
    if config.example is None:
        return None
    example = torch.tensor(config.example)
    weights = []
    for pair in pairs:
        samples: Any = pair.runner.batch.inputs.get("input_values")
        if samples is None or samples.ndim != 2:
            raise ValueError("example= is for models that read vectors as input_values, such as DenseForClassification")
        weights.append(similarity(samples.float(), example, config.kernel_width))
    if not any_of(any(bool((part > 0).any()) for part in weights)):
        raise CalibrationError("no calibration sample is near the example: give a larger kernel_width")
    return weights
