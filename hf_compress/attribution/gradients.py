"""Values that keep their numbers and change their gradients: the backward rules of layer-wise relevance propagation.

Relevance is gradient × input once every nonlinear step hands its gradient on as a linear map with the same output
would: R. Achtibat et al., "AttnLRP" (arXiv 2402.05602). What is returned here is always the given output, bit for bit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from transformers.activations import GELUActivation, SiLUActivation

_TINY = torch.finfo(torch.float32).tiny


def _call(function: type[Function], *arguments: Any) -> Tensor:
    value: Tensor = function.apply(*arguments)  # type: ignore[no-untyped-call]
    return value


class _AsIf(Function):
    @staticmethod
    def forward(ctx: Any, gave: Tensor, stands_in: Tensor) -> Tensor:
        return gave.view_as(gave)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor]:
        return None, gradients[0]


def as_if(gave: Tensor, stands_in: Tensor) -> Tensor:
    """`gave`, bit for bit, with the gradient of another tensor of its shape in the place of its own."""
    return _call(_AsIf, gave.detach(), stands_in)


def scale_gradient(value: Tensor, factor: Tensor | float) -> Tensor:
    """The value; its gradient is multiplied by `factor`, a number or a tensor of the value's shape."""
    return as_if(value, value * factor)


def through_origin(activation: nn.Module, given: Tensor, gave: Tensor) -> Tensor:
    """What an elementwise activation made of an input, with f(x) / x in the place of its derivative.

    Where f(0) is not 0, as of a sigmoid, the activation only weighs something else: no gradient goes through it.
    """
    return as_if(gave, given * _slope(activation, given.detach(), gave.detach()))


@torch.no_grad()
def _slope(activation: nn.Module, given: Tensor, gave: Tensor) -> Tensor:
    """f(x) / x: in a form of its own where that is known, which is not touched by the rounding of f(x)."""
    if isinstance(activation, (nn.SiLU, SiLUActivation)):
        return given.sigmoid()
    if isinstance(activation, nn.ReLU):
        return (given > 0).to(given)
    if isinstance(activation, GELUActivation) or (isinstance(activation, nn.GELU) and activation.approximate == "none"):
        return 0.5 * (1 + (given * math.sqrt(0.5)).erf())
    at_zero = activation.forward(torch.zeros(1, dtype=given.dtype, device=given.device))
    if bool(at_zero != 0):
        return torch.zeros_like(given)
    return torch.where(given == 0, 0.0, gave / given)


class _Normalised(Function):
    @staticmethod
    def forward(
        ctx: Any, given: Tensor, gave: Tensor, gain: Tensor, bias: Tensor | None, scale: Tensor, centred: bool
    ) -> Tensor:
        ctx.save_for_backward(gain, scale)
        ctx.centred = centred
        return gave.view_as(gave)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        gain, scale = ctx.saved_tensors
        to_bias = gradients[0].flatten(0, -2).sum(dim=0) if ctx.needs_input_grad[3] else None
        gradient = gradients[0].float() * gain * scale
        if ctx.centred:
            gradient = gradient - gradient.mean(dim=-1, keepdim=True)
        return gradient.to(gradients[0].dtype), None, None, to_bias, None, None


@dataclass(frozen=True)
class ScaledNorm:
    """A norm over the last axis, gain · (x − mean x) · s + bias or gain · x · s + bias, s a number a token.

    Attributes:
        gain: (width) float32.
        bias: (width), the module's own, or None.
        centred: whether the mean is taken off.
    """

    gain: Tensor
    bias: Tensor | None
    centred: bool

    @staticmethod
    @torch.no_grad()
    def of(norm: nn.Module, given: Tensor, gave: Tensor) -> ScaledNorm | None:
        """How the norm made what it gave of an input; None where no such form explains it.

        Families write gains as w or as 1 + w, so what a module means is told by what it does.
        """
        weight, bias = (norm._parameters.get(name) for name in ("weight", "bias"))
        if any(own is not None and own.shape != given.shape[-1:] for own in (weight, bias)):
            return None  # a norm of channels, over another axis
        ones = torch.ones(given.shape[-1], dtype=torch.float32, device=given.device)
        gains = [ones] if weight is None else [weight.float(), 1 + weight.float()]
        forms = [ScaledNorm(gain, bias, centred) for gain in gains for centred in (False, True)]
        errors = [float((form._unbiased(gave) - form._base(given) * form._scale(given, gave)).norm()) for form in forms]
        best = min(range(len(forms)), key=errors.__getitem__)
        tolerance = 1e-5 + 4 * torch.finfo(gave.dtype).eps
        return forms[best] if errors[best] <= tolerance * float(gave.float().norm()) else None

    def apply(self, given: Tensor, gave: Tensor) -> Tensor:
        """`gave`, with s held fast in its gradient."""
        with torch.no_grad():
            scale = self._scale(given, gave)
        return _call(_Normalised, given, gave.detach(), self.gain, self.bias, scale, self.centred)

    def _unbiased(self, gave: Tensor) -> Tensor:
        return gave.float() if self.bias is None else gave.float() - self.bias.float()

    def _base(self, given: Tensor) -> Tensor:
        base = given.float()
        return (base - base.mean(dim=-1, keepdim=True) if self.centred else base) * self.gain

    def _scale(self, given: Tensor, gave: Tensor) -> Tensor:
        """s, (…, 1), by least squares."""
        base = self._base(given)
        size = base.square().sum(dim=-1, keepdim=True)
        return (base * self._unbiased(gave)).sum(dim=-1, keepdim=True) / size.clamp(min=_TINY)
