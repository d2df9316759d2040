"""Edits: the single changes that a plan is made of, as plain data that checks itself.

Edits of stacks take blocks out; afterwards the model's config says so. Edits of modules, in `rewrite.edits`, name the
modules that they change by their paths, so that what a saved plan means does not hang on how parts of a model are
found. They are kept in the saved config wherever it cannot say by itself what the model has become.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass, fields, replace
from itertools import chain
from typing import Any, ClassVar, Self

from hf_compress.errors import PlanError

EDITS: dict[str, type[Edit]] = {}
_PATH = re.compile(r"\w{1,100}(\.\w{1,100}){0,20}", re.ASCII)
_MAX_SIZE = 2**31
_MAX_PATHS = 4  # projections into one FFN

Path = str  # of a module in the model
Paths = tuple[str, ...]


@dataclass(frozen=True)
class Edit:
    """One structural change."""

    def __init_subclass__(cls, abstract: bool = False) -> None:
        if cls.__name__ in EDITS:
            raise TypeError(f"there is an edit called {cls.__name__} already")
        if not abstract:
            EDITS[cls.__name__] = cls

    def to_dict(self) -> dict[str, Any]:
        """JSON values, with the edit's name under "edit"."""
        return {"edit": type(self).__name__, **asdict(self)}

    def describe(self) -> str:
        """What it does, in a few words for the model card."""
        raise NotImplementedError


@dataclass(frozen=True)
class StackEdit(Edit, abstract=True):
    """A change to the blocks of a stack. `stack` is the path of its ModuleList, such as "model.layers"."""

    stack: str
    removed_field: ClassVar[str] = "blocks"

    def __post_init__(self) -> None:
        _check_path("stack", self.stack)

    def removed_blocks(self) -> tuple[int, ...]:
        """Indices of the blocks that are gone afterwards, counted in the model before the plan."""
        removed: tuple[int, ...] = getattr(self, self.removed_field)
        return removed

    def stand_in(self) -> int | None:
        """The block that stands for those that are gone; None where they are left out."""
        return None

    def taking(self, more: Collection[int]) -> Self:
        """The same edit, with more blocks gone."""
        changes: dict[str, Any] = {self.removed_field: tuple({*self.removed_blocks(), *more})}
        return replace(self, **changes)

    def renumbered(self, number: Callable[[int], int]) -> Self:
        """The same edit in a model whose blocks have other numbers."""
        changes: dict[str, Any] = {self.removed_field: tuple(map(number, self.removed_blocks()))}
        return replace(self, **changes)


@dataclass(frozen=True)
class RemoveBlocks(StackEdit):
    """The blocks at `blocks` are left out."""

    blocks: tuple[int, ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "blocks", _block_indices("blocks", self.blocks))

    def describe(self) -> str:
        return f"left out: {', '.join(runs(self.blocks))}"


@dataclass(frozen=True)
class MergeBlocks(StackEdit):
    """The blocks `absorbed` are gone and the block `kept` stands for them and itself; its tensors are in the plan."""

    kept: int
    absorbed: tuple[int, ...]
    removed_field: ClassVar = "absorbed"

    def __post_init__(self) -> None:
        super().__post_init__()
        _block_indices("kept", (self.kept,))
        object.__setattr__(self, "absorbed", _block_indices("absorbed", self.absorbed))
        if self.kept in self.absorbed:
            raise PlanError(f"block {self.kept} is both kept and absorbed; a block can be only one of them")

    def stand_in(self) -> int:
        return self.kept

    def renumbered(self, number: Callable[[int], int]) -> Self:
        return replace(self, kept=number(self.kept), absorbed=tuple(map(number, self.absorbed)))

    def describe(self) -> str:
        return f"block {self.kept} stands for blocks {', '.join(runs(sorted((self.kept, *self.absorbed))))}"


