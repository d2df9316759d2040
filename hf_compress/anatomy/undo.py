"""A record of changes to a live model, so that every one of them can be taken back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, MutableMapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

_WRITES = "_hf_compress_writes"  # what a tensor calls the number of its `writes`
_LARGE = 2**20  # bytes of a tensor that is worth a place elsewhere


class Undo:
    """Changes a model and remembers how it was.

    with Undo() as undo:        # rolls back when the block ends, however it ends
        undo.write(parameter, tensor)
    undo = Undo(); ...; undo.rollback()   # or by hand

    Attributes:
        changed: the tables in which something was put, and under what name: attributes, children, parameters, buffers.
    """

    def __init__(self) -> None:
        self._forget()

    def _forget(self) -> None:
        self._steps: list[Callable[[], None]] = []
        self._old: list[object] = []  # what was there before, and is not set aside yet,
        self._copies: list[Tensor] = []  # and copies of what was written over
        self._written: set[Tensor] = set()
        self._away: list[Tensor] = []  # what was there before, and is set aside
        self.changed: list[tuple[MutableMapping[str, Any], str]] = []

    def __enter__(self) -> Undo:
        return self

    def __exit__(self, *_: object) -> None:
        self.rollback()

    def set(self, owner: object, name: str, value: Any) -> None:
        """Put `value` under `name` in the attributes of `owner`, past any __setattr__ of its own."""
        self.put(vars(owner), name, value)

    def unset(self, owner: object, name: str) -> None:
        """Take `name` out of the attributes of `owner`, where it is there."""
        attributes = vars(owner)
        if name in attributes:
            old = attributes.pop(name)
            self.changed.append((attributes, name))
            self._steps.append(lambda: attributes.__setitem__(name, old))

    def put(self, table: MutableMapping[str, Any], name: str, value: Any) -> None:
        """Put `value` under `name` into a dict, such as a module's `_parameters`."""
        if name in table:
            old = table[name]
            self._steps.append(lambda: table.__setitem__(name, old))
            self._old.append(old)
        else:
            self._steps.append(lambda: table.pop(name, None))
        self.changed.append((table, name))
        table[name] = value

    def replace_children(self, blocks: nn.ModuleList, kept: list[nn.Module]) -> None:
        """Make `kept` the whole content of a ModuleList, in place, so that who holds the list sees it too."""
        self.set(blocks, "_modules", {str(i): module for i, module in enumerate(kept)})

    @torch.no_grad()
    def write(self, parameter: Tensor, value: Tensor) -> None:
        """Copy `value` into a parameter, in the parameter's own dtype."""
        if parameter.shape != value.shape:
            raise ValueError(
                f"a tensor of shape {tuple(value.shape)} does not fit a parameter {tuple(parameter.shape)}"
            )
        old = parameter.detach().clone()
        self._steps.append(lambda: _copy(parameter, old))
        self._copies.append(old)
        self._written.add(_whole(parameter))
        _copy(parameter, value)

    def later(self, step: Callable[[], None]) -> None:
        """Have `step` done in its turn when everything is taken back."""
        self._steps.append(step)

    def set_aside(self, used: Iterable[Tensor], put: Callable[[Tensor], Tensor | None]) -> None:
        """Have large tensors that only a rollback still needs lie elsewhere until then.

        They stay the same objects, with the same values. Those that share memory with others stay where they are.

        Args:
            used: the tensors that there are now.
            put: gives a tensor's copy elsewhere, or None where there is no room for it.
        """
        copies, old = list(_large(self._copies)), list(_large(self._old))
        self._copies, self._old = [], []
        if old:
            in_use = Counter(tensor.untyped_storage().data_ptr() for tensor in (*used, *old) if not tensor.is_meta)
            # What was written may have been written through a view, which would not move with it.
            alone = (tensor for tensor in old if in_use[tensor.untyped_storage().data_ptr()] == 1)
            old = [tensor for tensor in alone if tensor.is_contiguous() and tensor not in self._written]
        for number, tensor in enumerate((*copies, *old)):
            kept = put(tensor.detach())
            if kept is None:
                return
            if number >= len(copies):
                self._away.append(tensor)
            tensor.data = kept

    def take_over(self, other: Undo) -> None:
        """Take the changes of another back as well; it forgets them."""
        self._steps += other._steps
        self._old += other._old
        self._copies += other._copies
        self._written |= other._written
        self._away += other._away
        self.changed += other.changed
        other._forget()

    def rollback(self) -> None:
        """Take every change back, the last one first. A second call does nothing."""
        while self._steps:
            self._steps.pop()()
        away = self._away
        self._forget()
        for tensor in away:
            _fetch(tensor)


def writes(tensor: Tensor) -> int:
    """How often a tensor was written here, which its own count of writing in place does not say."""
    return vars(tensor).get(_WRITES, 0)


def _large(old: Iterable[object]) -> Iterator[Tensor]:
    """Large tensors on the CPU among old parts and values of modules, each once, that share no memory with others."""
    found: dict[int, Tensor] = {}
    for part in old:
        own = part.parameters() if isinstance(part, nn.Module) else [part]
        found |= {id(each): each for each in own if isinstance(each, Tensor)}
    for tensor in found.values():
        here = tensor.device.type == "cpu" and not tensor.is_shared()
        if here and tensor.nbytes >= _LARGE and tensor.untyped_storage().nbytes() == tensor.nbytes:
            yield tensor


def _fetch(tensor: Tensor) -> None:
    """Give a tensor that was set aside memory of its own again; without any left, it has its values where it is."""
    with suppress(RuntimeError, MemoryError):
        tensor.data = tensor.data.clone()


def _whole(tensor: Tensor) -> Tensor:
    """What a tensor is a view of, or itself."""
    return tensor if tensor._base is None else tensor._base


@torch.no_grad()
def _copy(parameter: Tensor, value: Tensor) -> None:
    """By its data, which does not count as writing in place: by that count `State` knows what a forward pass did."""
    parameter.data.copy_(value)
    whole = _whole(parameter)  # of the transposed weight of a linear map, say
    vars(whole)[_WRITES] = writes(whole) + 1
