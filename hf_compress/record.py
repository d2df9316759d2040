"""What of a model's structure its config cannot say: a list of edits, kept in the config beside it.

After every change the record is made anew. What the config's own fields can say after all, as one width for all FFNs,
is said there, so that the result is a plain checkpoint. What remains goes under `quantization_config`, where the loader
finds it. And since stock Transformers would pass that over with a warning, a record that leaves all weights in their
old shapes comes with a seal.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from hf_compress.anatomy.anatomy import Anatomy
from hf_compress.anatomy.parts import expert_axes, linear_widths
from hf_compress.anatomy.stacks import Stack, reachable_configs
from hf_compress.anatomy.undo import Undo
from hf_compress.edits import ModuleEdit, NarrowExperts, NarrowFFN, Seal
from hf_compress.errors import PlanError
from hf_compress.parity import module_differences, quiet
from hf_compress.plan import PLAN_VERSION, edits_from_list
from hf_compress.structure import Site, restructure

METHOD = "hf_compress"
_FIELD = "quantization_config"
_UNSET_WIDTHS = re.compile(r"inner|intermediate|ffn")  # fields that stand for a multiple of the hidden size when None
_WIDTH_RATIOS = re.compile(r"mlp_ratio|expansion_ratio|ffn_ratio")

Narrowing = NarrowFFN | NarrowExperts


def recorded(config: PreTrainedConfig) -> tuple[ModuleEdit, ...]:
    """The edits that a config carries, to be done in this order to the model that its other fields describe.

    Raises:
        PlanError: the record is malformed, or of a newer version.
    """
    entry = getattr(config, _FIELD, None)
    entry = entry if entry is None or isinstance(entry, dict) else entry.to_dict()
    return edits_of(entry) if entry and entry.get("quant_method") == METHOD else ()


def edits_of(entry: dict[str, Any]) -> tuple[ModuleEdit, ...]:
    """The inverse of `entry_of`; PlanError where it is malformed or of a newer version."""
    edits = edits_from_list(entry.get("version"), entry.get("plan"))
    if others := [edit for edit in edits if not isinstance(edit, ModuleEdit)]:
        raise PlanError(f"a config says by itself which blocks there are; its plan has {type(others[0]).__name__}")
    return tuple(edit for edit in edits if isinstance(edit, ModuleEdit))


def entry_of(edits: Iterable[ModuleEdit]) -> dict[str, Any]:
    """Edits as they stand in a config."""
    return {"quant_method": METHOD, "version": PLAN_VERSION, "plan": [edit.to_dict() for edit in edits]}


def rebuild_structure(model: PreTrainedModel, edits: Iterable[ModuleEdit]) -> None:
    """Do recorded edits to a model that is being loaded, with or without the head that it was saved with.

    Raises:
        PlanError: the model has no such modules, or sizes do not fit.
    """
    site = Site(model, Undo())
    for edit in edits:
        if (placed := _placed(model, edit)) is not None:
            restructure(placed, site)


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
    edits = _into_config(model, _last_of_each(edits), undo)
    if edits and _passes_for_stock(model, edits):
        seal = Seal(_sealable(model, edits))
        restructure(seal, Site(model, undo))
        edits = (*edits, seal)
    if edits:
        undo.set(model.config, _FIELD, entry_of(edits))
    else:
        undo.unset(model.config, _FIELD)


def after_removal(edits: Iterable[ModuleEdit], stack: str, length: int, removed: Sequence[int]) -> list[ModuleEdit]:
    """The edits of a model that had `length` blocks in a stack, once the blocks `removed` are gone."""
    kept = [index for index in range(length) if index not in set(removed)]
    places = {f"{stack}.{old}": f"{stack}.{new}" for new, old in enumerate(kept)}
    gone = {f"{stack}.{index}" for index in removed}
    depth = stack.count(".") + 2

    def block(path: str) -> str:
        return ".".join(path.split(".")[:depth])

    def rename(path: str) -> str:
        return places.get(block(path), block(path)) + path[len(block(path)) :]

    return [edit.moved(rename) for edit in edits if not any(block(path) in gone for path in edit.paths)]


def _last_of_each(edits: Sequence[ModuleEdit]) -> tuple[ModuleEdit, ...]:
    """Without edits that a later one of the same kind makes again: an FFN narrowed twice has only the last width."""
    last = {(type(edit), edit.paths): index for index, edit in enumerate(edits)}
    return tuple(edit for index, edit in enumerate(edits) if last[type(edit), edit.paths] == index)


def described(model: PreTrainedModel, edits: Iterable[ModuleEdit]) -> PreTrainedModel:
    """The model that the config of `model` describes, without a record, and with `edits` done to it; on meta."""
    values = {name: value for name, value in model.config.to_dict().items() if name != _FIELD}
    with quiet(), torch.device("meta"):
        config = type(model.config).from_dict(values)  # as from a file, for configs check what they are made of
        own: Any = type(model)
        plain: PreTrainedModel = own._from_config(config, dtype=model.dtype)
        site = Site(plain, Undo())
        for edit in edits:
            restructure(edit, site)
    return plain


def _shapes(model: PreTrainedModel) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _describes(model: PreTrainedModel, edits: Sequence[ModuleEdit]) -> bool:
    """Whether the config of `model` and `edits` describe just this model."""
    try:
        other = described(model, edits)
    except Exception:  # a config that cannot be built does not describe it
        return False
    return _shapes(model) == _shapes(other) and next(module_differences(model, other), None) is None


def _into_config(model: PreTrainedModel, edits: tuple[ModuleEdit, ...], undo: Undo) -> tuple[ModuleEdit, ...]:
    """Say by the config's own fields what they can say of the widths; what is left over of the edits."""
    narrowings = [edit for edit in edits if isinstance(edit, (NarrowFFN, NarrowExperts))]
    if not narrowings:
        return edits
    stacks = Anatomy(model).stacks
    plain = described(model, ())
    groups = [(stacks, narrowings)]  # both sides of an encoder-decoder may have one field
    groups += [([s], [e for e in narrowings if _inside(e, s)]) for s in stacks] if len(stacks) > 1 else []
    for around, group in groups:
        rest = tuple(edit for edit in edits if edit not in group)
        if not group or len(rest) + len(group) > len(edits):
            continue  # said already
        if any(_try(model, rest, fields, undo) for fields in _candidates(plain, model, around, group)):
            edits = rest
    return edits


