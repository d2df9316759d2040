"""The folder that a run keeps its work in: what lies there, who works there, and how it is emptied."""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from socket import gethostname

from hf_compress.errors import WorkdirError, one_line

RUN = "run.safetensors"  # what a run is known by, as facts of a file without tensors
RESULTS, STREAMS, CHANGED, OFFLOADED = "results", "streams", "changed", "offloaded"  # folders in it
_LOCK = "lock"
_STAGE = re.compile(r"\d+-[a-z_]+")  # the folder of a stage among several
MADE = "made.json"  # the recipe whose model has been saved
_OWN = (RUN, _LOCK, MADE, "fitting.safetensors", RESULTS, STREAMS, CHANGED, OFFLOADED)


def _half_written(path: Path) -> bool:
    """Whether a file is what a run that was killed had not yet given its name."""
    return path.suffix == ".partial" or path.name.startswith(".tmp")


def stage_folder(folder: Path, number: int, method: str) -> Path:
    """Where one of several stages keeps its work."""
    return folder / f"{number}-{method}"


def _is_stage(path: Path) -> bool:
    """Whether a path is the folder of a stage, and not another of such a name."""
    if not path.is_dir() or not _STAGE.fullmatch(path.name):
        return False
    return (path / RUN).is_file() or all(part.name in _OWN for part in path.iterdir())


def check_own(folder: Path) -> None:
    """Raise WorkdirError where a folder holds what no run has left there."""
    if not folder.is_dir() or (folder / RUN).is_file():
        return
    for path in sorted(folder.iterdir()):
        begun = path.name in _OWN and not (path.is_dir() and path.name == RESULTS and any(path.iterdir()))
        if not begun and not _half_written(path) and not _is_stage(path):
            raise WorkdirError(
                f"{folder} holds {path.name}, and is no folder of a run: give an empty one, or a new one"
            )


def empty(folder: Path) -> None:
    """Delete what a run has made in its folder, and the folder, unless there is something else in it."""
    if not folder.is_dir():
        return
    for path in folder.iterdir():
        if _is_stage(path):
            empty(path)
        if path.name not in _OWN and not _half_written(path):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    with suppress(OSError):
        folder.rmdir()


@contextmanager
def worked_in(folder: Path) -> Iterator[None]:
    """Inside, no other run works in a folder; what killed ones had not finished there is deleted.

    Raises:
        WorkdirError: another run does, the folder is none of a run's, or nothing can be written there.
    """
    check_own(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / _LOCK).open("w") as lock:
            if not _locked(lock.fileno()):
                raise WorkdirError(f"another run works in {folder}: wait for its end, or give another workdir=")
            _sweep_out(folder)
            yield
    except OSError as error:
        if not _of(folder, error):
            raise
        raise WorkdirError(f"{folder} cannot be written ({one_line(error)}): give another workdir=") from error


def _of(folder: Path, error: OSError) -> bool:
    """Whether an error is about the folder itself, or its lock."""
    return error.filename in (str(folder), str(folder / _LOCK), *map(str, folder.parents))


def _locked(file: int) -> bool:
    """Lock a file until it is closed, where the system can; not if another process has it."""
    if sys.platform == "win32":
        return True
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        pass
    return True


def _sweep_out(folder: Path) -> None:
    """Delete what runs that were killed have left behind, but for their results."""
    for path in (*folder.glob("*"), *(folder / RESULTS).glob("*")):
        if path.is_file() and _half_written(path):
            path.unlink(missing_ok=True)
    for path in (*(folder / STREAMS).glob("*"), *(folder / CHANGED).glob("*")):
        if path.is_file():
            path.unlink(missing_ok=True)
        elif not _runs(path.name):
            shutil.rmtree(path, ignore_errors=True)


def own_name() -> str:
    """What a process calls its folder of changed weights."""
    return f"{gethostname()}-{os.getpid()}"


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


def check_room(folder: Path, needed: int) -> None:
    """Raise WorkdirError where a folder has no room for so many bytes, those of the run that are there counted."""
    there = sum(_size(path) for path in folder.rglob("*"))
    free = shutil.disk_usage(folder).free
    if free + there < needed:
        raise WorkdirError(
            f"{folder} has {free / 1e9:.2f} GB left, and what is finished may take {needed / 1e9:.2f} GB: make room, "
            "or give another workdir="
        )


def _size(path: Path) -> int:
    try:
        return path.stat().st_size if path.is_file() else 0
    except OSError:  # it has just gone
        return 0
