"""Single experts of a mixture whose tensors Transformers keeps together: what they are, and what one does."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from hf_compress.anatomy.parts import expert_axes
from hf_compress.errors import UnsupportedModelError
from hf_compress.modules.experts import SeparateExperts, hidden_activations

_TELLING = ("has_gate", "has_bias", "is_transposed", "is_concatenated")  # what Transformers says of such a module


def check_experts(experts: nn.Module, name: str) -> None:
    """Raise where a module of experts does not say how it computes, or has them apart already."""
    if isinstance(experts, SeparateExperts):
        raise UnsupportedModelError(f"{name}: its experts are taken apart already; narrow them before LRPConfig")
    silent = [attribute for attribute in _TELLING if not isinstance(getattr(experts, attribute, None), bool)]
    if silent or getattr(experts, "has_post_expert_norm", False):
        raise UnsupportedModelError(
            f"{name} ({type(experts).__name__}) is no mixture whose experts can be looked into one by one: it "
            + ("has a norm after each" if not silent else f"does not tell {', '.join(silent)}")
        )


def expert_hidden(experts: Any, expert: int, states: Tensor) -> Tensor:
    """The activations of an expert's hidden units, (tokens, width), for what the expert reads, (tokens, hidden)."""
    name = _reader(experts)
    table = getattr(experts, name)[expert]
    read = states.to(table.dtype) @ (table if experts.is_transposed else table.T)
    if experts.has_bias:
        read = read + getattr(experts, f"{name}_bias")[expert]
    return hidden_activations(experts, read)


def _reader(experts: Any) -> str:
    return "gate_up_proj" if experts.has_gate else "up_proj"


def expert_tables(experts: nn.Module) -> dict[str, Tensor]:
    """The tensors of all experts, named as those of an `Expert`: weights (experts, outputs, inputs), biases; views.

    Raises:
        UnsupportedModelError: there are others, or not all of these.
    """
    names = {"up": _reader(experts), "down": "down_proj"}
    wanted = {f"{map_}.weight": name for map_, name in names.items()}
    if experts.has_bias:
        wanted |= {f"{map_}.bias": f"{name}_bias" for map_, name in names.items()}
    own = {name: table for name, table in experts._parameters.items() if table is not None}
    if set(wanted.values()) != own.keys() or experts._buffers:
        raise UnsupportedModelError(
            f"{type(experts).__name__} holds {', '.join(own)}; only mixtures with {', '.join(wanted.values())} and "
            "nothing else are taken apart"
        )
    turned = bool(experts.is_transposed)
    return {
        name: own[table].transpose(1, 2) if turned and name.endswith("weight") else own[table]
        for name, table in wanted.items()
    }


def expert_writes(experts: nn.Module) -> Tensor:
    """The output projections of all experts, (experts, width, hidden); a view."""
    name, (axis, _) = next(iter(expert_axes(experts).of.items()))
    table = experts.get_parameter(name)
    return table if axis == 1 else table.transpose(1, 2)
