"""Carries a plan out on a live model: all of it, checked, or nothing."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_compress.anatomy.anatomy import Anatomy
from hf_compress.anatomy.dispatch import Place, place_at, without_values
from hf_compress.anatomy.residency import resident
from hf_compress.anatomy.stacks import Stack
from hf_compress.anatomy.undo import Undo
from hf_compress.errors import PlanError
from hf_compress.numerics.defaults import torch_defaults
from hf_compress.numerics.finite import all_finite
from hf_compress.plan.algebra import Removal
from hf_compress.plan.edits import ModuleEdit
from hf_compress.plan.plan import Plan
from hf_compress.rewrite.blocks import kept_blocks, remove_blocks
from hf_compress.rewrite.edits.sealed import Seal
from hf_compress.rewrite.guard import check_left_out, outputs_without
from hf_compress.rewrite.parity import check_parity
from hf_compress.rewrite.probe import Probe
from hf_compress.rewrite.record import record, recorded, unsealed
from hf_compress.rewrite.site import Site


@torch_defaults()
def apply(plan: Plan, model: PreTrainedModel, probe: Probe | None = None) -> None:
    """Change `model` as `plan` says, and prove that it is what it should be and can be saved and loaded.

    That is: with its blocks gone it gives what it gives while they are there and hand their stream through (see
    `guard`), and so does a model rebuilt from its config (see `parity`).

    Args:
        plan: made for this very model.
        model: changed in place. Its config says afterwards what it has become, by its own fields where they can.
        probe: inputs on which they have to agree, kept with the model for when it is saved; made up when None.

    Raises:
        PlanError: the plan names blocks, modules or parameters that the model does not have, or sizes that do not fit.
        UnsupportedModelError: the model does not run afterwards, or its config cannot say what it has become
            (`ParityError`). In every case, on interruption too, the model is as it was.
    """
    with Change(model) as change:
        change.finish(plan, probe or Probe.of(model))


class Change:
    """A change of a live model: drafts are carried out on it one after another, and in the end all of it is checked.

    with Change(model) as change:    # takes everything back if the block ends by an error
        ...
        change.finish(plan, probe)

    Attributes:
        undo: how to take back what was done.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model, self.undo = model, Undo()
        self._before = [edit for edit in recorded(model.config) if not isinstance(edit, Seal)]
        self._done: list[ModuleEdit] = []

    def __enter__(self) -> Change:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self.undo.rollback()

    def keep(self, drafts: Iterable[ModuleEdit], undo: Undo) -> None:
        """Count edits as done that were carried out on the model, and that `undo` takes back."""
        self._done += drafts
        self.undo.take_over(undo)

    def finish(self, plan: Plan, probe: Probe) -> None:
        """Carry out what of `plan` is not done yet, take blocks out, and check all of it; see `apply` for errors."""
        model, undo = self.model, self.undo
        left = tuple(edit for edit in plan.edits if edit not in self._done)
        done = [edit for edit in plan.module_edits if edit in self._done]
        plan = change_modules(Plan(left, plan.tensors), model, undo)
        removed = removed_blocks(plan, model)
        whole = outputs_without(model, removed, probe)
        for stack, blocks in removed.items():
            remove_blocks(model, stack, blocks, undo)
        gone = Removal({stack.path: blocks for stack, blocks in removed.items()})
        record(model, gone.left_of([*self._before, *done, *plan.module_edits]), undo)
        check_left_out(model, removed, whole, check_parity(model, probe))
        probe.keep(model)


def carry_out(plan: Plan, model: PreTrainedModel, undo: Undo) -> Plan:
    """Change modules, write the plan's tensors, and take its blocks out, recording each step in `undo`.

    Returns:
        As `change_modules`.
    """
    plan = change_modules(plan, model, undo)
    for stack, blocks in removed_blocks(plan, model).items():
        remove_blocks(model, stack, blocks, undo)
    return plan


def change_modules(plan: Plan, model: PreTrainedModel, undo: Undo) -> Plan:
    """Change modules and write the plan's tensors, all blocks still there, recording each step in `undo`.

    Returns:
        The plan as it was carried out, with the paths of modules that a seal had hidden.
    """
    plan = unsealed(plan, model, undo)
    site = Site(model, undo)
    for edit in plan.module_edits:
        edit.restructure(site)
    _write(plan.tensors, model, undo)
    return plan


def removed_blocks(plan: Plan, model: PreTrainedModel) -> dict[Stack, tuple[int, ...]]:
    """The stacks that a plan takes blocks out of, and which; ValueError where a stack does not have them."""
    anatomy = Anatomy(model)
    removed = {anatomy.stack(path): plan.removed(path) for path in plan.stacks}
    for stack, blocks in removed.items():
        kept_blocks(stack, blocks)
    return removed


def _write(tensors: dict[str, Tensor], model: PreTrainedModel, undo: Undo) -> None:
    """Give tensors of the model new values; those that an edit has made get their memory here."""
    own = _named_tensors(model)
    if unknown := sorted(set(tensors) - set(own)):
        raise PlanError(f"the plan has tensors for parameters that {type(model).__name__} does not have: {unknown[:5]}")
    owners: dict[str, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        _check_fits(name, value, own[name])
        owner, _, last = name.rpartition(".")
        owners.setdefault(owner, {})[last] = value
    for owner, values in owners.items():
        module, place = model.get_submodule(owner), place_at(model, owner)
        if place.offloaded:
            _write_offloaded(module, values, place, undo)
            continue
        for name, value in values.items():
            table, current = _table(module, name)
            if current.is_meta:
                undo.put(table, name, _made(value, current, place.device))
            else:
                undo.write(current, value)
    if empty := sorted(without_values(model)):
        raise PlanError(f"the plan changes {', '.join(empty[:5])} but gives no values for them")


def _write_offloaded(module: nn.Module, values: dict[str, Tensor], place: Place, undo: Undo) -> None:
    """Give tensors of one module new values, which are stored; `undo` holds on to none of the old ones."""
    with resident(module, undo, place):
        for name, value in values.items():
            table, current = _table(module, name)
            table[name] = _made(value, current, place.device)


def _check_fits(name: str, value: Tensor, current: Tensor) -> None:
    """Raise PlanError where a plan's tensor cannot take the place of the one there is."""
    if value.is_meta:
        raise PlanError(
            f"the plan's tensor for {name} has no values: it was made while what it is made of was offloaded"
        )
    if value.is_floating_point() and not all_finite(value):
        raise PlanError(f"the plan's tensor for {name} holds NaN or infinity")
    if not current.is_meta:
        return
    if current.shape != value.shape:
        raise PlanError(f"{name} is {tuple(current.shape)} after the plan; its tensor is {tuple(value.shape)}")
    if current.dtype != value.dtype and not current.is_floating_point():
        raise PlanError(f"{name} is kept as {current.dtype}; its tensor is {value.dtype}")


def _table(module: nn.Module, name: str) -> tuple[dict[str, Any], Tensor]:
    """Where a module keeps a tensor of its own, and that tensor."""
    tables: tuple[dict[str, Any], dict[str, Any]] = (module._parameters, module._buffers)
    table = next(table for table in tables if table.get(name) is not None)
    return table, table[name]


def _made(value: Tensor, current: Tensor, device: torch.device) -> Tensor:
    """A tensor of these values in memory of its own, of the dtype and the kind of the one that it replaces."""
    made = value.detach().to(device, current.dtype, copy=True, memory_format=torch.contiguous_format)
    return nn.Parameter(made, requires_grad=current.requires_grad) if isinstance(current, nn.Parameter) else made


def _named_tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }
