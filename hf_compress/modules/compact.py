"""Linear maps that are stored in another form than a matrix, and the matrices that they compute with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

ROOM = 2**28  # bytes of dense weights that are kept beside a model in memory


class CompactLinear(nn.Linear):
    """A linear map whose weights are no parameters, or none of a matrix.

    A `Linear` by class, as those of other quantizers, so that PEFT puts adapters beside it; it has a weight of its own.
    """

    _kept: DenseWeights | None = None

    def __init__(self, inputs: int, outputs: int) -> None:
        nn.Module.__init__(self)  # past that of Linear, which makes a matrix
        self.in_features, self.out_features = inputs, outputs

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The weight (outputs, inputs) that it computes with on inputs of a dtype."""
        if self._kept is None or torch.is_grad_enabled():
            return self._dense(dtype)
        return self._kept.of(self, dtype)

    def _dense(self, dtype: torch.dtype) -> Tensor:
        raise NotImplementedError

    @property
    def packed_weights(self) -> int:
        """How many weights it has that are none."""
        raise NotImplementedError

    def _check_stored(self, length: int) -> None:
        """Raise ValueError where the weight is no longer a row of so many entries: some of PEFT's merges replace it."""
        if self.weight.shape != (length,):
            raise ValueError(
                f"the weight of a {type(self).__name__} is a row of {length} entries, and of the shape "
                f"{tuple(self.weight.shape)} now: adapters cannot be merged into it; load the model again, and keep "
                "them beside it"
            )


class DenseWeights:
    """Dense weights of compact linear maps, each made once, as many as there is room for.

    Args:
        room: bytes.
    """

    def __init__(self, room: int) -> None:
        self._room = room
        self._made: WeakKeyDictionary[CompactLinear, dict[torch.dtype, Tensor]] = WeakKeyDictionary()

    def of(self, linear: CompactLinear, dtype: torch.dtype) -> Tensor:
        """The one of a linear map and a dtype; made, and kept if there is room."""
        made = self._made.setdefault(linear, {})
        if dtype in made:
            return made[dtype]
        weight = linear._dense(dtype)
        if weight.nbytes <= self._room:
            self._room -= weight.nbytes
            made[dtype] = weight
        return weight


@contextmanager
def kept_dense(module: nn.Module, room: int = ROOM) -> Iterator[None]:
    """Inside, compact linear maps of a module unpack their weights once, not whenever they run, if there is room.

    Not with gradients. Their weights must not change meanwhile.

    Args:
        room: bytes.
    """
    before = {part: part._kept for part in module.modules() if isinstance(part, CompactLinear)}
    weights = DenseWeights(room)
    for linear in before:
        linear._kept = weights
    try:
        yield
    finally:
        for linear, kept in before.items():
            linear._kept = kept
