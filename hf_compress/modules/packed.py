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

    @staticmethod
    def of(shape: Sequence[int], bits: Tensor, group_size: int, symmetric: bool = True) -> Packing:
        """The packing of a weight (outputs, inputs) by the number of bits of every group, (groups,)."""
        planes = tuple(int((bits > plane).sum()) for plane in range(int(bits.max())))
        return Packing(shape[0], shape[1], group_size, planes, symmetric)


class MixedPrecisionLinear(nn.Module):
    """A linear map whose weight is packed; computes with the unpacked weight in the inputs' dtype.

    The packed weight goes by the name `weight`, with one dimension, and is no parameter: what is packed is not trained.
    Steps are bfloat16, kept as int16 so that a cast of the model leaves them alone. That they are coarse does no harm,
    since weights are rounded to multiples of what is kept; and they reach as far down as those of 16 bits need.

    Args:
        packing: how the weight is packed.
        bias: whether a bias (outputs,) is added, in the model's dtype.
    """

    weight: Tensor
    bits: Tensor
    steps: Tensor
    zeros: Tensor

    def __init__(
        self,
        packing: Packing,
        bias: bool,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.packing = packing
        self.in_features, self.out_features = packing.inputs, packing.outputs
        self.register_buffer("weight", torch.zeros(packing.payload, dtype=torch.uint8, device=device))
        self.register_buffer("bits", torch.zeros(packing.groups, dtype=torch.uint8, device=device))
        self.register_buffer("steps", torch.zeros(packing.groups, dtype=torch.int16, device=device))
        if not packing.symmetric:
            self.register_buffer("zeros", torch.zeros(packing.groups, dtype=torch.uint8, device=device))
        self.bias = nn.Parameter(torch.zeros(packing.outputs, device=device, dtype=dtype)) if bias else None

    def unpacked(self) -> Tensor:
        """The weight (outputs, inputs) that the packed bits stand for, float32."""
        packing, groups, start = self.packing, self.packing.groups, 0
        values = torch.zeros(groups, packing.group_size, dtype=torch.int32, device=self.weight.device)
        for plane, count in enumerate(packing.planes):
            size = count * packing.group_size // 8
            ones = _unpack_bits(self.weight[start : start + size].view(count, -1)) << plane
            values[self.bits > plane] += ones
            start += size
        middle = 1 << (self.bits.int() - 1).clamp(min=0)
        zeros = middle if packing.symmetric else self.zeros.int()
        steps = self.steps.view(torch.bfloat16).float()
        return (steps[:, None] * (values - zeros[:, None])).view(packing.outputs, packing.inputs)

    def forward(self, inputs: Tensor) -> Tensor:
        return functional.linear(inputs, self.unpacked().to(inputs.dtype), self.bias)

    def extra_repr(self) -> str:
        weights = self.in_features * self.out_features
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"bits a weight={8 * self.packing.payload / weights:.2f}"
        )


def pack(weight: Tensor, bits: Tensor, group_size: int, symmetric: bool = True) -> tuple[Packing, dict[str, Tensor]]:
    """Round a weight to nearest, group by group, and pack it.

    Args:
        weight: (outputs, inputs), finite.
        bits: of every group, (outputs, inputs / group_size), 1 to 16.
        group_size: weights a group.
        symmetric: whether each group's range is laid evenly around 0, which needs no stored zeros.

    Returns:
        The packing, and the buffers of a `MixedPrecisionLinear`: weight, bits, steps and, unless symmetric, zeros.

    Raises:
        ValueError: shapes or bits do not fit, or the weight is not finite.
    """
    fits = weight.ndim == 2 and len(weight) > 0 and group_size != 0 and weight.shape[1] % group_size == 0
    if not fits or bits.shape != (len(weight), weight.shape[1] // group_size):
        raise ValueError(
            f"a weight {tuple(weight.shape)} in groups of {group_size} needs bits (outputs, inputs / {group_size}); "
            f"got {tuple(bits.shape)}"
        )
    if bits.is_floating_point() or not torch.isfinite(weight).all():
        raise ValueError("the weight holds NaN or infinity, or bits are no whole numbers: it cannot be packed")
    if bits.min() < 1 or bits.max() > MAX_BITS:
        raise ValueError(f"bits must be between 1 and {MAX_BITS}; got {int(bits.min())} to {int(bits.max())}")
    bits = bits.flatten().to(torch.uint8)
    packing = Packing.of(weight.shape, bits, group_size, symmetric)
    groups = weight.detach().float().reshape(packing.groups, group_size)
    values, steps, zeros = _quantize(groups, bits.int(), symmetric)
    planes = [_pack_bits((values[bits > plane] >> plane) & 1) for plane in range(len(packing.planes))]
    tensors = {"weight": torch.cat([p.flatten() for p in planes]), "bits": bits, "steps": steps}
    return packing, tensors if symmetric else {**tensors, "zeros": zeros.to(torch.uint8)}


def _quantize(groups: Tensor, bits: Tensor, symmetric: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Integers (groups, group_size), steps as they are stored, and zeros (groups,) by rounding to nearest."""
    top = (1 << bits) - 1
    if symmetric:
        zeros = 1 << (bits - 1)
        reach = groups.abs().amax(1) / (zeros - 1).clamp(min=1)  # as far up as down, so that nothing is cut off
    else:
        low, high = groups.amin(1).clamp(max=0), groups.amax(1).clamp(min=0)
        reach = (high - low) / top
    # The upper half of a float32 is a bfloat16; rounded up, so that the largest weight is still within reach.
    steps = ((reach.view(torch.int32) + 0xFFFF) >> 16).to(torch.int16)
    kept = steps.view(torch.bfloat16).float()
    if not torch.isfinite(kept).all():
        raise ValueError(f"the weight reaches {float(groups.abs().max()):.3g}, for which no step can be stored")
    safe = torch.where(kept > 0, kept, 1.0)
    if not symmetric:
        zeros = (-low / safe).round().int().clamp(min=0).minimum(top)
    values = (groups / safe[:, None]).round().int() + zeros[:, None]
    return values.clamp(min=0).minimum(top[:, None]), steps, zeros


def _pack_bits(ones: Tensor) -> Tensor:
    """Bytes (n, m/8) of bits (n, m), the first bit lowest."""
    shifts = torch.arange(8, device=ones.device)
    return (ones.view(len(ones), -1, 8) << shifts).sum(-1).to(torch.uint8)


def _unpack_bits(packed: Tensor) -> Tensor:
    """The inverse of `_pack_bits`, int32."""
    shifts = torch.arange(8, device=packed.device, dtype=torch.uint8)
    return ((packed[..., None] >> shifts) & 1).flatten(1).int()
