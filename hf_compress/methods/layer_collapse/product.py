"""The paper's collapse: FFNs whose activation was trained to be linear become the product of their projections."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_compress.anatomy.anatomy import Block
from hf_compress.errors import NotLinearError
from hf_compress.methods.base.context import CalibrationContext
from hf_compress.methods.layer_collapse.blend import absorbed, blended
from hf_compress.methods.layer_collapse.closed_form import collapsible
from hf_compress.methods.layer_collapse.config import LayerCollapseConfig
from hf_compress.plan.plan import Plan
from hf_compress.rewrite.builders import linear_ffn


def plan_by_product(config: LayerCollapseConfig, context: CalibrationContext) -> Plan:
    """Collapse, from the last block to the first, every FFN with |1 − α| below the tolerance.

    Source: arXiv 2311.17943, algorithm 1; in plain FFNs W = W₂W₁, b = W₂b₁ + b₂.

    Raises:
        ValueError: no FFN has a trained α.
        NotLinearError: none is within the tolerance; it names them all.
    """
    stack = context.stack(config.stack)
    alphas = {index: module.alpha.item() for index, module in blended(context.model, stack).items()}
    if not alphas:
        collapsible(context, stack, config.rank)  # which says so where there is no FFN at all, as of packed weights
        raise ValueError(
            "variant='paper' collapses FFNs whose activation was trained to be linear, and this model has none: train "
            "it with Trainer(..., callbacks=[CompressionCallback(config)]), or use the closed form, which needs no "
            "training"
        )
    near = [index for index in sorted(alphas, reverse=True) if abs(1 - alphas[index]) < config.tolerance]
    if not near:
        raise NotLinearError(
            f"no FFN has |1 − α| below the tolerance {config.tolerance:g}: {listed(alphas)}; train longer or with a "
            "larger lc, raise the tolerance, or use the closed form"
        )
    plan = Plan()
    with context.step("multiply"):
        for index in near:
            plan += product(Block(context.model, stack, index), config.rank)
    steps = [{"block": index, "alpha": alphas[index]} for index in near]
    left = {str(index): alpha for index, alpha in alphas.items() if index not in near}
    return Plan(plan.edits, plan.tensors, {"criterion": "alpha", "collapsed": steps, "not_collapsed": left})


def product(block: Block, rank: int | None) -> Plan:
    """The plan that makes an FFN what it is at α = 1; with a rank, the nearest map of that rank (truncated SVD)."""
    weight, bias = absorbed(block)
    maps: tuple[Tensor, ...] = (weight,)
    if rank is not None:
        left, values, right = torch.linalg.svd(weight, full_matrices=False)
        maps = (left[:, :rank] * values[:rank], right[:rank])
    return linear_ffn(block, [factor.float() for factor in maps], bias.float() if bias.any() else None)


def listed(alphas: dict[int, float]) -> str:
    return ", ".join(f"block {index} α = {alpha:.3f}" for index, alpha in sorted(alphas.items()))
