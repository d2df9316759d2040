"""Edits: the single changes that a plan is made of, as plain data that checks itself.

Edits of stacks take blocks out; afterwards the model's config says so. Edits of modules name the modules that they
change by their paths, so that what a saved plan means does not hang on how parts of a model are found. They are kept in
the saved config wherever it cannot say by itself what the model has become.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, ClassVar, Self

from hf_compress.errors import PlanError
from hf_compress.modules.activation import BLENDS, Blend
from hf_compress.modules.bottleneck import Form, Norm, Select
from hf_compress.modules.packed import MAX_BITS

_EDITS: dict[str, type[Edit]] = {}
_PATH = re.compile(r"\w{1,100}(\.\w{1,100}){0,20}", re.ASCII)
_MAX_SIZE = 2**31
_MAX_PATHS = 4  # projections into one FFN


@dataclass(frozen=True)
class Edit:
    """One structural change."""

    def __init_subclass__(cls, abstract: bool = False) -> None:
        if cls.__name__ in _EDITS:
            raise TypeError(f"there is an edit called {cls.__name__} already")
        if not abstract:
            _EDITS[cls.__name__] = cls

    def to_dict(self) -> dict[str, Any]:
        """JSON values, with the edit's name under "edit"."""
        return {"edit": type(self).__name__, **asdict(self)}


@dataclass(frozen=True)
class StackEdit(Edit, abstract=True):
    """A change to the blocks of a stack. `stack` is the path of its ModuleList, such as "model.layers"."""

    stack: str

    def __post_init__(self) -> None:
        _check_path("stack", self.stack)

    def removed_blocks(self) -> tuple[int, ...]:
        """Indices of the blocks that are gone afterwards, counted in the model before the plan."""
        raise NotImplementedError


@dataclass(frozen=True)
class RemoveBlocks(StackEdit):
    """The blocks at `blocks` are left out."""

    blocks: tuple[int, ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "blocks", _block_indices("blocks", self.blocks))

    def removed_blocks(self) -> tuple[int, ...]:
        return self.blocks


