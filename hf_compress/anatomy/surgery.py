"""Taking blocks out of a live model so that its config, its cache and its masks agree with what is left."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from transformers import PreTrainedModel

from hf_compress.anatomy.kinds import INDEX_ATTRIBUTE
from hf_compress.anatomy.layout import cut_config
from hf_compress.anatomy.stacks import COUNT_NAMES, Stack, find_stacks
from hf_compress.anatomy.undo import Undo
from hf_compress.errors import UnsupportedModelError

# Attributes of modules that say with which block a run begins.
_RUN_STARTS = frozenset({"first_kv_shared_layer_idx"})


def remove_blocks(model: PreTrainedModel, stack: Stack, removed: Sequence[int], undo: Undo) -> None:
    """Take the blocks with the indices `removed` out of `stack`.

    Cuts the ModuleList in place, renumbers the modules that know their own place or the stack's length, and cuts the
    config's per-block fields. What this cannot see (a position hidden in a number, a constant computed from the index)
    is for the parity check to find.

    Raises:
        ValueError: an index outside the stack, or no block left.
        UnsupportedModelError: the config cannot say what is left, and names the field.
    """
    length = len(stack)
    if bad := [i for i in removed if not 0 <= i < length]:
        raise ValueError(f"{stack.path} has the blocks 0 to {length - 1}; cannot remove {bad}")
    kept = [i for i in range(length) if i not in set(removed)]
    if not kept:
        raise ValueError(f"removing {len(removed)} of {length} blocks of {stack.path} leaves none; keep at least one")
    _refuse_shared_count(model, stack)
    slots = _cache_slots(stack)
    for config, fields in stack.configs:
        cut_config(config, fields, length, kept, undo)
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


def _refuse_shared_count(model: PreTrainedModel, stack: Stack) -> None:
    """One field that counts two stacks cannot say that only one of them was cut."""
    for other in find_stacks(model):
        for config, fields in other.configs:
            shared = [name for own, names in stack.configs if own is config for name in names if name in fields]
            if other.path != stack.path and shared:
                raise UnsupportedModelError(
                    f"the config field {shared[0]} counts the blocks of both {stack.path} and {other.path}"
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
