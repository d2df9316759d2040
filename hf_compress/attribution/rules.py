"""The rules of relevance propagation: what single parts of a model hand back of what comes to them."""

from __future__ import annotations

from copy import copy
from dataclasses import replace
from typing import Self

import torch
from torch import Tensor, nn

from hf_compress.attribution.gradients import ScaledNorm, scale_gradient, through_origin
from hf_compress.errors import CalibrationError, UnsupportedModelError


class Rule:
    """What a part of a model hands back of the relevance that comes to it. Derive from it for a rule of your own.

    Relevance is gradient × input, so a rule says what gradient a part has. It is called in the forward pass, with the
    module, what that read and what it gave, and returns what was given, the same numbers with another gradient.
    `as_if` and `scale_gradient` (in `hf_compress.attribution.gradients`) make such values. This one has weights above 0
    count for more (the γ-rule: G. Montavon et al., 2019):

        class Gamma(Rule):
            def __init__(self, gamma: float) -> None:
                self.gamma = gamma

            def __call__(self, module: nn.Module, given: Tensor, gave: Tensor) -> Tensor:
                favoured = given @ (module.weight + self.gamma * module.weight.clamp(min=0)).T
                return as_if(gave, favoured * (gave / favoured).detach())

    A composite says which parts have it; register that, and it can be asked for by name, by `LRPConfig` too:

        hfc.register_composite("gamma", hfc.Composite(activation=ThroughOrigin(), linear=Gamma(0.25)))
        hfc.relevance(model, data, composite="gamma")

    Each part gets a copy, which may keep on itself what it finds out there.

    Attributes:
        part: where the copy is, by path and class, for messages.
    """

    part: str = ""

    def at(self, part: str) -> Self:
        """A copy for one part."""
        placed = copy(self)
        placed.part = part
        return placed

    def __call__(self, module: nn.Module, given: Tensor, gave: Tensor) -> Tensor:
        """`gave`, bit for bit, with the gradient of this rule.

        Args:
            module: the part.
            given: what it read: its first tensor; of what attention and experts are called with, the same as `gave`.
            gave: what it made of that.
        """
        raise NotImplementedError


class Held(Rule):
    """A constant: hands nothing back."""

    def __call__(self, module: nn.Module, given: Tensor, gave: Tensor) -> Tensor:
        return gave.detach()


class Share(Rule):
    """Hands back a share, and leaves the rest to the other factors of a product."""

    def __init__(self, share: float) -> None:
        self.share = share

    def __call__(self, module: nn.Module, given: Tensor, gave: Tensor) -> Tensor:
        return scale_gradient(gave, self.share)


class Epsilon(Rule):
    """The ε-rule of linear maps: the gradient divided by 1 + ε/|z|, ε in units of their outputs."""

    def __init__(self, epsilon: float) -> None:
        self.epsilon = epsilon

    def __call__(self, module: nn.Module, given: Tensor, gave: Tensor) -> Tensor:
        size = gave.detach().abs()
        return scale_gradient(gave, size / (size + self.epsilon))


class ThroughOrigin(Rule):
    """f(x) / x in the place of an elementwise activation's derivative; nothing where f(0) is not 0."""

    def __call__(self, module: nn.Module, given: Tensor, gave: Tensor) -> Tensor:
        return through_origin(module, given, gave)


class HeldScale(Rule):
    """Holds the scale of a norm fast; taking the mean off stays linear."""

    form: ScaledNorm | None = None  # found when the norm first runs

    def __call__(self, module: nn.Module, given: Tensor, gave: Tensor) -> Tensor:
        if not bool(torch.isfinite(gave).all()):
            raise CalibrationError(f"{self.part} gives NaN or infinite values on this data")
        if given.shape == gave.shape:
            self.form = self.form or ScaledNorm.of(module, given.detach(), gave.detach())
            if self.form is not None:
                own = module._parameters.get("bias")  # anew, since offloaded ones are read again and again
                return replace(self.form, bias=own).apply(given, gave)
        raise UnsupportedModelError(
            f"{self.part} is no normalisation by one scale a token, so relevance has no rule for it"
        )
