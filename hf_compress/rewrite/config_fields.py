"""Saying by a config's own fields what edits have made of a model: then the result is a plain checkpoint.

Only widths can be said so. Which field means them differs from family to family, and nothing but a model built from the
config tells; so every field that could is tried, on the meta device.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from hf_compress.anatomy.anatomy import Anatomy
from hf_compress.anatomy.parts import expert_axes, linear_widths
from hf_compress.anatomy.stacks import Stack, reachable_configs
from hf_compress.anatomy.undo import Undo
from hf_compress.plan.edits import ModuleEdit
from hf_compress.rewrite.edits.attention import GROUP_NAMES, NarrowAttention
from hf_compress.rewrite.edits.experts import NarrowExperts
from hf_compress.rewrite.edits.ffn import NarrowFFN
from hf_compress.rewrite.parity import module_differences
from hf_compress.rewrite.probe import quiet
from hf_compress.rewrite.site import Site

RECORD_FIELD = "quantization_config"  # where a config keeps what its own fields cannot say
_UNSET_WIDTHS = re.compile(r"inner|intermediate|ffn")  # fields that stand for a multiple of the hidden size when None
_HEADS = re.compile(r"(num_|n_)?((encoder|decoder)_)?(attention_)?heads?")
_WIDTH_RATIOS = re.compile(r"mlp_ratio|expansion_ratio|ffn_ratio")

Narrowing = NarrowFFN | NarrowExperts
Fields = list[tuple[PreTrainedConfig, str, Any]]


def into_config(model: PreTrainedModel, edits: tuple[ModuleEdit, ...], undo: Undo) -> tuple[ModuleEdit, ...]:
    """Say by the config's own fields what they can say of the widths; what is left over of the edits."""
    stacks = Anatomy(model).stacks
    for stack in stacks:
        edits = _heads_into_config(model, stack, edits, undo)
    narrowings = [edit for edit in edits if isinstance(edit, (NarrowFFN, NarrowExperts))]
    if not narrowings:
        return edits
    plain = described(model, ())
    groups = [(stacks, narrowings)]  # both sides of an encoder-decoder may have one field
    groups += [([s], [e for e in narrowings if is_inside(e, s)]) for s in stacks] if len(stacks) > 1 else []
    for around, group in groups:
        rest = tuple(edit for edit in edits if edit not in group)
        if not group or len(rest) + len(group) > len(edits):
            continue  # said already
        if any(_try(model, rest, fields, undo) for fields in _candidates(plain, model, around, group)):
            edits = rest
    return edits


def _heads_into_config(
    model: PreTrainedModel, stack: Stack, edits: tuple[ModuleEdit, ...], undo: Undo
) -> tuple[ModuleEdit, ...]:
    """Say by the config's own fields how many heads all blocks of a stack have; what is left over of the edits."""
    group = [edit for edit in edits if isinstance(edit, NarrowAttention) and is_inside(edit, stack)]
    if len({(edit.heads, edit.groups, edit.width) for edit in group}) != 1:
        return edits
    said = ((_HEADS, group[0].heads), (GROUP_NAMES, group[0].groups))
    fields = [
        (config, name, value)
        for config, _ in stack.configs
        for name in vars(config)
        for pattern, value in said
        if pattern.fullmatch(name) and type(vars(config)[name]) is int
    ]
    fields += [(config, "head_dim", group[0].width) for config, _ in stack.configs]
    rest = tuple(edit for edit in edits if edit not in group)
    return rest if _try(model, rest, fields, undo) else edits


def described(model: PreTrainedModel, edits: Iterable[ModuleEdit]) -> PreTrainedModel:
    """The model that the config of `model` describes, without a record, and with `edits` done to it; on meta."""
    values = {name: value for name, value in model.config.to_dict().items() if name != RECORD_FIELD}
    with quiet(), torch.device("meta"):
        config = type(model.config).from_dict(values)  # as from a file, for configs check what they are made of
        own: Any = type(model)
        plain: PreTrainedModel = own._from_config(config, dtype=model.dtype)
        site = Site(plain, Undo())
        for edit in edits:
            edit.restructure(site)
    return plain


def shapes(model: PreTrainedModel) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _describes(model: PreTrainedModel, edits: Sequence[ModuleEdit]) -> bool:
    """Whether the config of `model` and `edits` describe just this model."""
    try:
        other = described(model, edits)
    except Exception:  # a config that cannot be built does not describe it
        return False
    return shapes(model) == shapes(other) and next(module_differences(model, other), None) is None


def is_inside(edit: ModuleEdit, stack: Stack) -> bool:
    return all(path.startswith(f"{stack.path}.") for path in edit.paths)


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
