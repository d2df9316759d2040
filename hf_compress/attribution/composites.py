"""Composites: which rule each kind of part has, by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from hf_compress.attribution.rules import Epsilon, Held, HeldScale, Rule, Share, ThroughOrigin
from hf_compress.numerics.registry import Registry


@dataclass(frozen=True)
class Composite:
    """Which rule each kind of part has; parts without one keep their gradient.

    Attributes:
        activation: elementwise activations that are modules.
        norm: LayerNorm, RMSNorm and their like; batch norms only scale by what they have learned.
        linear: linear maps.
        factor: the linear maps that read the input of a gated FFN, whose outputs are multiplied.
        routing: the weights by which experts are mixed.
        query, key, value: what attention reads, or the outputs of their projections where attention is written out.
        bias: what else attention reads: masks, biases by distance.
        modules: rules for modules by their class, which go before those by kind.
        conserves: whether all relevance arrives, once queries, keys and the bias are held fast. Then this is checked on
            the data, and models that it is not true of are refused.
    """

    activation: Rule | None = None
    norm: Rule | None = None
    linear: Rule | None = None
    factor: Rule | None = None
    routing: Rule | None = None
    query: Rule | None = None
    key: Rule | None = None
    value: Rule | None = None
    bias: Rule | None = None
    modules: Mapping[type[nn.Module], Rule] = field(default_factory=dict)
    conserves: bool = True

    def __post_init__(self) -> None:
        places: dict[Any, Any] = {**vars(self), **self.modules}
        for place in set(places) - {"modules", "conserves"}:
            if not isinstance(places[place], Rule | None):
                raise TypeError(
                    f"the rule for {place} must be a Rule, such as Share(0.5), or None; got {places[place]!r}"
                )

    def with_epsilon(self, epsilon: float) -> Composite:
        """The same with the ε-rule for linear maps; ValueError where they have another."""
        if epsilon and self.linear is not None:
            raise ValueError(f"linear maps have the rule {type(self.linear).__name__} already: leave out {epsilon=}")
        return replace(self, linear=Epsilon(epsilon)) if epsilon else self

    def without_scores(self) -> Composite:
        """The same with queries, keys and the bias held fast: all that comes to attention goes on to the values."""
        return replace(self, query=Held(), key=Held(), value=None, bias=Held())


COMPOSITES: Registry[Composite] = Registry("composite")


def register_composite(name: str, composite: Composite) -> Composite:
    """Let a composite be asked for by name: `hfc.relevance(…, composite=name)`, `LRPConfig(composite=name)`.

    Raises:
        ValueError: the name is taken.
        TypeError: something else than a `Composite`, or a name that is no text.
    """
    if not isinstance(composite, Composite) or not isinstance(name, str):
        raise TypeError(f"register_composite takes a name and a Composite(...); got {name!r} and {composite!r}")
    return COMPOSITES.register(name)(composite)


def resolve(composite: str | Composite) -> Composite:
    """A composite, or the one registered by a name; ValueError, listing the names, where there is none."""
    return composite if isinstance(composite, Composite) else COMPOSITES.resolve(composite)


# R. Achtibat et al. (arXiv 2402.05602), section 3. Of a product each factor gets half: of attention the values and the
# softmax, which keeps its gradient, and of what that hands back queries and keys.
_ATTNLRP = register_composite(
    "attnlrp",
    Composite(
        activation=ThroughOrigin(),
        norm=HeldScale(),
        factor=Share(0.5),
        routing=Held(),
        query=Share(0.25),
        key=Share(0.25),
        value=Share(0.5),
        bias=Held(),
    ),
)

# CP-LRP: A. Ali et al., 2022 (arXiv 2202.07304).
register_composite("cp", _ATTNLRP.without_scores())
