"""Where a model is compressed, within how much memory, and where what is finished is kept."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from socket import gethostname

import torch
from accelerate.utils import convert_file_size_to_int
from torch import nn
from transformers import PreTrainedModel

from hf_compress.anatomy.anatomy import Anatomy
from hf_compress.anatomy.dispatch import is_offloaded
from hf_compress.anatomy.parts import is_linear, linear_widths
from hf_compress.anatomy.placement import computed_on
from hf_compress.anatomy.store import keep_changes_in
from hf_compress.calibration.memory import WorkingMemory, working_within
from hf_compress.errors import MemoryBudgetError, WorkdirError, one_line

_STREAMS, _CHANGED = "streams", "changed"  # folders in a workdir
_SQUARES = 6  # float32 matrices as wide as a linear map's inputs, at most, that solving for it takes at once


@dataclass(frozen=True)
class Compute:
    """Where a model is compressed, within how much memory, and where what is finished is kept.

    Attributes:
        device: where blocks run, such as "cuda", one at a time, while the model stays in the CPU's memory; where the
            model is when None.
        max_memory: bytes, or a string such as "6GiB": what may be taken beside a model in memory, or of an offloaded
            one with all that is read of it. Streams of calibration tokens beyond that lie in files. 4 GiB of streams
            and 4 GiB of sums when None.
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
        memory = self.memory_for(model)
        if self.folder is not None:
            self._make_folders(self.folder, model)
        with working_within(memory):
            if self.device is None or torch.device(self.device) == model.device:
                yield
                return
            with computed_on(model, torch.device(self.device)):
                yield

    def _make_folders(self, folder: Path, model: PreTrainedModel) -> None:
        """Folders for streams and for changed weights, without what runs that were killed have left there."""
        needed = sum(bytes_of(block) for stack in Anatomy(model).stacks for block in stack.blocks)
        if is_offloaded(model):
            needed *= 2  # what is finished is kept as well as what the model reads
        own = f"{gethostname()}-{os.getpid()}"
        try:
            for name in (_STREAMS, _CHANGED):
                (folder / name).mkdir(exist_ok=True)
            for left in (folder / _CHANGED).iterdir():
                if left.name != own and not _runs(left.name):
                    shutil.rmtree(left)
            there = sum(one.stat().st_size for one in folder.rglob("*") if one.is_file())
            free = shutil.disk_usage(folder).free
        except OSError as error:
            raise WorkdirError(f"{folder} cannot be written ({one_line(error)}): give another workdir=") from error
        if free + there < needed:
            raise WorkdirError(
                f"{folder} has {_gib(free)} left, and what is finished may take {_gib(needed)}: make room, or give "
                "another workdir="
            )
        if is_offloaded(model):
            keep_changes_in(model, folder / _CHANGED / own)

    def memory_for(self, model: PreTrainedModel) -> WorkingMemory:
        """What streams and sums may take, of what is left by that which has to be there at once."""
        streams = None if self.folder is None else self.folder / _STREAMS
        if self.budget is None:
            return WorkingMemory(folder=streams)
        moves = is_offloaded(model) or self.device is not None
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


def _runs(name: str) -> bool:
    """Whether the process that a folder is named after is still there; so it is taken to be on another machine."""
    host, _, number = name.rpartition("-")
    if host != gethostname() or not number.isdecimal():
        return True
    try:
        os.kill(int(number), 0)
    except ProcessLookupError:
        return False
    except OSError:  # it is somebody else's
        pass
    return True


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"
