"""Single experts of a mixture whose tensors Transformers keeps together: what one does with the tokens given to it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hf_compress.anatomy.parts import expert_axes
from hf_compress.errors import UnsupportedModelError

_TELLING = ("has_gate", "has_bias", "is_transposed", "is_concatenated")  # what Transformers says of such a module


def check_experts(experts: nn.Module, name: str) -> None:
    """Raise where a module of experts does not say how it computes."""
    silent = [attribute for attribute in _TELLING if not isinstance(getattr(experts, attribute, None), bool)]
    if silent or getattr(experts, "has_post_expert_norm", False):
        raise UnsupportedModelError(
            f"{name} ({type(experts).__name__}) is no mixture whose experts can be looked into one by one: it "
            + ("has a norm after each" if not silent else f"does not tell {', '.join(silent)}")
        )


def expert_hidden(experts: Any, expert: int, states: Tensor) -> Tensor:
    """The activations of an expert's hidden units, (tokens, width), for what the expert reads, (tokens, hidden)."""
    name = "gate_up_proj" if experts.has_gate else "up_proj"
    table = getattr(experts, name)[expert]
    read = states.to(table.dtype) @ (table if experts.is_transposed else table.T)
    if experts.has_bias:
        read = read + getattr(experts, f"{name}_bias")[expert]
    return experts._apply_gate(read) if experts.has_gate else experts.act_fn(read)


def expert_writes(experts: nn.Module) -> Tensor:
    """The output projections of all experts, (experts, width, hidden); a view."""
    name, (axis, _) = next(iter(expert_axes(experts).of.items()))
    table = experts.get_parameter(name)
    return table if axis == 1 else table.transpose(1, 2)


def routed(experts: nn.Module, index: Tensor, weights: Tensor, expert: int) -> tuple[Tensor, Tensor]:
    """Which tokens a router gives to an expert, and with which weights; of index and weights (tokens, choices)."""
    token, choice = torch.where(index == expert)
    if weights.shape == index.shape:
        return token, weights[token, choice]
    return token, weights[token, torch.full_like(token, expert)]
