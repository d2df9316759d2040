"""How the processes that share work factorise, invert and choose together."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from hf_compress.calibration.processes import given, here, summed
from hf_compress.numerics.alone import Alone


class Together(Alone):
    """All processes that share the work, each of which sees to its part; see `Alone`."""

    def __init__(self) -> None:
        self.rank, self.world = here()

    def sum_up(self, tensors: Iterable[Tensor]) -> None:
        summed(tensors)

    def give(self, tensor: Tensor, source: int) -> None:
        given(tensor, source)
