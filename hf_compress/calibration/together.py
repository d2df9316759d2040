"""The processes that share work as a team, for what they factorise, invert and choose together."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from hf_compress.calibration.processes import given, here, summed
from hf_compress.numerics.team import Team


class Together(Team):
    """All processes that share the work."""

    def __init__(self) -> None:
        self.rank, self.world = here()

    def sum_up(self, tensors: Iterable[Tensor]) -> None:
        summed(tensors)

    def give(self, tensor: Tensor, source: int) -> None:
        given(tensor, source)
