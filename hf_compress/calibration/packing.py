"""A value of any kind as its tensors and the rest, which is pickled: tensors need not be copied to be told."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class _Pickler(pickle.Pickler):
    """Leaves tensors out, and notes them."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self.tensors: list[Tensor] = []

    def persistent_id(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return None
        self.tensors.append(value)
        return len(self.tensors) - 1, tuple(value.shape), value.dtype, value.device.type


class _Unpickler(pickle.Unpickler):
    """Makes empty tensors in their places. What it reads comes from processes of this very run."""

    def __init__(self, file: io.BytesIO, device: Callable[[str], torch.device]) -> None:
        super().__init__(file)
        self.device, self.tensors = device, list[Tensor]()

    def persistent_load(self, known: Any) -> Tensor:
        _, shape, dtype, kind = known
        self.tensors.append(torch.empty(shape, dtype=dtype, device=self.device(kind)))
        return self.tensors[-1]


def packed(value: Any) -> tuple[list[Tensor], bytes]:
    """The tensors of a value, and everything else of it."""
    file = io.BytesIO()
    pickler = _Pickler(file)
    pickler.dump(value)
    return pickler.tensors, file.getvalue()


def unpacked(rest: bytes, device: Callable[[str], torch.device]) -> tuple[Any, list[Tensor]]:
    """The value, and its tensors, which are to be filled.

    Args:
        device: to put them on, by the kind of that which they came from.
    """
    found = _Unpickler(io.BytesIO(rest), device)
    return found.load(), found.tensors
