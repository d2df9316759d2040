"""Experts taken apart, so that each has linear maps whose weights can be scored, left out and rounded."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn

from hf_compress.anatomy.anatomy import Anatomy
from hf_compress.anatomy.stacks import Stack
from hf_compress.anatomy.undo import Undo
from hf_compress.apply import carry_out
from hf_compress.calibration.capture import forward, hooked
from hf_compress.calibration.data import Batch
from hf_compress.drafts import split_experts
from hf_compress.errors import UnsupportedModelError
from hf_compress.methods.lrp.linears import some_batch
from hf_compress.modules.experts import SeparateExperts
from hf_compress.plan import Plan
from hf_compress.workbench import Workbench

logger = logging.getLogger(__name__)
_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-4}  # of the size of what is written; of other dtypes below
_TOLERANCE_HALF = 3e-2


def plan_separation(bench: Workbench, stack: Stack, undo: Undo) -> Plan:
    """Give the experts of every block linear maps of their own; the model stays changed until `undo` is rolled back.

    Experts that cannot be taken apart stay as they are, and a warning says so.

    Raises:
        UnsupportedModelError: apart, experts do not write what they wrote.
    """
    paths = _in_tensors(bench, stack)
    plan = Plan()
    for path in paths:
        try:
            plan += split_experts(bench.model, path)
        except UnsupportedModelError as error:
            logger.warning("%s: their weights stay as they are; ILLCConfig may narrow them", error)
    if plan.edits:
        given = _given(bench, some_batch(bench), [path for edit in plan.module_edits for path in edit.paths])
        before = {path: _written(bench.model.get_submodule(path), args) for path, args in given.items()}
        carry_out(plan, bench.model, undo)
        for path, args in given.items():
            _check_same(path, before[path], _written(bench.model.get_submodule(path), args))
    return plan


def _in_tensors(bench: Workbench, stack: Stack) -> list[str]:
    """The paths of the modules that hold all experts of a block in one tensor for each projection."""
    found = []
    for index, block in enumerate(stack.blocks):
        ffn = Anatomy(bench.model).parts(stack, index).ffn
        if ffn is not None and ffn.experts is not None:
            experts = block.get_submodule(ffn.experts)
            if not isinstance(experts, (nn.ModuleList, SeparateExperts)):
                found.append(f"{stack.path}.{index}.{ffn.experts}")
    return found


def _given(bench: Workbench, batch: Batch, paths: list[str]) -> dict[str, tuple[Any, ...]]:
    """What modules are given in a forward pass."""
    found: dict[str, tuple[Any, ...]] = {}

    def keep(path: str) -> Any:
        return lambda module, args, kwargs: found.__setitem__(path, (*args, *kwargs.values()))

    with hooked(
        bench.model.get_submodule(path).register_forward_pre_hook(keep(path), with_kwargs=True) for path in paths
    ):
        forward(bench.model, batch)
    return found


def _written(experts: nn.Module, given: tuple[Any, ...]) -> Tensor:
    written = experts(*given)
    assert isinstance(written, Tensor)
    return written


def _check_same(path: str, before: Tensor, after: Tensor) -> None:
    tolerance = _TOLERANCE.get(before.dtype, _TOLERANCE_HALF)
    same = before.shape == after.shape
    if not same or float((after.double() - before.double()).norm()) > tolerance * float(before.double().norm()):
        raise UnsupportedModelError(f"the experts of {path} do not write, one by one, what they write together")
