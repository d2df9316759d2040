"""A record of changes to a live model, so that every one of them can be taken back."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn

_WRITES = "_hf_compress_writes"  # what a tensor calls the number of its `writes`


class Undo:
    """Changes a model and remembers how it was.

    with Undo() as undo:        # rolls back when the block ends, however it ends
        undo.write(parameter, tensor)
    undo = Undo(); ...; undo.rollback()   # or by hand

    Attributes:
        changed: the tables in which something was put, and under what name: attributes, children, parameters, buffers.
    """

    def __init__(self) -> None:
        self._steps: list[Callable[[], None]] = []
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
        _copy(parameter, value)

    def later(self, step: Callable[[], None]) -> None:
        """Have `step` done in its turn when everything is taken back."""
        self._steps.append(step)

    def take_over(self, other: Undo) -> None:
        """Take the changes of another back as well; it forgets them."""
        self._steps += other._steps
        self.changed += other.changed
        other._steps, other.changed = [], []

    def rollback(self) -> None:
        """Take every change back, the last one first. A second call does nothing."""
        while self._steps:
            self._steps.pop()()
        self.changed = []


def writes(tensor: Tensor) -> int:
    """How often a tensor was written here, which its own count of writing in place does not say."""
    return vars(tensor).get(_WRITES, 0)


@torch.no_grad()
def _copy(parameter: Tensor, value: Tensor) -> None:
    """By its data, which does not count as writing in place: by that count `State` knows what a forward pass did."""
    parameter.data.copy_(value)
    whole = parameter if parameter._base is None else parameter._base  # of the transposed weight of a linear map, say
    vars(whole)[_WRITES] = writes(whole) + 1
