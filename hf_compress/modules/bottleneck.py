"""A narrow place in the residual stream: what AdaptiveCompress, and dictionaries of features, put behind a block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from hf_compress.checks import check_fields, setting

Norm = Literal["kept", "lost", "none"]
Select = Literal["all", "top", "above"]
BOTTLENECK = "residual_bottleneck"  # what a block calls the one that its output passes through
_EPSILON = 1e-5  # of the norm's variance, as in a LayerNorm


@dataclass(frozen=True)
class Form:
    """What a bottleneck does beside its two maps.

    Attributes:
        skip: s, the share of the stream that passes by.
        norm: "kept": features read the stream normed, and its mean and spread are given back; "lost": they are not, as
            in AdaptiveCompress's paper; "none": the stream is read as it is.
        select: "all" features as they are; or rectified and of each position the `active` largest ("top"), or those
            above a threshold of their own ("above").
        active: for "top".
        gated: whether each feature is multiplied by a gate, as while it is trained.

    Raises:
        ValueError: what does not fit together.
    """

    skip: float = setting(0.1, within="[0, 1]")
    norm: Norm = "kept"
    select: Select = "all"
    active: int | None = None
    gated: bool = False

    def __post_init__(self) -> None:
        check_fields(self)
        if (self.select == "top") != (type(self.active) is int and self.active > 0):
            raise ValueError(f'active is for select="top", and a number of features there; got {self.active!r}')


class Context(NamedTuple):
    """What decoding needs beside the code: the stream (..., hidden) as it came, its mean and its spread (..., 1)."""

    stream: Tensor
    mean: Tensor
    spread: Tensor


class Bottleneck(nn.Module):
    """What comes out of a block, squeezed through `width` features.

    n, μ, σ = norm(h);  u = (n − b)·W + c;  z = φ(u) ⊙ g;  ĥ = σ·(z·W′ + (1 − s)·b) + (1 − s)·μ + s·h

    with W (hidden, width), W′ (width, hidden), b (hidden), the skip s, and φ that selects features. The norm is a
    LayerNorm that learns nothing; with norm="none", n = h, μ = 0 and σ = 1. As the paper has it, with norm="lost",
    ĥ = z·W′ + s·h and there is no b. c and φ are there where features are selected, g where they are gated.

    Nothing is kept between calls: `encode` returns all that `decode` needs.

    Args:
        hidden: width of the residual stream.
        width: features.
        form: see `Form`.

    Source: AdaptiveCompress, equations (3) and (4); with select, TopK and BatchTopK dictionaries (arXiv 2406.04093,
    2412.06410).
    """

    gate: Tensor

    def __init__(
        self,
        hidden: int,
        width: int,
        form: Form | None = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.form = form or Form()
        made = {"device": device, "dtype": dtype}
        self.encoder = nn.Parameter(torch.zeros(hidden, width, **made))  # type: ignore[arg-type]
        self.decoder = nn.Parameter(torch.zeros(width, hidden, **made))  # type: ignore[arg-type]
        if self.form.norm != "lost":
            self.center = nn.Parameter(torch.zeros(hidden, **made))  # type: ignore[arg-type]
        if self.form.select != "all":
            self.bias = nn.Parameter(torch.zeros(width, **made))  # type: ignore[arg-type]
        if self.form.select == "above":
            self.threshold = nn.Parameter(torch.zeros(width, **made))  # type: ignore[arg-type]
        if self.form.gated:
            self.register_buffer("gate", torch.ones(width, **made))  # type: ignore[arg-type]

    def read(self, stream: Tensor) -> tuple[Tensor, Context]:
        """u of (..., hidden), as (..., width): features before any is selected; and what decoding needs."""
        if self.form.norm == "none":
            mean, spread = stream.new_zeros(*stream.shape[:-1], 1), stream.new_ones(*stream.shape[:-1], 1)
            normed = stream
        else:
            mean = stream.mean(-1, keepdim=True)
            spread = torch.sqrt(stream.var(-1, keepdim=True, correction=0) + _EPSILON)
            normed = (stream - mean) / spread
        if self.form.norm != "lost":
            normed = normed - self.center
        features = normed @ self.encoder
        return (features if self.form.select == "all" else features + self.bias), Context(stream, mean, spread)

    def select(self, features: Tensor) -> Tensor:
        """z of u: the code."""
        if self.form.select == "top":
            kept = features.topk(min(self.form.active or 0, features.shape[-1]), dim=-1)
            features = torch.zeros_like(features).scatter(-1, kept.indices, kept.values.relu())
        elif self.form.select == "above":
            features = features.relu() * (features > self.threshold)
        return features * self.gate if self.form.gated else features

    def encode(self, stream: Tensor) -> tuple[Tensor, Context]:
        """The code of (..., hidden), as (..., width), and what decoding needs beside it."""
        features, context = self.read(stream)
        return self.select(features), context

    def decode(self, code: Tensor, context: Context) -> Tensor:
        """The stream (..., hidden) from its code and what `encode` gave beside it."""
        decoded, passing = code @ self.decoder, 1 - self.form.skip
        if self.form.norm != "lost":
            decoded = context.spread * (decoded + passing * self.center) + passing * context.mean
        return decoded + self.form.skip * context.stream

    def forward(self, stream: Tensor) -> Tensor:
        return self.decode(*self.encode(stream))

    def extra_repr(self) -> str:
        hidden, width = self.encoder.shape
        return f"hidden={hidden}, width={width}, {self.form}"


def through_bottleneck(block: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
    """The forward hook by which a block's output, a tensor or what begins with it, passes through its bottleneck.

    By name: so a copy of the block passes through its own.
    """
    return squeezed(block._modules[BOTTLENECK], output)


def squeezed(bottleneck: Any, output: Any) -> Any:
    """What a block returned, with its stream passed through a bottleneck."""
    if type(output) in (tuple, list):
        return type(output)([bottleneck(output[0]), *output[1:]])
    return bottleneck(output)
