"""A linear map stored in few bits, each group of weights in as many as it is worth.

A row of the weight is cut into groups of `group_size` neighbours. Of a group of b bits are kept its b·group_size bits,
a step and, unless symmetric, a zero: w ≈ step·(q − zero), q in 0 … 2ᵇ − 1; where no zero is kept it is 2ᵇ⁻¹. The bits
lie in planes: first the lowest bit of every group, then the next bit of those groups that have more than one, and so
on. So any mixture of widths is stored without a gap and unpacked in as many steps as the widest group has bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from hf_compress.modules.compact import CompactLinear
from hf_compress.numerics.factor import Factor
from hf_compress.numerics.rounding import Grids, compensated

MAX_BITS = 16


@dataclass(frozen=True)
class Packing:
    """How a weight (outputs, inputs) is packed.

    Attributes:
        outputs, inputs: shape of the weight.
        group_size: weights a group; a multiple of 8 that divides `inputs`.
        planes: how many groups have more than 0, 1, 2, … bits.
        symmetric: whether the zero is the middle of the range, and not stored.
    """

    outputs: int
    inputs: int
    group_size: int
    planes: tuple[int, ...]
    symmetric: bool = True

    def __post_init__(self) -> None:
        if self.group_size < 8 or self.group_size % 8 or self.inputs % self.group_size:
            raise ValueError(
                f"group_size must be a multiple of 8 that divides the {self.inputs} inputs; got {self.group_size}"
            )
        falling = [self.groups, *self.planes]
        if len(self.planes) > MAX_BITS or not self.planes or falling[1] != self.groups or min(falling) < 1:
            raise ValueError(
                f"planes must be 1 to {MAX_BITS} positive numbers of groups, the first all {self.groups}; "
                f"got {self.planes}"
            )
        if sorted(falling, reverse=True) != falling:
            raise ValueError(f"a group with more bits has the lower ones too: planes must fall; got {self.planes}")
        if self.symmetric and self.planes[1:2] != (self.groups,):
            raise ValueError("a symmetric group of 1 bit would have no positive value: give it 2, or symmetric=False")
        if not self.symmetric and len(self.planes) > 8:
            raise ValueError(f"zeros are stored in 8 bits: {len(self.planes)}-bit groups must be symmetric")

    @property
    def groups(self) -> int:
        return self.outputs * (self.inputs // self.group_size)

    @property
    def payload(self) -> int:
        """Bytes of all bits."""
        return sum(self.planes) * self.group_size // 8

    @property
    def stored_bytes(self) -> int:
        """Bytes of all buffers: bits, and of each group a step, how many bits it has and, if it is kept, its zero."""
        return self.payload + self.groups * (3 if self.symmetric else 4)

    @staticmethod
    def of(shape: Sequence[int], bits: Tensor, group_size: int, symmetric: bool = True) -> Packing:
        """The packing of a weight (outputs, inputs) by the number of bits of every group, (groups,)."""
        planes = tuple(int((bits > plane).sum()) for plane in range(int(bits.max())))
        return Packing(shape[0], shape[1], group_size, planes, symmetric)


def filled(count: int, group_size: int) -> int:
    """How many weights whole groups have that hold so many."""
    return -(-count // group_size) * group_size


def fill_rows(weight: Tensor, group_size: int) -> Tensor:
    """A weight (outputs, inputs) with zeros behind its rows, up to whole groups."""
    return functional.pad(weight, (0, filled(weight.shape[1], group_size) - weight.shape[1]))


class PackedLinear(CompactLinear):
    """What linear maps that are stored packed have in common: the buffers.

    The packed weight goes by the name `weight`, with one dimension, and is no parameter: what is packed is not trained.
    Its bytes are int8, for T5 casts what a linear map reads to the dtype of its weight, unless that is int8.
    Steps are bfloat16, kept as int16 so that a cast of the model leaves them alone. That they are coarse does no harm,
    since weights are rounded to multiples of what is kept; and they reach as far down as those of 16 bits need.
    """

    weight: Tensor
    bits: Tensor
    steps: Tensor
    zeros: Tensor

    def _hold(self, packing: Packing, device: str | torch.device | None) -> None:
        """Make the buffers of a packing."""
        self.packing = packing
        self.register_buffer("weight", torch.zeros(packing.payload, dtype=torch.int8, device=device))
        self.register_buffer("bits", torch.zeros(packing.groups, dtype=torch.uint8, device=device))
        self.register_buffer("steps", torch.zeros(packing.groups, dtype=torch.int16, device=device))
        if not packing.symmetric:
            self.register_buffer("zeros", torch.zeros(packing.groups, dtype=torch.uint8, device=device))

    def _values(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weights (packing.outputs, packing.inputs) that the packed bits stand for."""
        if len(self.packing.planes) > 8 or dtype == torch.float16:
            dtype = torch.float32  # numbers of more bits than a short float has, or steps smaller than it reaches
        steps = self.steps.view(torch.bfloat16).to(dtype)
        return self._multiples(dtype).mul_(steps[:, None]).view(self.packing.outputs, self.packing.inputs)

    def _multiples(self, dtype: torch.dtype) -> Tensor:
        """The weights as multiples of their group's step, q − zero, (groups, group_size)."""
        planes = len(self.packing.planes)
        values = self._lanes(range(min(8, planes))).to(dtype)
        if planes > 8:
            values += 256 * self._lanes(range(8, planes)).to(dtype)
        zeros = 1 << (self.bits.int() - 1).clamp(min=0) if self.packing.symmetric else self.zeros
        return values.sub_(zeros[:, None].to(dtype))

    def _lanes(self, planes: range) -> Tensor:
        """The numbers that up to eight planes of bits make up, (groups, group_size) uint8.

        A table turns a byte of eight weights' bits into eight bytes of one, handled as one number of 64 bits.
        """
        packing = self.packing
        self._check_stored(packing.payload)
        table = unpack_bits(torch.arange(256, device=self.weight.device).to(torch.uint8)[:, None])
        wide = table.view(torch.int64)[:, 0]
        values = torch.zeros(packing.groups, packing.group_size // 8, dtype=torch.int64, device=self.weight.device)
        packed = self.weight.view(torch.uint8)
        for plane in planes:
            start, count = sum(packing.planes[:plane]), packing.planes[plane]
            size = packing.group_size // 8
            bits = wide[packed[start * size : (start + count) * size].view(count, size).int()] << plane - planes[0]
            if count == packing.groups:
                values |= bits
            else:
                values[self.bits > plane] |= bits
        return values.view(torch.uint8)


class MixedPrecisionLinear(PackedLinear):
    """A linear map whose weight is packed; computes with the unpacked weight in the inputs' dtype.

    Args:
        packing: how the weight is packed, its rows filled up with zeros to whole groups.
        bias: whether a bias (outputs,) is added, in the model's dtype.
        inputs: of the linear map, where they are fewer than those of the packing.
    """

    def __init__(
        self,
        packing: Packing,
        bias: bool,
        inputs: int | None = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(inputs or packing.inputs, packing.outputs)
        self._hold(packing, device)
        made = nn.Parameter(torch.zeros(packing.outputs, device=device, dtype=dtype)) if bias else None
        self.register_parameter("bias", made)

    @property
    def packed_weights(self) -> int:
        return self.in_features * self.out_features

    def unpacked(self) -> Tensor:
        """The weight (outputs, inputs) that the packed bits stand for, float32."""
        return self._values()[:, : self.in_features]

    def multiples(self) -> tuple[Tensor, Tensor]:
        """The weight as whole multiples of steps: (outputs, packing.inputs) int32, and the steps, (outputs, groups)."""
        steps = self.steps.view(torch.bfloat16).view(self.out_features, -1)
        return self._multiples(torch.int32).view(self.out_features, -1), steps

    def forward(self, inputs: Tensor) -> Tensor:
        return functional.linear(inputs, self.dense(inputs.dtype), self.bias)

    def _dense(self, dtype: torch.dtype) -> Tensor:
        # Each product of a whole number and a step is rounded once, so the dtype of the computation does no harm.
        return self._values(dtype)[:, : self.in_features].to(dtype)

    def extra_repr(self) -> str:
        weights = self.in_features * self.out_features
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"bits a weight={8 * self.packing.payload / weights:.2f}"
        )


def pack(
    weight: Tensor, bits: Tensor, group_size: int, symmetric: bool = True, gram: Tensor | Factor | None = None
) -> tuple[Packing, dict[str, Tensor]]:
    """Round a weight, group by group, and pack it.

    Args:
        weight: (outputs, inputs), finite; rows are filled up with zeros to whole groups.
        bits: of every group, (outputs, groups of a row), 1 to 16.
        group_size: weights a group.
        symmetric: whether each group's range is laid evenly around 0, which needs no stored zeros.
        gram: Σ x xᵀ of what the linear map reads, (inputs, inputs), or its factor, where several maps read the same:
            then the rounding of each weight makes up for the errors of those before it; to nearest without.

    Returns:
        The packing, and the buffers of a `MixedPrecisionLinear`: weight, bits, steps and, unless symmetric, zeros.

    Raises:
        ValueError: shapes or bits do not fit, or the weight is not finite.
    """
    fits = weight.ndim == 2 and weight.numel() > 0 and group_size > 0
    if not fits or bits.shape != (len(weight), filled(weight.shape[1], group_size) // group_size):
        raise ValueError(
            f"a weight {tuple(weight.shape)} in groups of {group_size} needs bits (outputs, inputs / {group_size}, "
            f"rounded up); got {tuple(bits.shape)}"
        )
    if bits.is_floating_point() or not torch.isfinite(weight).all():
        raise ValueError("the weight holds NaN or infinity, or bits are no whole numbers: it cannot be packed")
    if bits.min() < 1 or bits.max() > MAX_BITS:
        raise ValueError(f"bits must be between 1 and {MAX_BITS}; got {int(bits.min())} to {int(bits.max())}")
    bits = bits.to(weight.device)
    missing = filled(weight.shape[1], group_size) - weight.shape[1]
    packing = Packing.of((len(weight), weight.shape[1] + missing), bits.flatten(), group_size, symmetric)
    if gram is not None:
        _, q, grids = compensated(weight, gram, bits=bits, group_size=group_size, symmetric=symmetric)
        assert q is not None
        assert grids is not None
        zeros = grids.zeros.view(len(weight), -1)[:, -1:].expand(-1, missing)
        q = torch.cat([q, zeros], dim=1).view(packing.groups, group_size)
    else:
        groups = fill_rows(weight.detach().float(), group_size).reshape(packing.groups, group_size)
        grids = Grids.of(groups, bits.flatten().int(), symmetric)
        q = grids.round(groups)
    return packing, _packed(q, grids, bits.flatten().to(torch.uint8), packing)


def _packed(q: Tensor, grids: Grids, bits: Tensor, packing: Packing) -> dict[str, Tensor]:
    """The buffers of numbers q (groups, group_size) on grids."""
    bytes_of = [(q >> shift).to(torch.uint8) for shift in range(0, len(packing.planes), 8)]
    planes = []
    for plane, count in enumerate(packing.planes):
        part = bytes_of[plane // 8]
        part = part if count == packing.groups else part[bits > plane]
        planes.append(pack_bits((part >> plane % 8) & 1).flatten())
    tensors = {"weight": torch.cat(planes).view(torch.int8), "bits": bits, "steps": grids.steps}
    return tensors if packing.symmetric else {**tensors, "zeros": grids.zeros.to(torch.uint8)}


def pack_bits(ones: Tensor) -> Tensor:
    """Bytes (n, m/8) of bits (n, m) uint8, the first bit lowest.

    Eight bytes of one bit each are taken for one number, x_0 + 2⁸ x_1 + …. Its product with Σ 2⁸ᵏ 2⁷⁻ᵏ has
    x_0 + 2 x_1 + … in the eighth byte, and no carry comes there from those below.
    """
    eights = ones.contiguous().view(torch.int64)
    return ((eights * 0x0102040810204080) >> 56).to(torch.uint8)


def unpack_bits(packed: Tensor) -> Tensor:
    """The inverse of `pack_bits`, uint8."""
    shifts = torch.arange(8, device=packed.device, dtype=torch.uint8)
    return ((packed[..., None] >> shifts) & 1).flatten(1)
