"""Experts taken apart, so that each has linear maps whose weights can be scored, left out and rounded."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from hf_compress.anatomy.stacks import Stack
from hf_compress.anatomy.undo import Undo
from hf_compress.calibration.capture import forward, watch_arguments
from hf_compress.errors import UnsupportedModelError
from hf_compress.methods.base.context import CalibrationContext
from hf_compress.methods.lrp.linears import some_batch
from hf_compress.plan.plan import Plan
from hf_compress.rewrite.apply import carry_out
from hf_compress.rewrite.builders import split_experts

logger = logging.getLogger(__name__)
_TOLERANCE = {torch.float32: 2e-3, torch.float64: 2e-3}  # of the size of what is written, in TF32; else below
_TOLERANCE_HALF = 3e-2


def plan_separation(context: CalibrationContext, stack: Stack, undo: Undo) -> Plan:
    """Give the experts of every block linear maps of their own; the model stays changed until `undo` is rolled back.

    Experts that cannot be taken apart stay as they are, and a warning says so.

    Raises:
        UnsupportedModelError: apart, experts do not write what they wrote.
    """
    plan = Plan()
    for path in _in_tensors(stack):
        try:
            plan += split_experts(context.model, path)
        except UnsupportedModelError as error:
            logger.warning("tensors of three dimensions stay as they are: %s", error)
    if plan.edits:
        experts = {path: context.model.get_submodule(path) for edit in plan.module_edits for path in edit.paths}
        with watch_arguments(experts) as calls:
            forward(context.model, some_batch(context))
        given = {path: args[-1] for path, args in calls.items() if args}
        before = {path: _written(experts[path], args) for path, args in given.items()}
        carry_out(plan, context.model, undo)
        for path, args in given.items():
            _check_same(path, before[path], _written(context.model.get_submodule(path), args))
    return plan


def _in_tensors(stack: Stack) -> list[str]:
    """The paths of the modules in the blocks that have tensors of three dimensions, and are no convolutions."""
    return [
        f"{stack.path}.{index}.{path}"
        for index, block in enumerate(stack.blocks)
        for path, module in block.named_modules()
        if not isinstance(module, _ConvNd)
        and any(tensor.ndim == 3 and min(tensor.shape) > 1 for tensor in module.parameters(recurse=False))
    ]


def _written(experts: nn.Module, given: tuple[Any, ...]) -> Tensor:
    return torch.as_tensor(experts(*given))


def _check_same(path: str, before: Tensor, after: Tensor) -> None:
    tolerance = _TOLERANCE.get(before.dtype, _TOLERANCE_HALF)
    gap = float((after.double() - before.double()).norm() / before.double().norm().clamp(min=1e-300))
    if gap > tolerance:
        raise UnsupportedModelError(
            f"run one by one, the experts of {path} write something else than together (by {gap:.2g} of its size; at "
            f"most {tolerance:.2g} is rounding): LRP cannot change these weights; narrow the experts with ILLCConfig"
        )
