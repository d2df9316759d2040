"""Taking blocks out of a live model so that its config, its cache and its masks agree with what is left."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from hf_compress.anatomy.anatomy import Anatomy
from hf_compress.anatomy.kinds import INDEX_ATTRIBUTE
from hf_compress.anatomy.layout import cut_config, cut_generation, move_taps
from hf_compress.anatomy.stacks import COUNT_NAMES, Stack, find_stacks, nearest_config, reachable_configs
from hf_compress.anatomy.undo import Undo
from hf_compress.errors import UnsupportedModelError

# Attributes of modules that say with which block a run begins.
_RUN_STARTS = frozenset({"first_kv_shared_layer_idx"})


def remove_blocks(model: PreTrainedModel, stack: Stack, removed: Sequence[int], undo: Undo) -> None:
    """Take the blocks with the indices `removed` out of `stack`.

    Cuts the ModuleList in place, renumbers the modules that know their own place or the stack's length, and cuts the
    config's per-block fields. What this cannot see (a position hidden in a number, a constant computed from the index)
    is for the guard and the parity check to find.

    Raises:
        ValueError: an index outside the stack, or no block left.
        UnsupportedModelError: the config cannot say what is left, and names the field.
    """
    length, kept = len(stack), kept_blocks(stack, removed)
    _refuse_shared_count(model, stack)
    _refuse_fed_blocks(model, stack, kept)
    slots = _cache_slots(stack)
    configs = {id(config): config for config in (*reachable_configs(model.config), *(c for c, _ in stack.configs))}
    before = [(config, dict(vars(config))) for config in configs.values()]
    _cut_around(model, stack, kept, undo)  # while the fields still count these blocks
    for config, fields in stack.configs:
        cut_config(config, fields, length, kept, undo)
    for config, said in before:
        _tell_modules(model, config, said, undo)
    _cut_features(model, stack, kept, undo)
    blocks = [stack.blocks[i] for i in kept]
    undo.replace_children(stack.blocks, blocks)
    for new, (old, block) in enumerate(zip(kept, blocks, strict=True)):
        _renumber(block, old, new, slots, undo)
    owner = model.get_submodule(stack.path.rpartition(".")[0])
    for module in owner.modules():
        for name in COUNT_NAMES & vars(module).keys():
            if vars(module)[name] == length:
                undo.set(module, name, len(kept))
        for name in _RUN_STARTS & vars(module).keys():
            undo.set(module, name, sum(i < vars(module)[name] for i in kept))


def kept_blocks(stack: Stack, removed: Sequence[int]) -> list[int]:
    """The blocks of `stack` that are left without `removed`; ValueError as of `remove_blocks`."""
    length = len(stack)
    if bad := [i for i in removed if not 0 <= i < length]:
        raise ValueError(f"{stack.path} has the blocks 0 to {length - 1}; cannot remove {bad}")
    kept = [i for i in range(length) if i not in set(removed)]
    if not kept:
        raise ValueError(f"removing {len(removed)} of {length} blocks of {stack.path} leaves none; keep at least one")
    return kept


def _cut_around(model: PreTrainedModel, stack: Stack, kept: Sequence[int], undo: Undo) -> None:
    """Renumber what is said of a stack's blocks outside of the config that counts them."""
    counting = [config for config, _ in stack.configs]
    for config in reachable_configs(model.config):
        for name, inner in list(vars(config).items()):
            if any(inner is one for one in counting):
                move_taps(config, name, len(stack), kept, undo)
    generation = getattr(model, "generation_config", None)
    if generation is not None and stack.path == Anatomy(model).stack().path:
        cut_generation(generation, kept, undo)


def _tell_modules(model: PreTrainedModel, config: PreTrainedConfig, old: dict[str, Any], undo: Undo) -> None:
    """Give modules that keep a list of their config's under its own name the list as it is now."""
    changed = {
        name: value for name, value in vars(config).items() if isinstance(value, list) and value != old.get(name)
    }
    for path, module in model.named_modules() if changed else ():
        for name in changed.keys() & vars(module).keys():
            copied = _is_same_list(vars(module)[name], old.get(name))
            if copied and nearest_config(model, path) is config:
                undo.set(module, name, changed[name])


def _cut_features(model: PreTrainedModel, stack: Stack, kept: Sequence[int], undo: Undo) -> None:
    """Cut a backbone's list of widths: that of the stem, and behind every block."""
    counting = [config for config, _ in stack.configs]
    for path, module in model.named_modules():
        widths = vars(module).get("num_features")
        counted = isinstance(widths, list) and len(widths) == len(stack) + 1
        if counted and any(nearest_config(model, path) is config for config in counting):
            undo.set(module, "num_features", [widths[0], *(widths[i + 1] for i in kept)])


def _is_same_list(first: Any, second: Any) -> bool:
    """Whether two values are lists or tuples of the same entries."""
    return isinstance(first, (list, tuple)) and isinstance(second, (list, tuple)) and list(first) == list(second)


def _refuse_shared_count(model: PreTrainedModel, stack: Stack) -> None:
    """One field that counts two stacks cannot say that only one of them was cut."""
    for other in find_stacks(model):
        for config, fields in other.configs:
            shared = [name for own, names in stack.configs if own is config for name in names if name in fields]
            if other.path != stack.path and shared:
                raise UnsupportedModelError(
                    f"the config field {shared[0]} counts the blocks of both {stack.path} and {other.path}"
                )


def _refuse_fed_blocks(model: PreTrainedModel, stack: Stack, kept: Sequence[int]) -> None:
    """The features of pictures that Qwen3-VL and its kin read behind vision blocks enter behind the first text blocks.

    By those blocks' places, so a text block that is gone would let the features enter elsewhere; and a check without
    pictures would not see it.
    """
    if not any(config is model.config.get_text_config() for config, _ in stack.configs):
        return
    for other in find_stacks(model):
        for config, _ in other.configs:
            places = [place for place in vars(config).get("deepstack_visual_indexes") or () if place < len(other)]
            if gone := sorted(set(range(min(len(places), len(stack)))) - set(kept)):
                raise UnsupportedModelError(
                    f"what deepstack_visual_indexes={places} reads of a picture enters behind the blocks 0 to "
                    f"{len(places) - 1} of {stack.path}, so these have to stay; the plan takes {gone} out"
                )


def _cache_slots(stack: Stack) -> int:
    """Entries of the cache that a block uses: two in LongCat-Flash, whose blocks hold two attentions each."""
    total = getattr(stack.configs[0][0], "num_hidden_layers", None)
    return total // len(stack) if isinstance(total, int) and total % len(stack) == 0 else 1


def _renumber(block: nn.Module, old: int, new: int, slots: int, undo: Undo) -> None:
    """Tell every module of a block its new place; with several slots a block, its attentions count those."""
    for module in block.modules():
        for name, value in list(vars(module).items()):
            if not INDEX_ATTRIBUTE.match(name) or type(value) is not int:
                continue
            if value == old:
                undo.set(module, name, new)
            elif value // slots == old:
                undo.set(module, name, new * slots + value % slots)
