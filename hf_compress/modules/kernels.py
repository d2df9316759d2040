"""Packed linear maps that PyTorch's kernel for four bits computes, on a CPU."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from hf_compress.checks import check
from hf_compress.errors import UnsupportedModelError
from hf_compress.modules.compact import CompactLinear, DenseWeights
from hf_compress.modules.packed import MixedPrecisionLinear
from hf_compress.numerics.aside import give_back
from hf_compress.numerics.four_bit import Form, can_write_out, digit_product, digits_of, fits_kernel, written_out

logger = logging.getLogger(__name__)

_MANY = 64  # rows from which on it is faster to write the matrix out than to ask the kernel


class KernelLinear(CompactLinear):
    """A packed linear map in the form that the kernel reads: half a byte a weight, or a whole one beyond four bits.

    Long inputs are multiplied with the matrix, which is written out for it, some columns at a time. For inference on
    the processor that it was made on: without gradients, and not to be saved.

    Args:
        packed: what it computes the same as, on a CPU.
        forms: of `digits_of`.
    """

    low_digits: Tensor
    low_scales: Tensor
    high_digits: Tensor
    high_scales: Tensor

    def __init__(self, packed: MixedPrecisionLinear, forms: list[Form]) -> None:
        super().__init__(packed.in_features, packed.out_features)
        self.packing, self.bias = packed.packing, packed.bias
        for name, (digits, scales) in zip(("low", "high"), forms, strict=False):
            self.register_buffer(f"{name}_digits", digits, persistent=False)
            # As whole numbers, so that a cast of the model leaves them alone.
            self.register_buffer(f"{name}_scales", scales.view(torch.int16), persistent=False)
        self.digits = len(forms)
        self.can_write_out = can_write_out(len(forms[0][0]))
        self._stored = torch.empty(self.packing.stored_bytes, dtype=torch.int8, device="meta")

    @property
    def packed_weights(self) -> int:
        return self.in_features * self.out_features

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """Bytes of the low digits, int8: whoever asks for a weight learns no more than that it is a packed one."""
        return self.low_digits.view(torch.int8)

    def forward(self, inputs: Tensor) -> Tensor:
        rows = inputs.reshape(-1, inputs.shape[-1])
        if len(rows) < _MANY or not self.can_write_out:
            product = self._by_kernel(rows)
        elif self._kept is not None:
            product = functional.linear(rows, self.dense(inputs.dtype))
        else:
            product = self._with_columns(rows)
        if self.bias is not None:
            product += self.bias
        return product.reshape(*inputs.shape[:-1], self.out_features)

    def _by_kernel(self, rows: Tensor) -> Tensor:
        filled = functional.pad(rows, (0, self.packing.inputs - self.in_features))
        first, *others = (digit_product(filled, *form, self.out_features) for form in self._forms())
        return sum(others, first)

    def _with_columns(self, rows: Tensor) -> Tensor:
        product = rows.new_empty(len(rows), self.out_features)
        for columns, part in written_out(self._forms(), rows.dtype):
            own = product[:, columns]
            own.copy_(rows @ part[: self.in_features, : own.shape[1]])
        return product

    def _dense(self, dtype: torch.dtype) -> Tensor:
        if not self.can_write_out:
            return self._by_kernel(torch.eye(self.in_features, dtype=dtype)).T.contiguous()
        matrix = torch.empty(self.out_features, self.in_features, dtype=dtype)
        for columns, part in written_out(self._forms(), dtype):
            own = matrix[columns]
            own.copy_(part[: self.in_features, : len(own)].T)
        return matrix

    def _forms(self) -> list[Form]:
        forms = [(self.low_digits, self.low_scales)]
        forms += [(self.high_digits, self.high_scales)] if self.digits > 1 else []
        return [(digits, scales.view(torch.bfloat16)) for digits, scales in forms]

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        if not keep_vars:
            raise _refusal(prefix.rstrip("."))
        destination[f"{prefix}weight"] = self._stored  # of the packed weight there is no more than its size
        if self.bias is not None:
            destination[f"{prefix}bias"] = self.bias

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, digits={self.digits}"


def use_kernels(model: nn.Module, room: int = 0) -> list[str]:
    """Let packed linear maps compute with PyTorch's kernel for four bits, for inference in bfloat16 on a CPU.

    Decoding becomes faster than with dense weights, and long inputs a little slower. In memory a weight takes half a
    byte, or a whole one in maps with groups of more than four bits. The model cannot be saved or trained any more: load
    it again for that.

    Args:
        model: changed in place.
        room: bytes of memory for matrices that are kept, once they have been written out for a long input, beside what
            the kernel reads: then such inputs take as long as with dense weights. As much as the model's linear maps
            take in bfloat16 keeps all.

    Returns:
        The paths of the linear maps that the kernel computes from now on. Those that it cannot do with, of groups that
        are no multiple of 32 weights or have more than eight bits, stay as they are, and a warning says how many.

    Raises:
        ValueError: the model is not in bfloat16 on a CPU; `room` is below 0.
    """
    check("room", room, int, "[0, inf)")
    modules = model.named_modules(remove_duplicate=False)
    packed = {path: part for path, part in modules if isinstance(part, MixedPrecisionLinear)}
    _check_fast(model, packed)
    using: dict[str, KernelLinear] = {}
    made: dict[int, KernelLinear] = {}  # of those that stand at several paths
    count = len(packed)
    for path in list(packed):
        part = packed.pop(path)  # and so out of memory once it is replaced
        multiples, steps = part.multiples()
        if fits_kernel(multiples, part.packing.group_size):
            if id(part) not in made:
                made[id(part)] = KernelLinear(part, digits_of(multiples, steps)).train(part.training)
            using[path] = made[id(part)]
            model.set_submodule(path, using[path])
    if room:
        kept = DenseWeights(room)
        for own in made.values():
            own._kept = kept
    if using:
        give_back()  # what was only needed to make the digits
    if len(using) < count:
        logger.warning(
            "%d of %d packed linear maps go on without the kernel, which is for groups of a multiple of 32 weights and "
            "up to eight bits",
            count - len(using),
            count,
        )
    return list(using)


def check_no_kernels(model: nn.Module) -> None:
    """Raise UnsupportedModelError where `use_kernels` has been at work: what was stored is no longer there."""
    for path, part in model.named_modules():
        if isinstance(part, KernelLinear):
            raise _refusal(path)


def _refusal(path: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{path or 'the linear map'} is in a form for this processor alone, which hf_compress.use_kernels gave it, and "
        "can be neither saved, changed nor explained: load the model again for that"
    )


def _check_fast(model: nn.Module, packed: Mapping[str, MixedPrecisionLinear]) -> None:
    """Raise ValueError unless the packed maps are on a CPU, and most of the other weights in bfloat16."""
    counts: Counter[torch.dtype] = Counter()
    for parameter in model.parameters():
        counts[parameter.dtype] += parameter.numel()
    dtype = counts.most_common(1)[0][0] if packed and counts else torch.bfloat16
    devices = {part.weight.device for part in packed.values()}
    if dtype != torch.bfloat16 or any(device.type != "cpu" for device in devices):
        raise ValueError(
            f"the kernel is fast in bfloat16 on a CPU alone, and the model is in {dtype} on "
            f"{', '.join(map(str, devices))}: load it with dtype=torch.bfloat16, or go on without the kernel"
        )
