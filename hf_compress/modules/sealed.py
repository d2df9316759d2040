"""A seal, so that nothing but this library can load a model whose changes stock Transformers would not notice."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class Sealed(nn.Module):
    """A module that computes what it did, but whose weight is stored under another name.

    Under the old name, `weight`, there is an empty tensor. Stock Transformers, which only warns about weights that are
    missing or left over, stops at a weight of the wrong shape. So a change that leaves all shapes as they were, such
    as another activation, comes with a seal on one norm beside it.
    """

    weight: Tensor

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        # Of the same dtype, for code that looks up in what dtype a norm computes.
        self.register_buffer("weight", next(inner.parameters()).new_empty(0))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner(*args, **kwargs)
