"""Plans: what to do to a model, as plain data. A plan is decided by a method and carried out by `apply`."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor

PLAN_VERSION = 1
_EDITS: dict[str, type[Edit]] = {}


@dataclass(frozen=True)
class Edit:
    """One structural change. `stack` is the path of the residual stack's ModuleList, such as "model.layers"."""

    stack: str

    def __init_subclass__(cls) -> None:
        _EDITS[cls.__name__] = cls

    def __post_init__(self) -> None:
        if not isinstance(self.stack, str) or not self.stack:
            raise ValueError(f"an edit's stack must be the path of a module; got {self.stack!r}")

    def removed_blocks(self) -> tuple[int, ...]:
        """Indices of the blocks that are gone afterwards, counted in the model before the plan."""
        return ()

    def to_dict(self) -> dict[str, Any]:
        """JSON values, with the edit's name under "edit"."""
        return {"edit": type(self).__name__, **asdict(self)}


@dataclass(frozen=True)
class RemoveBlocks(Edit):
    """The blocks at `blocks` are left out."""

    blocks: tuple[int, ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "blocks", _block_indices("blocks", self.blocks))

    def removed_blocks(self) -> tuple[int, ...]:
        return self.blocks


@dataclass(frozen=True)
class MergeBlocks(Edit):
    """The blocks `absorbed` are gone and the block `kept` stands for them and itself; its tensors are in the plan."""

    kept: int
    absorbed: tuple[int, ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        _block_indices("kept", (self.kept,))
        object.__setattr__(self, "absorbed", _block_indices("absorbed", self.absorbed))
        if self.kept in self.absorbed:
            raise ValueError(f"block {self.kept} is both kept and absorbed; a block can be only one of them")

    def removed_blocks(self) -> tuple[int, ...]:
        return self.absorbed


def _block_indices(name: str, values: Any) -> tuple[int, ...]:
    """`values` as a sorted tuple of distinct, non-negative block indices, or ValueError."""
    try:
        indices = tuple(sorted(values))
    except TypeError:
        raise ValueError(f"{name} must be a list of block indices; got {values!r}") from None
    if not indices or any(type(i) is not int or i < 0 for i in indices) or len(set(indices)) != len(indices):
        raise ValueError(f"{name} must be distinct block indices counted from 0, at least one; got {values!r}")
    return indices


@dataclass(frozen=True)
class Plan:
    """Structural edits and new tensors.

    Attributes:
        edits: carried out together; block indices count the blocks of the model as it was before the plan.
        tensors: new values of parameters, by their names in the model before the plan; shapes and dtypes are the
            parameters' own.
        notes: what the method found out on the way (similarities, errors, choices), for the report; JSON values.
    """

    edits: tuple[Edit, ...] = ()
    tensors: dict[str, Tensor] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)

    def removed(self, stack: str) -> tuple[int, ...]:
        """All blocks of a stack that the plan takes out, in rising order."""
        return tuple(sorted(i for edit in self.edits if edit.stack == stack for i in edit.removed_blocks()))

    @property
    def stacks(self) -> tuple[str, ...]:
        """The stacks that the plan edits, in the order of the edits."""
        return tuple(dict.fromkeys(edit.stack for edit in self.edits))

    def __post_init__(self) -> None:
        for stack in self.stacks:
            removed = self.removed(stack)
            if len(set(removed)) != len(removed):
                raise ValueError(f"the plan takes a block of {stack} out twice: {removed}")
            kept = {edit.kept for edit in self.edits if isinstance(edit, MergeBlocks) and edit.stack == stack}
            if both := sorted(kept & set(removed)):
                raise ValueError(f"the plan both merges into and removes the blocks {both} of {stack}")

    def to_json(self) -> str:
        """The edits as JSON; tensors are not part of it."""
        return json.dumps({"version": PLAN_VERSION, "edits": [edit.to_dict() for edit in self.edits]}, indent=2)

    @staticmethod
    def from_json(text: str) -> Plan:
        """The plan whose `to_json` gave `text`, without its tensors.

        Raises:
            ValueError: not a plan, a newer version, an unknown edit, or an edit with missing or wrong fields.
        """
        data = json.loads(text)
        if not isinstance(data, dict) or not isinstance(data.get("edits"), list):
            raise ValueError("a plan is a JSON object with the keys 'version' and 'edits'")
        if data.get("version") != PLAN_VERSION:
            raise ValueError(
                f"this plan has version {data.get('version')!r}, known is {PLAN_VERSION}: upgrade hf-compress"
            )
        return Plan(tuple(_edit_from_dict(values) for values in data["edits"]))


def _edit_from_dict(values: dict[str, Any]) -> Edit:
    if not isinstance(values, dict) or values.get("edit") not in _EDITS:
        raise ValueError(f"unknown edit in the plan: {values!r}; known are {', '.join(_EDITS)}: upgrade hf-compress?")
    fields = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items() if key != "edit"}
    edit: Any = _EDITS[values["edit"]]
    try:
        return edit(**fields)
    except TypeError as error:
        raise ValueError(f"edit {values['edit']} has the wrong fields {sorted(fields)}: {error}") from None
