"""What a run has finished, in a folder: one that was killed is begun again, and goes on behind it.

A method asks for each of its results by a name. What is in the folder already is read, and what is not is worked out
and written. So a run that is repeated does all that it did before, but what took the time; and as what it goes on with
is the same to the bit, so is where it ends.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from hf_compress.calibration.processes import from_one
from hf_compress.calibration.workdir import RESULTS, RUN, check_own
from hf_compress.errors import WorkdirError, one_line
from hf_compress.numerics.tensor_file import read_tensors, write_tensors
from hf_compress.plan.plan import PLAN_VERSION, Plan
from hf_compress.rewrite.edits import edits_from_list

Result = tuple[dict[str, Tensor], Any]  # tensors, and JSON values


@dataclass(frozen=True)
class Shared:
    """Results that several runs have in common, such as those of one method with more or less to take out.

    Attributes:
        folder: where they lie.
        identity: what these runs are known by.
        names: how the names of such results begin.
    """

    folder: Path
    identity: Mapping[str, Any]
    names: tuple[str, ...]


class Journal:
    """Keeps results by their names; none where it has no folder. Of several processes the first reads and writes.

    Args:
        folder: made where it is missing.
        identity: what the run is known by, JSON values: its model, settings, data and versions.
        shared: results that are looked for, and kept, where other runs find them too.

    Raises:
        WorkdirError: the folder is another run's, or holds something else; or it cannot be written.
    """

    def __init__(
        self, folder: Path | None = None, identity: Mapping[str, Any] | None = None, shared: Shared | None = None
    ) -> None:
        self.folder, self.shared = folder, shared
        self._asked: set[str] = set()
        if folder is not None:
            from_one(partial(_open, folder, json.loads(json.dumps(identity or {}))))
        if shared is not None:
            from_one(partial(_open, shared.folder, json.loads(json.dumps(shared.identity))))

    def has(self, name: str) -> bool:
        """Whether a result is there from an earlier run."""
        return self.folder is not None and from_one(self._path(self.folder, name).exists)

    def plan(self, name: str, make: Callable[[], Plan]) -> Plan:
        """A plan, tensors and notes included."""

        def pack() -> Result:
            plan = make()
            return plan.tensors, {"edits": plan.to_list(), "notes": plan.notes}

        if self.folder is None:
            return make()
        tensors, facts = self.result(name, pack)
        return Plan(edits_from_list(PLAN_VERSION, facts["edits"]), tensors, facts["notes"])

    def tensors(self, name: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """Tensors by names."""
        return self.result(name, lambda: (make(), None))[0]

    def facts(self, name: str, make: Callable[[], Any]) -> Any:
        """JSON values."""
        return self.result(name, lambda: ({}, make()))[1]

    def result(self, name: str, make: Callable[[], Result]) -> Result:
        """Tensors by names, and JSON values."""
        if self.folder is None:
            return make()
        assert name not in self._asked, f"two results are called {name!r}"
        self._asked.add(name)
        path = self._path(self.folder, name)
        if not from_one(path.exists):
            made = make()
            from_one(partial(_write, path, *made))
        return from_one(partial(_read, path))  # in either case the same

    def _path(self, folder: Path, name: str) -> Path:
        if self.shared is not None and name.startswith(self.shared.names):
            folder = self.shared.folder
        return folder / RESULTS / f"{re.sub('[^0-9A-Za-z_.]+', '-', name)}.safetensors"


def _write(path: Path, tensors: Mapping[str, Tensor], facts: Any) -> None:
    try:
        write_tensors(path, tensors, facts)
    except OSError as error:
        raise WorkdirError(
            f"{path} cannot be written ({one_line(error)}): make room, and start the run again; it goes on from what "
            "is there"
        ) from error


def _read(path: Path) -> Result:
    try:
        facts, tensors = read_tensors(path)
    except (OSError, SafetensorError, ValueError) as error:
        raise WorkdirError(f"{path} cannot be read ({one_line(error)}): delete it, and it is made again") from error
    return tensors, facts


def _open(folder: Path, identity: dict[str, Any]) -> None:
    """Make the folder of a run, or see that it is of this one."""
    path = folder / RUN
    check_own(folder)
    try:
        (folder / RESULTS).mkdir(parents=True, exist_ok=True)
        if not path.exists():
            write_tensors(path, {}, identity)
    except OSError as error:
        raise WorkdirError(f"{folder} cannot be written ({one_line(error)}): give another workdir=") from error
    _, before = _read(path)
    if told := list(_differences(before, identity)):
        raise WorkdirError(f"{folder} is of another run: {'; '.join(told)}. Give another folder, or delete this one")


def _differences(before: Any, now: Any, name: str = "") -> Iterator[str]:
    """What tells two runs apart, entry by entry."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in {**before, **now}:
            yield from _differences(before.get(key), now.get(key), f"{name}: {key}" if name else key)
    elif before != now:
        yield f"{name} was {_short(before)} and is {_short(now)}"


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 100 else f"{text[:100]}…"
