"""Where a command keeps what it has finished, and what it may take."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated

import typer

from hf_compress.cli.output import errors, is_first, rank

if TYPE_CHECKING:
    from hf_compress.calibration.compute import Compute


MaxMemory = Annotated[
    str | None,
    typer.Option(
        help="Such as 6GiB: what may be taken on the device that computes. The model stays on the disk then, or, with "
        "another device than cpu, in the CPU's memory; blocks come one by one.",
        show_default=False,
    ),
]
Workdir = Annotated[
    Path | None, typer.Option(help="Keeps what is finished until the end.", show_default="OUTPUT.partial")
]
Resume = Annotated[bool, typer.Option(help="Go on from what a run that was killed has left there.")]
_PATIENCE = timedelta(days=1)  # with a process that saves or solves while the others wait


@contextmanager
def with_others(device: str | None) -> Iterator[str | None]:
    """Inside, this process works with the others that torchrun has started, on the device that this gives."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield device
        return
    import torch.distributed as dist
    from accelerate import PartialState

    state = PartialState(cpu=device == "cpu", timeout=_PATIENCE)
    try:
        yield device or str(state.device)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


@dataclass(frozen=True)
class WorkFolder:
    """A folder that keeps what a run has finished, until the model is saved.

    Attributes:
        path: None where nothing is kept.
        new: whether there was nothing at that path.
    """

    path: Path | None
    new: bool = False

    @staticmethod
    def of(output: Path | None, workdir: Path | None, resume: bool) -> WorkFolder:
        """The one that was named, or else that beside the output.

        Raises:
            FileExistsError: an earlier run has left something there, and nobody said that this one goes on from it.
        """
        path = workdir or (None if output is None else output.with_name(f"{output.name}.partial"))
        if path is not None and output is not None and _inside(path, output):
            raise ValueError(f"--workdir {path} and --output {output} lie one in the other: give separate folders")
        if is_first() and path is not None and not resume and path.is_dir() and any(path.iterdir()):
            raise FileExistsError(
                f"{path} has what an earlier run has finished: give --resume to go on from there, or delete it"
            )
        return WorkFolder(path, new=path is not None and not path.exists())

    @contextmanager
    def opened(self) -> Iterator[Path]:
        """Inside, there is a folder for weights that the disk has in another form than they are used in.

        An interruption is told how to go on; a folder in which nothing was finished goes with a failure.
        """
        try:
            if self.path is not None:
                yield self.path / "offloaded" / str(rank())
                return
            with TemporaryDirectory(prefix="hf_compress-") as folder:
                yield Path(folder)
        except KeyboardInterrupt:
            if self.path is not None and self.path.is_dir():
                told = f"\nWhat is finished is kept in {self.path}: the same command with --resume goes on."
                errors().print(told, soft_wrap=True)
            raise
        except Exception:
            if self.new and self.path is not None and not any(self.path.rglob("results/*")):
                self.delete()
            raise

    def delete(self) -> None:
        """Delete what was kept, which is in the model that was saved, and the folder if nothing else is in it."""
        from hf_compress.calibration.workdir import empty

        if self.path is not None and is_first():
            empty(self.path)


def _inside(first: Path, second: Path) -> bool:
    """Whether one of two paths leads into the other, or both to the same."""
    one, other = first.resolve(), second.resolve()
    return one == other or one in other.parents or other in one.parents


def where(device: str | None, max_memory: str | None, workdir: Path | None) -> tuple[str | None, Compute]:
    """Where a model is to be loaded, and how it is computed from there: within a budget, a block at a time.

    On the CPU it is then left on the disk; for another device it is in the CPU's memory.
    """
    from hf_compress.calibration.compute import Compute

    if max_memory is None:
        return device, Compute(workdir=workdir)
    if device in (None, "cpu"):
        return "disk", Compute(max_memory=max_memory, workdir=workdir)
    return "cpu", Compute(device, max_memory, workdir)
