"""A linear map with two kinds of weights, told apart by a bit each: kept and left out, or in more and fewer bits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from hf_compress.modules.packed import PackedLinear, Packing, fill_rows, filled, pack, pack_bits, unpack_bits

_PIECE = 2**18  # weights; their places take sixteen bytes each
GROUP = 64  # values in a row of their own that share a grid


class SparseLinear(PackedLinear):
    """A linear map that stores the weights at the ones of a mask, row by row; computes with the whole matrix.

    The others are 0, or, with `rest`, stored behind them. What is stored goes by the name `weight`, with one dimension.
    It is trained like any other, and stays sparse, unless it is packed.

    Args:
        inputs, outputs: shape of the weight.
        kept: how many ones the mask has.
        bias: whether a bias (outputs,) is added.
        packing: how the values are packed, as one row, both kinds filled up with zeros to whole groups; None for
            numbers in the model's dtype.
        rest: whether the weights at the zeros of the mask are stored as well.

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
        rest: bool = False,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(inputs, outputs)
        if not 1 <= kept <= inputs * outputs:
            raise ValueError(f"kept is {kept}; expected 1 to the number of weights, {inputs * outputs}")
        self.kept, self.rest = kept, rest
        others = inputs * outputs - kept if rest else 0
        self.register_buffer("mask", torch.zeros(-(-inputs * outputs // 8), dtype=torch.uint8, device=device))
        if packing is None:
            self.weight: Any = nn.Parameter(torch.zeros(kept + others, device=device, dtype=dtype))
        elif (packing.outputs, packing.inputs) != (1, row_length(kept, others, packing.group_size)):
            raise ValueError(
                f"a packing of {packing.outputs} × {packing.inputs} values does not hold {kept} and {others} in a row"
            )
        else:
            self._hold(packing, device)
        made = nn.Parameter(torch.zeros(outputs, device=device, dtype=dtype)) if bias else None
        self.register_parameter("bias", made)

    @property
    def packed_weights(self) -> int:
        if isinstance(self.weight, nn.Parameter):
            return 0
        return self.in_features * self.out_features if self.rest else self.kept

    def unpacked(self) -> Tensor:
        """The weight (outputs, inputs) with its zeros; packed values are float32."""
        packed = not isinstance(self.weight, nn.Parameter)
        if not packed:
            self._check_stored(self.kept + (self.in_features * self.out_features - self.kept) * self.rest)
        values = self._values()[0] if packed else self.weight
        ones = unpack_bits(self.mask[None])[0, : self.in_features * self.out_features].bool()
        dense = torch.zeros(ones.shape, dtype=values.dtype, device=values.device).masked_scatter(ones, values)
        if self.rest:
            start = filled(self.kept, self.packing.group_size) if packed else self.kept
            dense = dense.masked_scatter(~ones, values[start:])
        return dense.view(self.out_features, self.in_features)

    def forward(self, inputs: Tensor) -> Tensor:
        return functional.linear(inputs, self.dense(inputs.dtype), self.bias)

    def _dense(self, dtype: torch.dtype) -> Tensor:
        return self.unpacked().to(dtype)

    def extra_repr(self) -> str:
        share = self.kept / (self.in_features * self.out_features)
        return f"in_features={self.in_features}, out_features={self.out_features}, ones={share:.1%}, rest={self.rest}"


def at_ones(values: Tensor, mask: Tensor) -> Tensor:
    """The values at the ones of a mask of their shape, (ones), row by row; some rows at a time."""
    rows = max(1, _PIECE // max(1, mask.shape[1]))
    return torch.cat([own[ones] for own, ones in zip(values.split(rows), mask.split(rows), strict=True)])


def pack_mask(mask: Tensor) -> Tensor:
    """Bytes of a bool mask, (ceil(size / 8)) uint8, row by row."""
    flat = mask.flatten().to(torch.uint8)
    return pack_bits(functional.pad(flat, (0, -len(flat) % 8))[None])[0]


def unpack_mask(packed: Tensor, shape: torch.Size) -> Tensor:
    """The inverse of `pack_mask`, of a shape."""
    return unpack_bits(packed[None])[0, : shape.numel()].bool().view(shape)


def row_length(kept: int, others: int, group_size: int) -> int:
    """Values in a row that holds two kinds of weights, each in whole groups."""
    return filled(kept, group_size) + filled(others, group_size)


def pack_row(
    parts: Sequence[Tensor], bits: Tensor, group_size: int, symmetric: bool
) -> tuple[Packing, dict[str, Tensor]]:
    """The values of one kind of weights, or of both, packed as one row; bits of each group."""
    row = torch.cat([fill_rows(part.float()[None], group_size) for part in parts], dim=1)
    return pack(row, bits[None], group_size, symmetric)
