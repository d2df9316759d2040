"""A narrow place in the residual stream: what AdaptiveCompress leaves in a model when fitting is over."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Bottleneck(nn.Module):
    """What comes out of a block, squeezed through `width` features.

    n, μ, σ = LN(h);  u = (n − b)·W;  ĥ = σ·(u·W′ + (1 − s)·b) + (1 − s)·μ + s·h      with `rescale`
                      u = n·W;        ĥ = u·W′ + s·h                                   without, as the paper has it

    with W (hidden, width), W′ (width, hidden), b (hidden) and the skip s.

    Args:
        hidden: width of the residual stream.
        width: features.
        skip: s, the share of h that passes by.
        rescale: whether the mean and the spread that the norm took away are given back.
    """

    def __init__(
        self,
        hidden: int,
        width: int,
        skip: float = 0.1,
        rescale: bool = True,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.skip = skip
        self.rescale = rescale
        self.encoder = nn.Parameter(torch.zeros(hidden, width, device=device, dtype=dtype))
        self.decoder = nn.Parameter(torch.zeros(width, hidden, device=device, dtype=dtype))
        if rescale:
            self.center = nn.Parameter(torch.zeros(hidden, device=device, dtype=dtype))

    def encode(self, stream: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Features of (..., hidden), as (..., width), and the mean and spread (..., 1) that decoding needs."""
        mean = stream.mean(-1, keepdim=True)
        spread = torch.sqrt(stream.var(-1, keepdim=True, correction=0) + 1e-5)
        normed = (stream - mean) / spread
        return (normed - self.center if self.rescale else normed) @ self.encoder, (mean, spread)

    def decode(self, features: Tensor, context: tuple[Tensor, Tensor], stream: Tensor) -> Tensor:
        """The stream (..., hidden) from its features and what `encode` gave beside them."""
        decoded = features @ self.decoder
        if self.rescale:
            mean, spread = context
            decoded = spread * (decoded + (1 - self.skip) * self.center) + (1 - self.skip) * mean
        return decoded + self.skip * stream

    def forward(self, stream: Tensor) -> Tensor:
        return self.decode(*self.encode(stream), stream)

    def after(self, block: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
        """The forward hook by which a block's output, a tensor or what begins with it, passes through here."""
        if type(output) in (tuple, list):
            return type(output)([self(output[0]), *output[1:]])
        return self(output)

    def extra_repr(self) -> str:
        hidden, width = self.encoder.shape
        return f"hidden={hidden}, width={width}, skip={self.skip}, rescale={self.rescale}"