@dataclass(frozen=True)
class MergeBlocks(StackEdit):
    """The blocks `absorbed` are gone and the block `kept` stands for them and itself; its tensors are in the plan."""

    kept: int
    absorbed: tuple[int, ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        _block_indices("kept", (self.kept,))
        object.__setattr__(self, "absorbed", _block_indices("absorbed", self.absorbed))
        if self.kept in self.absorbed:
            raise PlanError(f"block {self.kept} is both kept and absorbed; a block can be only one of them")

    def removed_blocks(self) -> tuple[int, ...]:
        return self.absorbed


@dataclass(frozen=True)
class ModuleEdit(Edit, abstract=True):
    """A change to single modules, named by their paths in the model."""

    path_fields: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        several = {field.name for field in fields(self) if str(field.type).startswith("tuple")}
        for name in self.path_fields:
            value = getattr(self, name)
            if value is None and getattr(type(self), name, ...) is None:
                continue  # it may be left out
            if name in several and not (isinstance(value, (list, tuple)) and 1 <= len(value) <= _MAX_PATHS):
                raise PlanError(f"{name} must be a list of 1 to {_MAX_PATHS} paths of modules; got {_short(value)}")
            for path in value if name in several else (value,):
                _check_path(name, path)
            if name in several:
                object.__setattr__(self, name, tuple(value))

    @property
    def paths(self) -> tuple[str, ...]:
        """Every module path that the edit names."""
        values = [getattr(self, name) for name in self.path_fields]
        return tuple(path for value in values for path in (value if isinstance(value, tuple) else (value,)) if path)

    def moved(self, rename: Callable[[str], str]) -> Self:
        """The same edit in a model whose modules have other paths."""
        changes: dict[str, Any] = {}
        for name in self.path_fields:
            value = getattr(self, name)
            if value is not None:
                changes[name] = tuple(rename(path) for path in value) if isinstance(value, tuple) else rename(value)
        return replace(self, **changes)


@dataclass(frozen=True)
class NarrowFFN(ModuleEdit):
    """An FFN has fewer hidden units.

    Attributes:
        inputs: the projections from the residual stream to the hidden units: up, or gate and up, or both in one.
        output: the projection back.
        width: hidden units left.
        bias: whether the output projection gets a bias that it did not have.
    """

    inputs: tuple[str, ...]
    output: str
    width: int
    bias: bool = False
    path_fields: ClassVar = ("inputs", "output")

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_size("width", self.width)
        _check_bool("bias", self.bias)


@dataclass(frozen=True)
class NarrowAttention(ModuleEdit):
    """An attention has fewer heads.

    Attributes:
        query, key, value, output: its projections.
        heads: query heads left.
        groups: key and value heads left.
        width: of one head, which stays.
    """

    query: str
    key: str
    value: str
    output: str
    heads: int
    groups: int
    width: int
    path_fields: ClassVar = ("query", "key", "value", "output")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("heads", "groups", "width"):
            _check_size(name, getattr(self, name))
        if self.heads % self.groups:
            raise PlanError(f"heads must be a multiple of groups; got {self.heads} and {self.groups}")


@dataclass(frozen=True)
class NarrowExperts(ModuleEdit):
    """Every expert of a mixture has fewer hidden units: `width` are left. `experts` holds their tensors."""

    experts: str
    width: int
    path_fields: ClassVar = ("experts",)

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_size("width", self.width)


@dataclass(frozen=True)
class SplitExperts(ModuleEdit):
    """Every expert of a mixture has linear maps of its own; see `SeparateExperts`. `experts` held their tensors."""

    experts: str
    path_fields: ClassVar = ("experts",)


@dataclass(frozen=True)
class LinearFFN(ModuleEdit):
    """An FFN is one linear map.

    Attributes:
        inputs, output: as for `NarrowFFN`. What is left goes by the name of the output projection and, with a rank, of
            the last input projection.
        rank: of the map, which is then the product of two; full when None.
        bias: whether the map has a bias.
        activation: of the FFN; needed where it stands in the block itself, beside other parts.
    """

    inputs: tuple[str, ...]
    output: str
    rank: int | None = None
    bias: bool = True
    activation: str | None = None
    path_fields: ClassVar = ("inputs", "output", "activation")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank is not None:
            _check_size("rank", self.rank)
        _check_bool("bias", self.bias)


@dataclass(frozen=True)
class InsertBottleneck(ModuleEdit):
    """What comes out of a block passes through a `Bottleneck` of `width` features; see `Form` for the other fields.

    One that is gated, as while it is trained, gives place to a later one.
    """

    block: str
    hidden: int
    width: int
    skip: float = 0.1
    norm: Norm = "kept"
    select: Select = "all"
    active: int | None = None
    gated: bool = False
    path_fields: ClassVar = ("block",)

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_size("hidden", self.hidden)
        _check_size("width", self.width)
        try:
            selects = self.form.select != "all"
        except ValueError as error:
            raise PlanError(_short_text(str(error))) from None
        if self.width > self.hidden and not selects:
            raise PlanError(f"a bottleneck must be narrower than the stream, {self.hidden}; got {self.width} features")
        if self.active is not None and self.active > self.width:
            raise PlanError(f"of {self.width} features no {self.active} can be active")

    @property
    def form(self) -> Form:
        return Form(self.skip, self.norm, self.select, self.active, self.gated)


@dataclass(frozen=True)
class PackLinear(ModuleEdit):
    """A linear map is stored in few bits; see `Packing` for what the fields mean."""

    module: str
    group_size: int
    planes: tuple[int, ...]
    symmetric: bool = True
    path_fields: ClassVar = ("module",)

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_size("group_size", self.group_size)
        object.__setattr__(self, "planes", _planes(self.planes, 1))
        _check_bool("symmetric", self.symmetric)


@dataclass(frozen=True)
class SparsifyLinear(ModuleEdit):
    """A linear map stores but `kept` of its weights, or with `rest` the others behind them; see `SparseLinear`.

    In few bits where there are planes; see `Packing`.
    """

    module: str
    kept: int
    planes: tuple[int, ...] = ()
    group_size: int = 64
    symmetric: bool = True
    rest: bool = False
    path_fields: ClassVar = ("module",)

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_size("kept", self.kept)
        _check_size("group_size", self.group_size)
        object.__setattr__(self, "planes", _planes(self.planes, 0))
        _check_bool("symmetric", self.symmetric)
        _check_bool("rest", self.rest)


@dataclass(frozen=True)
class ReplaceActivation(ModuleEdit):
    """An activation is blended with what a linear map can absorb; see `BlendedActivation`."""

    activation: str
    blend: Blend
    width: int | None = None
    path_fields: ClassVar = ("activation",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.blend not in BLENDS:
            raise PlanError(f"blend must be one of {', '.join(BLENDS)}; got {_short(self.blend)}")
        if (self.blend == "constant") != (self.width is not None):
            raise PlanError(
                f'width is for the blend "constant", and needed there; got {_short(self.width)} with {self.blend}'
            )
        if self.width is not None:
            _check_size("width", self.width)


@dataclass(frozen=True)
class Seal(ModuleEdit):
    """A module is `Sealed`, because the other edits leave every shape as it was; added where it is needed."""

    module: str
    path_fields: ClassVar = ("module",)


def edit_from_dict(values: Any) -> Edit:
    """The inverse of `Edit.to_dict`.

    Raises:
        PlanError: an unknown edit, or missing, unknown or wrong fields.
    """
    if not isinstance(values, dict) or not isinstance(values.get("edit"), str) or values["edit"] not in _EDITS:
        raise PlanError(
            f"unknown edit in the plan: {_short(values)}; known are {', '.join(_EDITS)}: upgrade hf-compress"
        )
    given = {key: value for key, value in values.items() if key != "edit"}
    edit: Any = _EDITS[values["edit"]]
    try:
        return edit(**given)
    except TypeError as error:
        raise PlanError(
            f"edit {values['edit']} has the wrong fields {_short(sorted(map(str, given)))}: {str(error)[:200]}"
        ) from None


def _check_path(name: str, value: Any) -> None:
    if not isinstance(value, str) or not _PATH.fullmatch(value):
        raise PlanError(f'{name} must be the path of a module, such as "model.layers.0"; got {_short(value)}')


def _check_size(name: str, value: Any) -> None:
    if type(value) is not int or not 1 <= value < _MAX_SIZE:
        raise PlanError(f"{name} must be a positive whole number; got {_short(value)}")


def _check_bool(name: str, value: Any) -> None:
    if type(value) is not bool:
        raise PlanError(f"{name} must be true or false; got {_short(value)}")


def _planes(values: Any, least: int) -> tuple[int, ...]:
    """`values` as the numbers of groups in each plane of bits, or PlanError."""
    if not isinstance(values, (list, tuple)) or not least <= len(values) <= MAX_BITS:
        count = f"{least} to" if least else "up to"
        raise PlanError(f"planes must be {count} {MAX_BITS} numbers of groups; got {_short(values)}")
    for groups in values:
        _check_size("planes", groups)
    return tuple(values)


def _block_indices(name: str, values: Any) -> tuple[int, ...]:
    """`values` as a sorted tuple of distinct, non-negative block indices, or PlanError."""
    try:
        indices = tuple(sorted(values))
    except TypeError:
        raise PlanError(f"{name} must be a list of block indices; got {_short(values)}") from None
    if not indices or any(type(i) is not int or i < 0 for i in indices) or len(set(indices)) != len(indices):
        raise PlanError(f"{name} must be distinct block indices counted from 0, at least one; got {_short(values)}")
    return indices


def _short(value: Any) -> str:
    """What was given, cut to what fits a message."""
    return _short_text(repr(value))


def _short_text(text: str) -> str:
    return text if len(text) <= 200 else f"{text[:200]}…"
