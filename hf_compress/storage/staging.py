"""Where a save is built, and the one step that puts it in its place: killed at any instant, a save leaves no mixture.

A stage is a hidden folder `.NAME.hf_compress-RANDOM` beside the target, on the same disk, and never a model itself:

- `owner` is locked while the process that made it lives;
- `new/` is what is being saved;
- `old/` is what was at the target, where the system cannot exchange two folders in one step.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import socket
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

if sys.platform != "win32":
    import fcntl

_OWNER, _NEW, _OLD = "owner", "new", "old"
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # from Linux's fcntl.h and fs.h


def check_writable(folder: Path) -> None:
    """Raise OSError where a folder, which need not be there yet, cannot be written to."""
    there = next(path for path in (folder.resolve(), *folder.resolve().parents) if path.exists())
    try:
        with tempfile.TemporaryDirectory(dir=there):
            pass
    except OSError as error:
        raise type(error)(f"nothing can be written to {folder}: {error.strerror} ({there})") from error


@contextmanager
def stage(target: Path) -> Iterator[Path]:
    """An empty folder to build in what shall be at `target`; what is left of it is deleted at the end.

    What killed saves to the same target left behind is deleted too.
    """
    _remove_leftovers(target)
    folder = Path(tempfile.mkdtemp(prefix=_prefix(target), dir=target.parent))
    with (folder / _OWNER).open("w") as owner:
        try:
            if _lock(owner, wait=True):
                owner.write(socket.gethostname())
                owner.flush()
            (folder / _NEW).mkdir()
            yield folder / _NEW
        finally:
            _remove(folder, target)
            _remove_leftovers(target)


def put_in_place(new: Path, target: Path, overwrite: bool) -> None:
    """Make the folder `new`, of a stage, the one at `target`, in one step where the system has it.

    Everything is on the disk before, so that a power cut finds no empty files under good names.

    Raises:
        OSError: it could not be done, and the target is as it was; also where something has come to be at the target
            that was not there before, and `overwrite` is false.
    """
    for path in (*new.rglob("*"), new):
        _flush(path)
    if not overwrite:
        with suppress(FileNotFoundError):
            target.rmdir()  # only an empty folder lets itself be removed
    if not target.exists():
        new.rename(target)
    elif not _exchange(new, target):
        _put_aside_and_rename(new, target, new.with_name(_OLD))
    _flush(target.parent)


def _exchange(first: Path, second: Path) -> bool:
    """Swap two paths in one step; false where that cannot be done: off Linux, and on a few of its filesystems."""
    if sys.platform != "linux":
        return False
    renameat2: Any = getattr(ctypes.CDLL(None), "renameat2", None)
    if renameat2 is None:
        return False
    return renameat2(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE) == 0


def _put_aside_and_rename(new: Path, target: Path, old: Path) -> None:
    """Two renamings; a process killed between them leaves nothing at the target, and what was there in the stage."""
    target.rename(old)
    try:
        new.rename(target)
    except BaseException:
        old.rename(target)
        raise


def _remove_leftovers(target: Path) -> None:
    """Delete the stages of killed saves to `target`: those whose owner, on this computer, holds the lock no more."""
    name = re.compile(re.escape(_prefix(target)) + r"\w{8}")
    for folder in target.parent.iterdir():
        if not name.fullmatch(folder.name) or folder.is_symlink():
            continue
        with suppress(OSError), (folder / _OWNER).open("r+") as owner:
            if _lock(owner, wait=False) and owner.read() == socket.gethostname():
                _remove(folder, target)


def _remove(folder: Path, target: Path) -> None:
    """Delete a stage, unless it has the only copy of what was at the target, which waits for a save that succeeds."""
    if (folder / _OLD).exists() and not target.exists():
        return
    for name in (_NEW, _OLD):
        shutil.rmtree(folder / name, ignore_errors=True)
    shutil.rmtree(folder, ignore_errors=True)  # the owner's file last, by which the rest is known if this is killed


def _prefix(target: Path) -> str:
    return f".{target.name}.hf_compress-"


def _lock(file: IO[str], wait: bool) -> bool:
    """Whether this process now has the lock on an open file. The system takes it back when the process ends, however.

    A process number would not do: another container on the same disk counts its own.
    """
    if sys.platform == "win32":
        return False  # stages of killed saves then stay
    try:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # another process has it, or this filesystem has no locks
        return False
    return True


def _flush(path: Path) -> None:
    """Have a file's content, or a folder's entries, written to the disk."""
    if sys.platform == "win32":
        return  # has no such call for folders
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        if not path.is_dir():  # some network filesystems do not know it of folders
            raise
    finally:
        os.close(descriptor)
