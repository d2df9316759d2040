"""A mixture of experts whose experts have linear maps of their own, instead of entries in tensors of all experts."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn


class Expert(nn.Module):
    """One expert: `up` to its hidden units, gate and up in one where they are gated, and `down` back.

    Args:
        hidden: width of the residual stream.
        up_width: what `up` gives, twice the hidden units where they are gated.
        width: hidden units.
        bias: whether both maps have one.
    """

    def __init__(
        self,
        hidden: int,
        up_width: int,
        width: int,
        bias: bool,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.up = nn.Linear(hidden, up_width, bias, device, dtype)
        self.down = nn.Linear(width, hidden, bias, device, dtype)

    def forward(self, states: Tensor, tokens: Tensor, mixture: Any) -> Tensor:
        """What it writes for the rows `tokens` of `states` (all tokens, hidden)."""
        return self.down(hidden_activations(mixture, self.up(states[tokens])))


class SeparateExperts(nn.Module):
    """Experts by their numbers, each run on the tokens that the router gives to it.

    Args:
        experts: a module of Transformers that holds their tensors and says how it computes. Without the tensors it is
            kept, for what it does between the two maps.
        count: of experts.
        sizes: of an `Expert`: hidden, up_width, width, bias.
    """

    mixture: nn.Module

    def __init__(
        self,
        experts: nn.Module,
        count: int,
        sizes: tuple[int, int, int, bool],
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.count, self.width = count, sizes[2]
        mixture: Any = copy.copy(experts)
        for name, module in experts._modules.items():  # the activation
            self.add_module(name, module)
        mixture._parameters, mixture._modules = {}, self._modules  # one table, so that an activation can be replaced
        vars(self)["mixture"] = mixture  # not registered: it has the same children, and no tensors to initialise
        self.gated = bool(mixture.has_gate)
        for number in range(count):
            self.add_module(str(number), Expert(*sizes, device=device, dtype=dtype))

    @property
    def experts(self) -> list[Expert]:
        """By their numbers."""
        return [child for child in self.children() if isinstance(child, Expert)]

    def forward(self, states: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """The weighted sum of what the chosen experts write, (tokens, hidden).

        Args:
            states: (tokens, hidden).
            index: the experts chosen, (tokens, choices).
            weights: theirs, (tokens, choices), or those of all experts, (tokens, experts).
        """
        written = torch.zeros_like(states)
        for number in index.unique().tolist():
            if number < self.count:  # Transformers marks a choice that is to be left out by the number behind the last
                tokens, weight = routed(index, weights, number)
                own = self.get_submodule(str(number))(states, tokens, self.mixture)
                written.index_add_(0, tokens, (own * weight[:, None]).to(written.dtype))
        return written


def hidden_activations(mixture: Any, read: Tensor) -> Tensor:
    """The hidden units' activations, (tokens, width), of what an expert's first map gives."""
    return mixture._apply_gate(read) if mixture.has_gate else mixture.act_fn(read)


def routed(index: Tensor, weights: Tensor, expert: int) -> tuple[Tensor, Tensor]:
    """Which tokens a router gives to an expert, and with which weights; of index and weights (tokens, choices)."""
    token, choice = torch.where(index == expert)
    if weights.shape == index.shape:
        return token, weights[token, choice]
    return token, weights[token, torch.full_like(token, expert)]
