"""Carries a plan out on a live model: all of it, checked, or nothing."""

from __future__ import annotations

from transformers import PreTrainedModel

from hf_compress.anatomy.anatomy import Anatomy
from hf_compress.anatomy.surgery import remove_blocks
from hf_compress.anatomy.undo import Undo
from hf_compress.parity import Probe, check_parity
from hf_compress.plan import Plan


def apply(plan: Plan, model: PreTrainedModel, probe: Probe | None = None) -> None:
    """Change `model` as `plan` says, and prove that the result can be saved and loaded.

    Args:
        plan: made for this very model.
        model: changed in place.
        probe: inputs on which the changed model and its rebuilt copy have to agree; made up when None.

    Raises:
        ValueError: the plan names blocks or parameters that the model does not have, or shapes that do not fit.
        UnsupportedModelError: the model does not run afterwards, or its config cannot say what it has become
            (`ParityError`). In every case, on interruption too, the model is as it was.
    """
    probe = probe or Probe.of(model)
    undo = Undo()
    try:
        carry_out(plan, model, undo)
        check_parity(model, probe)
    except BaseException:
        undo.rollback()
        raise


def carry_out(plan: Plan, model: PreTrainedModel, undo: Undo) -> None:
    """Write the plan's tensors and take its blocks out, recording each step in `undo`."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    if unknown := sorted(set(plan.tensors) - set(parameters)):
        raise ValueError(
            f"the plan has tensors for parameters that {type(model).__name__} does not have: {unknown[:5]}"
        )
    anatomy = Anatomy(model)
    stacks = {path: anatomy.stack(path) for path in plan.stacks}
    for name, tensor in plan.tensors.items():
        undo.write(parameters[name], tensor)
    for path, stack in stacks.items():
        remove_blocks(model, stack, plan.removed(path), undo)
