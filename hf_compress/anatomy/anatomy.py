"""The anatomy of a model: its residual stacks, and the one that compression is about unless another is named."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from functools import cached_property

from torch import nn
from transformers import PreTrainedModel

from hf_compress.anatomy.kinds import block_kind
from hf_compress.anatomy.parts import BlockParts, block_parts, hidden_size
from hf_compress.anatomy.stacks import Stack, find_stacks


@dataclass(frozen=True, eq=False)
class Anatomy:
    """Where a model keeps its blocks. Made anew after every structural change."""

    model: PreTrainedModel

    @cached_property
    def stacks(self) -> list[Stack]:
        """Every residual stack, in the order of the model's modules."""
        return find_stacks(self.model)

    def stack(self, path: str | None = None) -> Stack:
        """The stack at `path`; without one, the stack of the text decoder, or else of the most parameters.

        Raises:
            UnsupportedModelError: the model has no stack that could be found.
            ValueError: no stack at that path.
        """
        if path is None:
            return max(self.stacks, key=self._weight)
        for stack in self.stacks:
            if path in (stack.path, stack.side):
                return stack
        raise ValueError(f"no residual stack {path!r}; this model has {', '.join(s.path for s in self.stacks)}")

    def _weight(self, stack: Stack) -> tuple[bool, bool, int]:
        """What makes a stack the primary one: the text model's, the decoder's, the larger, in this order."""
        text = self.model.config.get_text_config()
        is_text = any(config is text for config, _ in stack.configs)
        return is_text, stack.side == "decoder", sum(p.numel() for p in stack.blocks.parameters())

    def kinds(self, stack: Stack) -> list[Hashable]:
        """What tells the blocks of a stack apart; blocks of equal kind may be merged."""
        return [block_kind(stack, index) for index in range(len(stack))]

    def block(self, index: int, stack: str | None = None) -> Block:
        """A block of the stack at a path; see `stack`."""
        return Block(self.model, self.stack(stack), index)

    def parts(self, stack: Stack, index: int) -> BlockParts:
        """What a block is made of."""
        return Block(self.model, stack, index).parts


@dataclass(frozen=True)
class Block:
    """One block of a model, as it is at the moment.

    Raises:
        ValueError: its stack has no such block.
    """

    model: PreTrainedModel
    stack: Stack
    index: int

    def __post_init__(self) -> None:
        if not 0 <= self.index < len(self.stack):
            raise ValueError(f"{self.stack.path} has the blocks 0 to {len(self.stack) - 1}; got {self.index}")

    def __str__(self) -> str:
        return f"block {self.index} of {self.stack.path}"

    @property
    def module(self) -> nn.Module:
        return self.stack.blocks[self.index]

    @property
    def path(self) -> str:
        """Of its module in the model."""
        return f"{self.stack.path}.{self.index}"

    @property
    def parts(self) -> BlockParts:
        """What it is made of."""
        return block_parts(self.module, hidden_size(self.stack.configs[0][0]))
