"""Plans: what to do to a model, as plain data. A plan is decided by a method and carried out by `apply`."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from hf_compress.errors import PlanError
from hf_compress.plan.algebra import Removal, composed
from hf_compress.plan.edits import Edit, ModuleEdit, StackEdit
from hf_compress.plan.tables import html_table

PLAN_VERSION = 1
METHOD = "hf_compress"  # what a config calls its record of edits

_SHOWN = 100  # edits


def _place(edit: Edit) -> str:
    """The stack, or the last of the modules, that an edit changes."""
    if isinstance(edit, StackEdit):
        return edit.stack
    return edit.paths[-1] if isinstance(edit, ModuleEdit) and edit.paths else ""


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
    tensors: dict[str, Tensor] = field(default_factory=dict, repr=False)
    notes: dict[str, Any] = field(default_factory=dict, repr=False)

    @property
    def stack_edits(self) -> tuple[StackEdit, ...]:
        return tuple(edit for edit in self.edits if isinstance(edit, StackEdit))

    @property
    def module_edits(self) -> tuple[ModuleEdit, ...]:
        return tuple(edit for edit in self.edits if isinstance(edit, ModuleEdit))

    def removed(self, stack: str) -> tuple[int, ...]:
        """All blocks of a stack that the plan takes out, in rising order."""
        return Removal.of(self.edits).blocks.get(stack, ())

    @property
    def stacks(self) -> tuple[str, ...]:
        """The stacks that the plan takes blocks out of, in the order of the edits."""
        return tuple(Removal.of(self.edits).blocks)

    def __post_init__(self) -> None:
        for stack, removed in Removal.of(self.edits).blocks.items():
            if len(set(removed)) != len(removed):
                raise PlanError(f"the plan takes a block of {stack} out twice: {removed}")
            kept = {edit.stand_in() for edit in self.stack_edits if edit.stack == stack}
            if both := [index for index in sorted(set(removed)) if index in kept]:
                raise PlanError(f"the plan both merges into and removes the blocks {both} of {stack}")

    def __add__(self, other: Plan) -> Plan:
        """Both plans as one, to be carried out together; both count blocks in the same model."""
        if both := sorted(self.tensors.keys() & other.tensors.keys()):
            raise PlanError(f"both plans give values for {both[:5]}")
        return Plan(self.edits + other.edits, {**self.tensors, **other.tensors}, {**self.notes, **other.notes})

    def then(self, other: Plan) -> Plan:
        """Both plans as one, where `other` was made for the model that this one leaves."""
        gone, edits = Removal.of(self.edits), composed(self.edits, other.edits)
        new = {gone.path_before(name): tensor for name, tensor in other.tensors.items()}
        taken = Removal.of(edits)
        old = {name: tensor for name, tensor in self.tensors.items() if name not in new and not taken.takes(name)}
        return Plan(edits, old | new, self.notes | other.notes)

    def __str__(self) -> str:
        """A line for each edit."""
        return "\n".join([self._title(), *("  ".join(row) for row in self._rows())])

    def _repr_html_(self) -> str:
        """The same for notebooks."""
        return html_table(self._title(), ("edit", "where", "what"), self._rows())

    def _title(self) -> str:
        size = sum(tensor.nbytes for tensor in self.tensors.values())
        return f"plan; edits: {len(self.edits):,}; new tensors: {len(self.tensors):,}, of {size:,} bytes"

    def _rows(self) -> list[tuple[str, str, str]]:
        shown = [(type(edit).__name__, _place(edit), edit.describe()) for edit in self.edits[:_SHOWN]]
        more = len(self.edits) - len(shown)
        return [*shown, ("…", "", f"and {more:,} more")] if more else shown

    def to_list(self) -> list[dict[str, Any]]:
        """The edits as JSON values, with lists for tuples, as they come back from a file."""
        values: list[dict[str, Any]] = json.loads(json.dumps([edit.to_dict() for edit in self.edits]))
        return values

    def to_json(self) -> str:
        """The edits as JSON, which `rewrite.edits.plan_from_json` reads; tensors are not part of it."""
        return json.dumps({"version": PLAN_VERSION, "edits": self.to_list()}, indent=2)
