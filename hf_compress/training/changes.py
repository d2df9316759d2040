"""What has been done to a model over a run, as one list of edits."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

from transformers import PreTrainedModel

from hf_compress.anatomy.anatomy import Anatomy
from hf_compress.plan.edits import Edit, MergeBlocks, ModuleEdit, RemoveBlocks, StackEdit, edit_from_dict
from hf_compress.plan.plan import Plan


class Changes:
    """Plans carried out one after another, in the numbering that the blocks had before the first.

    Attributes:
        edits: those that still say something of the model.
        notes: of all plans; of two under one name, the later.
    """

    def __init__(self, edits: list[dict[str, Any]] | None = None) -> None:
        self.edits: list[Edit] = [edit_from_dict(values) for values in edits or []]
        self.notes: dict[str, Any] = {}

    def add(self, plan: Plan, model: PreTrainedModel) -> None:
        """Note a plan that is about to be carried out on `model`."""
        new = [self._originally(edit, model) if isinstance(edit, StackEdit) else edit for edit in plan.edits]
        kept = [old for old in self.edits if not any(_outdates(edit, old) for edit in new)]
        self.edits = kept + [self._with_theirs(edit) for edit in new]  # theirs are in the edits as they were
        self.notes |= plan.notes

    def to_list(self) -> list[dict[str, Any]]:
        """The edits as JSON values."""
        values: list[dict[str, Any]] = json.loads(Plan(tuple(self.edits)).to_json())["edits"]
        return values

    def _with_theirs(self, edit: Edit) -> Edit:
        """An edit that takes out merged blocks takes out those that they stand for."""
        theirs = {i for e in self.edits if isinstance(e, MergeBlocks) and _takes(edit, e) for i in e.absorbed}
        if isinstance(edit, MergeBlocks):
            return replace(edit, absorbed=tuple(sorted({*edit.absorbed, *theirs})))
        return replace(edit, blocks=tuple(sorted({*edit.blocks, *theirs}))) if isinstance(edit, RemoveBlocks) else edit

    def _originally(self, edit: StackEdit, model: PreTrainedModel) -> StackEdit:
        gone = {i for e in self.edits if isinstance(e, StackEdit) and e.stack == edit.stack for i in e.removed_blocks()}
        length = len(Anatomy(model).stack(edit.stack)) + len(gone)
        number = [index for index in range(length) if index not in gone]
        if isinstance(edit, MergeBlocks):
            return replace(edit, kept=number[edit.kept], absorbed=tuple(number[i] for i in edit.absorbed))
        assert isinstance(edit, RemoveBlocks)
        return replace(edit, blocks=tuple(number[i] for i in edit.blocks))


def _outdates(edit: Edit, old: Edit) -> bool:
    """Whether an edit leaves nothing to say of an earlier one: its modules are changed again, its block is gone."""
    if isinstance(old, ModuleEdit):
        return isinstance(edit, ModuleEdit) and set(old.paths) <= set(edit.paths)
    return isinstance(old, MergeBlocks) and _takes(edit, old)


def _takes(edit: Edit, merge: MergeBlocks) -> bool:
    return isinstance(edit, StackEdit) and edit.stack == merge.stack and merge.kept in edit.removed_blocks()
