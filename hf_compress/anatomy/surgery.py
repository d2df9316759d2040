"""Taking blocks out of a live model so that its config, its cache and its masks agree with what is left."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from hf_compress.anatomy.kinds import INDEX_ATTRIBUTE
from hf_compress.anatomy.layout import cut_config
from hf_compress.anatomy.stacks import COUNT_NAMES, Stack
from hf_compress.anatomy.undo import Undo

# Attributes of modules that say with which block a run begins.
_RUN_STARTS = frozenset({"first_kv_shared_layer_idx"})


def remove_blocks(model: nn.Module, stack: Stack, removed: Sequence[int], undo: Undo) -> None:
    """Take the blocks with the indices `removed` out of `stack`.

    Cuts the ModuleList in place, renumbers the modules that know their own place or the stack's length, and cuts the
    config's per-block fields. What this cannot see (a position hidden in a number, a constant computed from the index) is for the parity
    check to find.

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
    for config, fields in stack.configs:
        cut_config(config, fields, length, kept, undo)
    blocks = [stack.blocks[i] for i in kept]
    undo.replace_children(stack.blocks, blocks)
    for new, (old, block) in enumerate(zip(kept, blocks, strict=True)):
        _renumber(block, old, new, undo)
    owner = model.get_submodule(stack.path.rpartition(".")[0])
    for module in owner.modules():
        for name in COUNT_NAMES & vars(module).keys():
            if vars(module)[name] == length:
                undo.set(module, name, len(kept))
        for name in _RUN_STARTS & vars(module).keys():
            undo.set(module, name, sum(i < vars(module)[name] for i in kept))


def _renumber(block: nn.Module, old: int, new: int, undo: Undo) -> None:
    """Tell every module of a block its new place."""
    for module in block.modules():
        for name, value in list(vars(module).items()):
            if INDEX_ATTRIBUTE.match(name) and type(value) is int and value == old:
                undo.set(module, name, new)
