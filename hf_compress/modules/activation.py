"""An activation on its way to being linear, as LayerCollapse (arXiv 2311.17943) trains it."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor, nn

Blend = Literal["leaky", "identity", "constant"]
BLENDS: tuple[Blend, ...] = get_args(Blend)


class BlendedActivation(nn.Module):
    """An activation a, blended by a learned share α with what a linear map can absorb.

    "leaky"     max(z, 0) + α·min(z, 0)     the paper's PReLU; a itself is not used
    "identity"  (1 − α)·a(z) + α·z
    "constant"  (1 − α)·a(z) + α·c          for the gate of a gated FFN, c one constant a hidden unit

    At α = 1 nothing nonlinear is left.

    Args:
        activation: a; without parameters.
        blend: one of the three above.
        width: hidden units, for "constant" alone.
        device: where the tensors are made; "meta" for a model that is being loaded.
    """

    constant: Tensor

    def __init__(
        self,
        activation: nn.Module,
        blend: Blend,
        width: int | None = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.activation = activation
        self.blend = blend
        self.alpha = nn.Parameter(torch.zeros(1, device=device, dtype=dtype))
        if blend == "constant":
            self.register_buffer("constant", torch.zeros(width or 0, device=device, dtype=dtype))

    def forward(self, inputs: Tensor) -> Tensor:
        if self.blend == "leaky":
            return inputs.clamp(min=0) + self.alpha * inputs.clamp(max=0)
        target = inputs if self.blend == "identity" else self.constant
        return (1 - self.alpha) * self.activation(inputs) + self.alpha * target

    def extra_repr(self) -> str:
        return f"blend={self.blend!r}"
