"""Runs that are interrupted behind each result that they keep, and begun again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hf_compress.methods.base import journal


class Interrupted(Exception):
    """What a run is stopped by."""


def interrupt_behind_results(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """From now on every result that is written stops its run; gives what tells how many there were so far."""
    write, results = journal.write_tensors, 0

    def once(path: Path, *content: Any) -> None:
        nonlocal results
        write(path, *content)
        if path.parent.name == "results":
            results += 1
            raise Interrupted

    monkeypatch.setattr(journal, "write_tensors", once)
    return lambda: results
