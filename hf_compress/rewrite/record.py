"""What of a model's structure its config cannot say: a list of edits, kept in the config beside it.

After every change the record is made anew. What the config's own fields can say after all, as one width for all FFNs,
is said there, so that the result is a plain checkpoint. What remains goes under `quantization_config`, where the loader
finds it. And since stock Transformers would pass that over with a warning, a record that leaves all weights in their
old shapes comes with a seal.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from hf_compress.anatomy.anatomy import Anatomy
from hf_compress.anatomy.undo import Undo
from hf_compress.errors import PlanError, UnsupportedModelError
from hf_compress.modules.sealed import Sealed
from hf_compress.plan.algebra import last_of_each
from hf_compress.plan.edits import ModuleEdit
from hf_compress.plan.plan import METHOD, PLAN_VERSION, Plan
from hf_compress.rewrite.config_fields import RECORD_FIELD, described, into_config, shapes
from hf_compress.rewrite.edits import edits_from_list
from hf_compress.rewrite.edits.sealed import Seal
from hf_compress.rewrite.site import Site

_EDITS_PER_MODULE = 2  # narrowed and packed, say


def recorded(config: PreTrainedConfig) -> tuple[ModuleEdit, ...]:
    """The edits that a config carries, to be done in this order to the model that its other fields describe.

    Raises:
        PlanError: the record is malformed, or of a newer version.
    """
    entry = _entry(config)
    return () if entry is None else edits_of(entry)


def missing(what: str, model: PreTrainedModel, within: str, ffn: bool = False) -> UnsupportedModelError:
    """The error that a method does not find what it changes, and which earlier change has left it in another form.

    Args:
        what: the beginning of the message.
        within: path of the block or stack where it was looked for.
        ffn: whether that was an FFN.
    """
    for edit in recorded(model.config):
        path = next((path for path in edit.paths if path.startswith(f"{within}.")), None)
        if path is not None and edit.leaves and (ffn or not edit.replaces_ffn):
            return UnsupportedModelError(
                f"{what}: an earlier change has left {path} {edit.leaves}; do this before that one, on the model as it "
                "was then"
            )
    return UnsupportedModelError(what)


def _entry(config: PreTrainedConfig) -> dict[str, Any] | None:
    """What the field of the record has, if that is ours and not a quantization's."""
    entry = getattr(config, RECORD_FIELD, None)
    entry = entry if entry is None or isinstance(entry, dict) else entry.to_dict()
    return entry if entry and entry.get("quant_method") == METHOD else None


def edits_of(entry: dict[str, Any]) -> tuple[ModuleEdit, ...]:
    """The inverse of `entry_of`; PlanError where it is malformed or of a newer version."""
    edits = edits_from_list(entry.get("version"), entry.get("plan"))
    if others := [edit for edit in edits if not isinstance(edit, ModuleEdit)]:
        raise PlanError(f"a config says by itself which blocks there are; its plan has {type(others[0]).__name__}")
    return tuple(edit for edit in edits if isinstance(edit, ModuleEdit))


def entry_of(edits: Iterable[ModuleEdit]) -> dict[str, Any]:
    """Edits as they stand in a config."""
    return {"quant_method": METHOD, "version": PLAN_VERSION, "plan": [edit.to_dict() for edit in edits]}


def rebuild_structure(model: PreTrainedModel, edits: Sequence[ModuleEdit]) -> frozenset[str]:
    """Do recorded edits to a model that is being loaded, with or without the head that it was saved with.

    Returns:
        The names in the model's state that are new, gone, or have another tensor than before.

    Raises:
        PlanError: the model has no such modules, sizes do not fit, or tied weights would be changed.
    """
    apart = sum(len(parameter) for parameter in model.parameters() if parameter.ndim == 3)  # maps in tensors of experts
    if len(edits) > _EDITS_PER_MODULE * (apart + sum(1 for _ in model.modules())):
        raise PlanError(
            f"the record has {len(edits):,} edits; {type(model).__name__} has not as many modules to change"
        )
    before = model.state_dict(keep_vars=True)
    site = Site(model, Undo())
    for edit in edits:
        if (placed := _placed(model, edit)) is not None:
            placed.restructure(site)
    after = model.state_dict(keep_vars=True)
    changed = frozenset(name for name in {**before, **after} if before.get(name) is not after.get(name))
    if tied := sorted(changed.intersection(name for pair in model.all_tied_weights_keys.items() for name in pair)):
        raise PlanError(f"the record changes {tied[0]}, which is tied to another weight")
    return changed


