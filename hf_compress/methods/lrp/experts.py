"""Experts taken apart, so that each has linear maps whose weights can be scored, left out and rounded."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from hf_compress.anatomy.stacks import Stack
from hf_compress.calibration.capture import forward, watch_arguments
from hf_compress.errors import UnsupportedModelError
from hf_compress.methods.base.context import CalibrationContext, Drafts
from hf_compress.methods.lrp.linears import some_batch
from hf_compress.rewrite.builders import split_experts

logger = logging.getLogger(__name__)
_TOLERANCE = {torch.float32: 2e-3, torch.float64: 2e-3}  # of the size of what is written, in TF32; else below
_TOLERANCE_HALF = 3e-2


def separate_experts(context: CalibrationContext, stack: Stack, drafts: Drafts) -> None:
    """Give the experts of every block linear maps of their own.

    Experts that cannot be taken apart stay as they are, and a warning says so.

    Raises:
        UnsupportedModelError: apart, experts do not write what they wrote.
    """
    model = context.model
    experts = {path: model.get_submodule(path) for path in _in_tensors(stack)}
    if not experts:
        return
    with watch_arguments(experts) as calls:
        forward(model, some_batch(context))
    for path, module in experts.items():
        with drafts.hold(stack.blocks[int(path.removeprefix(f"{stack.path}.").partition(".")[0])]):
            try:
                draft = split_experts(model, path)
            except UnsupportedModelError as error:
                logger.warning("tensors of three dimensions stay as they are: %s", error)
                continue
            given = calls[path][-1] if calls[path] else None
            before = _written(module, given) if given else None
            drafts.add(draft)
            if before is not None and given:
                _check_same(path, before, _written(model.get_submodule(path), given))


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
