"""Where a model is compressed, within how much memory, and where what is finished is kept."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

import torch
from accelerate.utils import convert_file_size_to_int
from torch import nn
from transformers import PreTrainedModel

from hf_compress.anatomy.anatomy import Anatomy
from hf_compress.anatomy.dispatch import computing_device, is_offloaded
from hf_compress.anatomy.parts import is_linear, linear_widths
from hf_compress.anatomy.placement import computed_on
from hf_compress.anatomy.store import keep_changes_in
from hf_compress.calibration.memory import WorkingMemory, working_within
from hf_compress.calibration.workdir import CHANGED, STREAMS, own_name
from hf_compress.errors import MemoryBudgetError

_SQUARES = 6  # float32 matrices as wide as a linear map's inputs, at most, that solving for it takes at once


@dataclass(frozen=True)
class Compute:
    """Where a model is compressed, within how much memory, and where what is finished is kept.

    Attributes:
        device: where blocks run, such as "cuda", one at a time, while the model stays in the CPU's memory; where the
            model is when None.
        max_memory: bytes, or a string such as "6GiB": what each process may take beside a model in memory, or of an
            offloaded one with all that is read of it. Streams of calibration tokens beyond that lie in files, but those
            on a GPU stay there. When None, 4 GiB of streams and 4 GiB of sums.
        workdir: a folder for what is finished, from which a run that was killed goes on when it is started again, and
            for streams; nothing is kept when None. Weights of an offloaded model that have changed lie there too, so
            it has to stay until the model is saved.
    """

    device: str | torch.device | None = None
    max_memory: int | str | None = None
    workdir: str | PathLike[str] | None = None

    def __post_init__(self) -> None:
        if self.device is not None:
            try:
                torch.device(self.device)
            except (RuntimeError, TypeError) as error:
                raise ValueError(f'device must be a device of PyTorch, such as "cuda"; got {self.device!r}') from error
        if self.max_memory is not None and self.budget is None:
            raise ValueError(f'max_memory must be bytes, or a size such as "6GiB"; got {self.max_memory!r}')

    @property
    def budget(self) -> int | None:
        """`max_memory` in bytes; None where it is none, or no size."""
        try:
            size = int(convert_file_size_to_int(self.max_memory))
        except (ValueError, TypeError, AttributeError):
            return None
        return size if size > 0 else None

    @property
    def folder(self) -> Path | None:
        """`workdir` as a path."""
        return None if self.workdir is None else Path(self.workdir)

    @contextmanager
    def applied(self, model: PreTrainedModel) -> Iterator[None]:
        """Inside, a model is computed where, and within what, this says.

        Raises:
            MemoryBudgetError: that is too little.
            UnsupportedModelError: the model cannot be computed there.
        """
        elsewhere = self._elsewhere(model)
        with working_within(self.memory_for(model)), computed_on(model, elsewhere) if elsewhere else nullcontext():
            if self.folder is not None:
                (self.folder / STREAMS).mkdir(parents=True, exist_ok=True)
                if is_offloaded(model):
                    keep_changes_in(model, self.folder / CHANGED / own_name())
            yield

    def _elsewhere(self, model: PreTrainedModel) -> torch.device | None:
        """The device that is asked for, where a model is on another."""
        if self.device is None:
            return None
        asked, own = torch.device(self.device), computing_device(model)
        same = asked.type == own.type and (asked.type == "cpu" or asked.index in (None, own.index))
        return None if same else asked

    def memory_for(self, model: PreTrainedModel) -> WorkingMemory:
        """What streams and sums may take, of what is left by that which has to be there at once."""
        streams = None if self.folder is None else self.folder / STREAMS
        if self.budget is None:
            return WorkingMemory(folder=streams)
        moves = is_offloaded(model) or self._elsewhere(model) is not None
        block, rest, squares = least_memory(model)
        least = squares + (block + rest if moves else 0)
        if self.budget < least:
            told = f" with a block of {_gib(block)}, and {_gib(rest)} of what is around the blocks," if moves else ""
            raise MemoryBudgetError(
                f"max_memory={self.max_memory!r} is too little for {type(model).__name__}: solving for its widest "
                f"linear map{told} takes about {_gib(least)}; give at least that"
            )
        left = self.budget - least
        return WorkingMemory(left // 2, squares + left // 2, streams)


def least_memory(model: PreTrainedModel) -> tuple[int, int, int]:
    """Bytes of the largest block, of the largest part that is in no block, and of what solving takes at once."""
    blocks = [block for stack in Anatomy(model).stacks for block in stack.blocks]
    inside = {id(part) for block in blocks for part in block.modules()}
    others = [part for part in model.modules() if id(part) not in inside]
    widths = [linear_widths(part)[0] for block in blocks for part in block.modules() if is_linear(part)]
    around = max((_own_bytes(part) for part in others), default=0)
    return max(map(bytes_of, blocks)), around, _SQUARES * 4 * max(widths, default=0) ** 2


def bytes_of(module: nn.Module) -> int:
    """Of all parameters, wherever they are."""
    return sum(parameter.nbytes for parameter in module.parameters())


def _own_bytes(module: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in module.parameters(recurse=False))


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"
