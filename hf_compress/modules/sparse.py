"""A linear map of which most weights are 0: a bit for every weight, and the values of the others."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from hf_compress.modules.packed import PackedLinear, Packing, filled, pack, pack_bits, unpack_bits

GROUP = 64  # values in a row of their own that share a grid


class SparseLinear(PackedLinear):
    """A linear map that stores the weights at the ones of a mask, row by row; computes with the whole matrix.

    What is stored goes by the name `weight`, with one dimension. It is trained like any other, and stays sparse, unless
    it is packed.

    Args:
        inputs, outputs: shape of the weight.
        kept: how many weights are stored.
        bias: whether a bias (outputs,) is added.
        packing: how the values are packed, as one row, filled up with zeros; None for numbers in the model's dtype.

    Raises:
        ValueError: more weights than there are, none, or a packing of another number of values.
    """

    mask: Tensor

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kept: int,
        bias: bool,
        packing: Packing | None = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not 1 <= kept <= inputs * outputs:
            raise ValueError(f"kept is {kept}; expected 1 to the number of weights, {inputs * outputs}")
        self.in_features, self.out_features, self.kept = inputs, outputs, kept
        self.register_buffer("mask", torch.zeros(-(-inputs * outputs // 8), dtype=torch.uint8, device=device))
        if packing is None:
            self.weight: Any = nn.Parameter(torch.zeros(kept, device=device, dtype=dtype))
        elif (packing.outputs, packing.inputs) != (1, filled(kept, packing.group_size)):
            raise ValueError(f"a packing of {packing.outputs} × {packing.inputs} values does not hold {kept} in a row")
        else:
            self._hold(packing, device)
        self.bias = nn.Parameter(torch.zeros(outputs, device=device, dtype=dtype)) if bias else None

    def unpacked(self) -> Tensor:
        """The weight (outputs, inputs) with its zeros; packed values are float32."""
        values = self.weight if isinstance(self.weight, nn.Parameter) else self._values()[0, : self.kept]
        ones = unpack_bits(self.mask[None])[0, : self.in_features * self.out_features].bool()
        dense = torch.zeros(ones.shape, dtype=values.dtype, device=values.device)
        return dense.masked_scatter(ones, values).view(self.out_features, self.in_features)

    def forward(self, inputs: Tensor) -> Tensor:
        return functional.linear(inputs, self.unpacked().to(inputs.dtype), self.bias)

    def extra_repr(self) -> str:
        share = 1 - self.kept / (self.in_features * self.out_features)
        return f"in_features={self.in_features}, out_features={self.out_features}, zeros={share:.1%}"


def pack_mask(mask: Tensor) -> Tensor:
    """Bytes of a bool mask, (ceil(size / 8)) uint8, row by row."""
    flat = mask.flatten().int()
    return pack_bits(functional.pad(flat, (0, -len(flat) % 8))[None])[0]


def pack_row(values: Tensor, bits: Tensor, group_size: int, symmetric: bool) -> tuple[Packing, dict[str, Tensor]]:
    """Values (kept) packed as one row; bits of each group."""
    return pack(values[None], bits[None], group_size, symmetric)
