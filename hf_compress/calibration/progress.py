"""Bars that tell how far long work has come, and when it will be done, in terminals and in notebooks."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from tqdm.auto import tqdm

from hf_compress.calibration.processes import here

_Item = TypeVar("_Item")


def bar(items: Iterable[_Item], description: str) -> Iterable[_Item]:
    """Items that have a length, with a bar, which goes when they are done.

    It is shown on terminals and in notebooks, unless TQDM_DISABLE is set, and of several processes by the first.
    """
    return tqdm(items, desc=description, leave=False, disable=not shows_bars())


@contextmanager
def meter(total: int, description: str, unit: str) -> Iterator[Any]:
    """The same, to be moved on by `update(count)`."""
    with tqdm(total=total, desc=description, unit=unit, leave=False, disable=not shows_bars()) as shown:
        yield shown


def shows_bars() -> bool:
    """Whether bars are shown here."""
    if here()[0] or os.environ.get("TQDM_DISABLE", "0") not in ("", "0"):
        return False
    return sys.stderr.isatty() or _in_notebook()


def _in_notebook() -> bool:
    """Whether Python is the kernel of a notebook, whose standard error is no terminal but shows bars."""
    ipython = sys.modules.get("IPython")
    shell = None if ipython is None else ipython.get_ipython()
    return shell is not None and "IPKernelApp" in shell.config
