"""Plans: what to do to a model, as plain data. A plan is decided by a method and carried out by `apply`."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from hf_compress.errors import PlanError
from hf_compress.plan.edits import Edit, MergeBlocks, ModuleEdit, StackEdit, edit_from_dict

PLAN_VERSION = 1
METHOD = "hf_compress"  # what a config calls its record of edits
_MAX_EDITS = 100_000  # no model has as many modules; a longer list is an attack or an accident


@dataclass(frozen=True)
class Plan:
    """Structural edits and new tensors.

    Attributes:
        edits: carried out together, edits of modules before blocks are taken out; block indices and module paths are
            those of the model as it was before the plan.
        tensors: new values of parameters, by their names before any block is taken out. Where an edit changes a
            module, the shapes are those after it and every tensor of it is needed; else they are the parameters' own.
        notes: what the method found out on the way (similarities, errors, choices), for the report; JSON values.
    """

    edits: tuple[Edit, ...] = ()
    tensors: dict[str, Tensor] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def stack_edits(self) -> tuple[StackEdit, ...]:
        return tuple(edit for edit in self.edits if isinstance(edit, StackEdit))

    @property
    def module_edits(self) -> tuple[ModuleEdit, ...]:
        return tuple(edit for edit in self.edits if isinstance(edit, ModuleEdit))

    def removed(self, stack: str) -> tuple[int, ...]:
        """All blocks of a stack that the plan takes out, in rising order."""
        return tuple(sorted(i for edit in self.stack_edits if edit.stack == stack for i in edit.removed_blocks()))

    @property
    def stacks(self) -> tuple[str, ...]:
        """The stacks that the plan takes blocks out of, in the order of the edits."""
        return tuple(dict.fromkeys(edit.stack for edit in self.stack_edits))

    def __post_init__(self) -> None:
        for stack in self.stacks:
            removed = self.removed(stack)
            if len(set(removed)) != len(removed):
                raise PlanError(f"the plan takes a block of {stack} out twice: {removed}")
            kept = {edit.kept for edit in self.edits if isinstance(edit, MergeBlocks) and edit.stack == stack}
            if both := sorted(kept & set(removed)):
                raise PlanError(f"the plan both merges into and removes the blocks {both} of {stack}")

    def __add__(self, other: Plan) -> Plan:
        """Both plans as one, to be carried out together; both count blocks in the same model."""
        if both := sorted(self.tensors.keys() & other.tensors.keys()):
            raise PlanError(f"both plans give values for {both[:5]}")
        return Plan(self.edits + other.edits, {**self.tensors, **other.tensors}, {**self.notes, **other.notes})

    def then(self, other: Plan) -> Plan:
        """Both plans as one, where `other` was made for the model that this one leaves, and takes no blocks out."""
        replaced = {name: value for name, value in self.tensors.items() if name not in other.tensors}
        return Plan(self.edits, replaced, self.notes) + other

    def to_json(self) -> str:
        """The edits as JSON; tensors are not part of it."""
        return json.dumps({"version": PLAN_VERSION, "edits": [edit.to_dict() for edit in self.edits]}, indent=2)

    @staticmethod
    def from_json(text: str) -> Plan:
        """The plan whose `to_json` gave `text`, without its tensors.

        Raises:
            PlanError: not a plan, a newer version, an unknown edit, or an edit with missing or wrong fields.
        """
        try:
            data = json.loads(text)
        except (json.JSONDecodeError, RecursionError) as error:
            raise PlanError(f"a plan is JSON: {error}") from None
        if not isinstance(data, dict) or "edits" not in data:
            raise PlanError("a plan is a JSON object with the keys 'version' and 'edits'")
        return Plan(edits_from_list(data.get("version"), data["edits"]))


def edits_from_list(version: Any, edits: Any) -> tuple[Edit, ...]:
    """Edits from the JSON values of a plan of some version.

    Raises:
        PlanError: as `Plan.from_json`.
    """
    if type(version) is not int or version != PLAN_VERSION:
        raise PlanError(f"this plan has version {str(version)[:100]}, known is {PLAN_VERSION}: upgrade hf-compress")
    if not isinstance(edits, list) or len(edits) > _MAX_EDITS:
        raise PlanError(f"a plan is a list of at most {_MAX_EDITS} edits; got {type(edits).__name__}")
    return tuple(edit_from_dict(values) for values in edits)
