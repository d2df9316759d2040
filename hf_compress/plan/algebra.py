"""The algebra of edits: what numbers and paths mean once blocks have gone, and what one plan after another comes to."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from hf_compress.plan.edits import Edit, ModuleEdit, StackEdit


@dataclass(frozen=True)
class Removal:
    """Blocks that go, in rising order, by the path of their stack."""

    blocks: Mapping[str, tuple[int, ...]]

    @staticmethod
    def of(edits: Iterable[Edit]) -> Removal:
        """What edits take out."""
        found: dict[str, list[int]] = {}
        for edit in edits:
            if isinstance(edit, StackEdit):
                found.setdefault(edit.stack, []).extend(edit.removed_blocks())
        return Removal({stack: tuple(sorted(blocks)) for stack, blocks in found.items()})

    def before(self, stack: str, index: int) -> int:
        """The number that a block had when those that go were still there."""
        for gone in self.blocks.get(stack, ()):
            index += gone <= index
        return index

    def after(self, stack: str, index: int) -> int:
        """The number that a block which stays has once they are gone."""
        return index - sum(gone < index for gone in self.blocks.get(stack, ()))

    def path_before(self, path: str) -> str:
        """The path that a module, or a tensor, had when they were still there."""
        stack, index, rest = self._located(path)
        return f"{stack}.{self.before(stack, index)}{rest}" if stack else path

    def path_after(self, path: str) -> str:
        """The path of what stays once they are gone."""
        stack, index, rest = self._located(path)
        return f"{stack}.{self.after(stack, index)}{rest}" if stack else path

    def takes(self, path: str) -> bool:
        """Whether what is at `path` goes."""
        stack, index, _ = self._located(path)
        return index in self.blocks.get(stack, ())

    def left_of(self, edits: Iterable[ModuleEdit]) -> tuple[ModuleEdit, ...]:
        """The edits of the modules that stay, once the blocks are gone."""
        return tuple(edit.moved(self.path_after) for edit in edits if not any(map(self.takes, edit.paths)))

    def _located(self, path: str) -> tuple[str, int, str]:
        """The stack, the index of the block, and the rest of a path; no stack where it leads to no block of theirs."""
        for stack in self.blocks:
            index, dot, rest = path.removeprefix(f"{stack}.").partition(".")
            if path.startswith(f"{stack}.") and index.isdecimal():
                return stack, int(index), dot + rest
        return "", 0, path


def composed(first: Sequence[Edit], second: Sequence[Edit]) -> tuple[Edit, ...]:
    """The edits of two plans as those of one, where the second was made for the model that the first leaves.

    Blocks are counted as before the first. Without edits that the second leaves nothing of; where it takes out a block
    that stands for others, these are gone with it.
    """
    gone = Removal.of(first)
    stacks = [edit for edit in first if isinstance(edit, StackEdit)]
    new = [edit.renumbered(partial(gone.before, edit.stack)) for edit in second if isinstance(edit, StackEdit)]
    taken = Removal.of(new)
    modules = [edit for edit in first if isinstance(edit, ModuleEdit) and not any(map(taken.takes, edit.paths))]
    modules += [edit.moved(gone.path_before) for edit in second if isinstance(edit, ModuleEdit)]

    def with_theirs(edit: StackEdit) -> StackEdit:
        theirs = [old for old in stacks if old.stack == edit.stack and old.stand_in() in edit.removed_blocks()]
        return edit.taking([index for old in theirs for index in old.removed_blocks()])

    stay = [edit for edit in stacks if edit.stand_in() not in taken.blocks.get(edit.stack, ())]
    return (*last_of_each(modules), *stay, *map(with_theirs, new))


def last_of_each(edits: Iterable[ModuleEdit]) -> tuple[ModuleEdit, ...]:
    """Without edits that a later one makes again or of what it takes away.

    An FFN narrowed twice has only the last width, and a linear one nothing of what it was before.
    """
    kept: dict[Hashable, ModuleEdit] = {}
    for edit in edits:
        same = type(edit), edit.paths
        kept.pop(same, None)
        if edit.replaces_ffn:
            kept = {key: old for key, old in kept.items() if not set(old.paths) <= set(edit.paths)}
        kept[same] = edit
    return tuple(kept.values())


def survivors(edits: Iterable[Edit], stack: str, length: int) -> dict[int, int]:
    """The blocks that edits leave of a stack's `length`, each with the last of those that it stands for since."""
    own = [edit for edit in edits if isinstance(edit, StackEdit) and edit.stack == stack]
    gone = Removal.of(own).blocks.get(stack, ())
    stands_for = {index: index for index in range(length) if index not in gone}
    for edit in own:
        if (kept := edit.stand_in()) in stands_for:
            stands_for[kept] = max(stands_for[kept], *edit.removed_blocks())
    return stands_for