def _inside(edit: ModuleEdit, stack: Stack) -> bool:
    return all(path.startswith(f"{stack.path}.") for path in edit.paths)


Fields = list[tuple[PreTrainedConfig, str, Any]]


def _try(model: PreTrainedModel, edits: Sequence[ModuleEdit], fields: Fields, undo: Undo) -> bool:
    """Set fields of configs if they, with `edits`, describe the model."""
    with Undo() as trial:
        for config, name, value in fields:
            trial.set(config, name, value)
        if not _describes(model, edits):
            return False
    for config, name, value in fields:
        undo.set(config, name, value)
    return True


def _candidates(
    plain: PreTrainedModel, model: PreTrainedModel, stacks: Sequence[Stack], edits: Sequence[Narrowing]
) -> Iterator[Fields]:
    """Assignments to config fields that might say what `edits` say: single fields that have the old width.

    The configs that count the blocks come first; their fields are the likely ones.
    """
    old = {_width(plain, edit) for edit in edits}
    new = {edit.width for edit in edits}
    near = [config for stack in stacks for config, _ in stack.configs]
    for configs in (near, list(reachable_configs(model.config))):
        unique = list({id(config): config for config in configs}.values())
        for name in dict.fromkeys(name for config in unique for name in vars(config)):
            holders = [config for config in unique if name in vars(config)]
            if len(old) == len(new) == 1 and (value := _said(name, vars(holders[0])[name], *old, *new)) is not None:
                yield [(config, name, value) for config in holders]
            if len(stacks) == 1 and _is_list_of_widths(vars(holders[0])[name], len(stacks[0])):
                widths = list(vars(holders[0])[name])
                for edit in edits:
                    widths[int(edit.paths[0][len(stacks[0].path) + 1 :].partition(".")[0])] = edit.width
                yield [(config, name, widths) for config in holders]


def _said(name: str, value: Any, old: int, new: int) -> Any:
    """What a field of this name and value would be if it said the width; None when it says something else."""
    if type(value) is int and value == old:
        return new
    if value is None and _UNSET_WIDTHS.search(name):
        return new
    if type(value) in (int, float) and _WIDTH_RATIOS.search(name):
        ratio = value * new / old
        return int(ratio) if ratio.is_integer() and type(value) is int else ratio
    return None


def _is_list_of_widths(value: Any, length: int) -> bool:
    return isinstance(value, (list, tuple)) and len(value) == length and all(type(entry) is int for entry in value)


def _width(plain: PreTrainedModel, edit: Narrowing) -> int:
    """Hidden units before an edit, in the model that has none."""
    module = plain.get_submodule(edit.paths[-1])
    return expert_axes(module).width if isinstance(edit, NarrowExperts) else linear_widths(module)[0]


def _passes_for_stock(model: PreTrainedModel, edits: Sequence[ModuleEdit]) -> bool:
    """Whether stock Transformers, which does not know the edits, would find no weight of a wrong shape.

    A head is not always loaded, so where a part of the body is changed, a weight of the body has to stop the loading.
    """
    stock = _shapes(described(model, ()))
    prefix = f"{model.base_model_prefix}." if model.base_model is not model else ""
    body = any(path.startswith(prefix) for edit in edits for path in edit.paths)
    return not any(
        name in stock and stock[name] != shape
        for name, shape in _shapes(model).items()
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