def _placed(model: PreTrainedModel, edit: ModuleEdit) -> ModuleEdit | None:
    """The edit with the paths that this model has, saved by another class perhaps; None for one of a head not loaded.

    As Transformers does with weights: the name of the base model is put before a path or taken away.
    """
    prefix = f"{model.base_model_prefix}."
    here = [path.partition(".")[0] in model._modules for path in edit.paths]
    if all(here):
        return edit
    if model.base_model is not model:
        return edit.moved(lambda path: prefix + path)
    if all(path.startswith(prefix) for path in edit.paths):
        return edit.moved(lambda path: path.removeprefix(prefix))
    saved_by = next(iter(model.config.architectures or ()), type(model).__name__)
    return None if saved_by != type(model).__name__ and not any(here) else edit


def record(model: PreTrainedModel, edits: Sequence[ModuleEdit], undo: Undo) -> None:
    """Have the config of `model` say that `edits`, in this order, make it what it is."""
    edits = into_config(model, last_of_each(edits), undo)
    if edits and _passes_for_stock(model, edits):
        seal = Seal(_sealable(model, edits))
        seal.restructure(Site(model, undo))
        edits = (*edits, seal)
    if edits:
        undo.set(model.config, RECORD_FIELD, entry_of(edits))
    elif _entry(model.config):
        undo.unset(model.config, RECORD_FIELD)


def unsealed(plan: Plan, model: PreTrainedModel, undo: Undo) -> Plan:
    """Break a model's seal, which may stand in a plan's way; `record` sets another where one is still needed.

    Returns:
        The plan, with the paths that there are now.
    """
    seals = [path for path, module in model.named_modules() if isinstance(module, Sealed)]
    for path in seals:
        Site(model, undo).replace(path, model.get_submodule(f"{path}.inner"))

    def rename(path: str) -> str:
        for seal in seals:
            if path == f"{seal}.inner" or path.startswith(f"{seal}.inner."):
                return seal + path.removeprefix(f"{seal}.inner")
        return path

    edits = tuple(edit.moved(rename) if isinstance(edit, ModuleEdit) else edit for edit in plan.edits)
    return Plan(edits, {rename(name): tensor for name, tensor in plan.tensors.items()}, plan.notes)


def _passes_for_stock(model: PreTrainedModel, edits: Sequence[ModuleEdit]) -> bool:
    """Whether stock Transformers, which does not know the edits, would find no weight of a wrong shape.

    A head is not always loaded, so where a part of the body is changed, a weight of the body has to stop the loading.
    """
    stock = shapes(described(model, ()))
    prefix = f"{model.base_model_prefix}." if model.base_model is not model else ""
    body = any(path.startswith(prefix) for edit in edits for path in edit.paths)
    return not any(
        name in stock and stock[name] != shape
        for name, shape in shapes(model).items()
        if not body or name.startswith(prefix)
    )


def _sealable(model: PreTrainedModel, edits: Sequence[ModuleEdit]) -> str:
    """The module to seal: a norm, or a projection where norms learn nothing; best in a block that was changed."""
    anatomy = Anatomy(model)
    names = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    candidates: list[tuple[bool, bool, str]] = []
    for stack in anatomy.stacks:
        for index, block in enumerate(stack.blocks):
            path, parts = f"{stack.path}.{index}", anatomy.parts(stack, index)
            untouched = not any(p.startswith(f"{path}.") or p == path for edit in edits for p in edit.paths)
            candidates += [
                (name not in parts.norms, untouched, f"{path}.{name}")
                for name in (*parts.norms, *reversed(parts.writers))
                if names[id(block.get_submodule(name)._parameters.get("weight"))] == 1  # it has one, and shares it not
            ]
    if not candidates:
        raise PlanError("the change leaves every shape as it was, and no block has a module that could be sealed")
    return min(candidates, key=lambda candidate: candidate[:2])[2]
