"""Which blocks are alike: only like blocks may be merged, since a merged block has to be one or the other."""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterator

from torch import nn

from hf_compress.anatomy.layout import per_block_fields
from hf_compress.anatomy.stacks import Stack

# Attributes that say where in the stack a module stands. BigBird seeds the attention pattern of a block with its index.
INDEX_ATTRIBUTE = re.compile(r"^((layer|block)_?(idx|id|index|number|num|i)|seed)$")


def block_kind(stack: Stack, index: int) -> Hashable:
    """What tells a block from another of the same stack, save its weights and its place.

    Class and parameter shapes, flags and words set on its modules (a sliding window, a rotary embedding left out), and
    the block's entries in the config's per-block lists.
    """
    block = stack.blocks[index]
    shapes = tuple((name, tuple(p.shape)) for name, p in block.named_parameters())
    entries = tuple(
        (name, repr(vars(config)[name][index]))
        for config, _ in stack.configs
        for name in per_block_fields(config, len(stack))
    )
    classes = tuple(type(module).__qualname__ for module in block.modules())
    return classes, shapes, tuple(_flags(block)), entries


def _flags(block: nn.Module) -> Iterator[tuple[str, str, object]]:
    for path, module in block.named_modules():
        for name, value in vars(module).items():
            if name in ("training",) or INDEX_ATTRIBUTE.match(name):
                continue
            if isinstance(value, (bool, str)):
                yield path, name, value