@dataclass(frozen=True)
class ModuleEdit(Edit, abstract=True):
    """A change to single modules, named by their paths in the model.

    Fields are checked by their types: a `Path`, `Paths`, an int, which is a size, or a bool. What else there is to
    check is the edit's own affair.

    Attributes:
        leaves: what there is afterwards, where methods find no linear map or FFN any longer.
        replaces_ffn: whether that stands for an FFN, and nothing is left of what it was before.
    """

    leaves: ClassVar[str] = ""
    replaces_ffn: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for field in fields(self):
            value, (kind, *optional) = getattr(self, field.name), str(field.type).split(" | ")
            if kind in _CHECKS and not (optional and value is None):
                _CHECKS[kind](field.name, value)
            if kind == "Paths":
                object.__setattr__(self, field.name, tuple(value))

    def _located(self) -> dict[str, tuple[str, ...]]:
        """The paths that each field has."""
        values = {one.name: getattr(self, one.name) for one in fields(self) if str(one.type).startswith("Path")}
        return {name: value if isinstance(value, tuple) else (value,) for name, value in values.items() if value}

    @property
    def paths(self) -> tuple[str, ...]:
        """Every module path that the edit names."""
        return tuple(chain.from_iterable(self._located().values()))

    def moved(self, rename: Callable[[str], str]) -> Self:
        """The same edit in a model whose modules have other paths."""
        changes: dict[str, Any] = {name: tuple(map(rename, paths)) for name, paths in self._located().items()}
        return replace(self, **{n: v if isinstance(getattr(self, n), tuple) else v[0] for n, v in changes.items()})

    def restructure(self, site: Any) -> None:
        """Change the modules; their new tensors are on the meta device.

        Args:
            site: the model, a `rewrite.site.Site`.

        Raises:
            PlanError: the model has no such modules, they are of another kind or shared, or sizes do not fit.
        """
        raise NotImplementedError


def _check_path(name: str, value: Any) -> None:
    if not isinstance(value, str) or not _PATH.fullmatch(value):
        raise PlanError(f'{name} must be the path of a module, such as "model.layers.0"; got {short(value)}')


def _check_paths(name: str, values: Any) -> None:
    if not isinstance(values, (list, tuple)) or not 1 <= len(values) <= _MAX_PATHS:
        raise PlanError(f"{name} must be a list of 1 to {_MAX_PATHS} paths of modules; got {short(values)}")
    for path in values:
        _check_path(name, path)


def check_size(name: str, value: Any) -> None:
    if type(value) is not int or not 1 <= value < _MAX_SIZE:
        raise PlanError(f"{name} must be a positive whole number; got {short(value)}")


def _check_bool(name: str, value: Any) -> None:
    if type(value) is not bool:
        raise PlanError(f"{name} must be true or false; got {short(value)}")


_CHECKS = {"Path": _check_path, "Paths": _check_paths, "int": check_size, "bool": _check_bool}


def _block_indices(name: str, values: Any) -> tuple[int, ...]:
    """`values` as a sorted tuple of distinct, non-negative block indices, or PlanError."""
    try:
        indices = tuple(sorted(values))
    except TypeError:
        raise PlanError(f"{name} must be a list of block indices; got {short(values)}") from None
    if not indices or any(type(i) is not int or i < 0 for i in indices) or len(set(indices)) != len(indices):
        raise PlanError(f"{name} must be distinct block indices counted from 0, at least one; got {short(values)}")
    return indices


def runs(numbers: Sequence[int]) -> list[str]:
    """3, 4, 5, 9 as 3–5 and 9."""
    found: list[list[int]] = []
    for number in numbers:
        if found and number == found[-1][-1] + 1:
            found[-1].append(number)
        else:
            found.append([number])
    return [str(run[0]) if len(run) == 1 else f"{run[0]}–{run[-1]}" for run in found]


def short(value: Any) -> str:
    """What was given, cut to what fits a message."""
    return short_text(repr(value))


def short_text(text: str) -> str:
    return text if len(text) <= 200 else f"{text[:200]}…"
