"""Which tokens the rows are that the linear maps of an expert read: those that the router gives to it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hf_compress.calibration.capture import hooked
from hf_compress.modules.experts import Expert


@dataclass(frozen=True)
class Route:
    """Where rows come from: their numbers (rows) among `everywhere` tokens, as a rule those of all samples in turn."""

    tokens: Tensor
    everywhere: int

    def samples(self, count: int) -> Tensor:
        """The sample that each row is of, (rows), in a batch of so many; one for all where that cannot be told."""
        if self.everywhere % count:
            return torch.zeros_like(self.tokens)
        return torch.div(self.tokens, self.everywhere // count, rounding_mode="floor")


@contextmanager
def watch_routes(modules: Iterable[nn.Module]) -> Iterator[Mapping[nn.Module, Route]]:
    """While a batch runs, the routes of what each linear map of the experts in `modules` read last."""
    found: dict[nn.Module, Route] = {}

    def note(expert: nn.Module, args: tuple[Tensor, Tensor, nn.Module]) -> None:
        states, tokens, _ = args
        for linear in expert.children():
            found[linear] = Route(tokens, len(states))

    experts = [expert for module in modules for expert in module.modules() if isinstance(expert, Expert)]
    with hooked(expert.register_forward_pre_hook(note) for expert in experts):
        yield found
