"""The format "pack-quantized" of compressed-tensors: packed linear maps as tensors and as JSON, and back.

Read off compressed-tensors 0.15.0 and 0.20.0 (`compressors/pack_quantized`, `quantization/lifecycle`). Of a linear map
(outputs, inputs) with b bits a weight, in groups of g along a row, it keeps

- `weight_packed` int32 (outputs, inputs·b/32): q in 0 … 2ᵇ − 1, the first weight in the lowest bits of a word;
- `weight_scale` (outputs, inputs/g), in the model's dtype;
- `weight_zero_point` int32 (outputs·b/32 rounded up, inputs/g), packed down the columns; none where it is 2ᵇ⁻¹;
- `weight_shape` int64 (2): outputs, inputs.

A weight is scale · (q − zero), computed in the dtype of the scale. Bits that do not divide 32 are laid out in one way
up to 0.17 and in another since, under one name.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hf_compress.modules.packed import MixedPrecisionLinear

BITS = (4, 8)  # which all versions lay out alike, and vLLM has kernels for
PARTS = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape")
_FORMAT = "pack-quantized"

Packed = Mapping[str, MixedPrecisionLinear]  # by the path in the model


def quantization_of(packed: Packed, others: Iterable[str]) -> dict[str, Any]:
    """What config.json says under `quantization_config`: maps by their paths, a group for each way of packing.

    Args:
        others: the paths of the linear maps that are not packed.
    """
    groups: dict[tuple[int, bool, int], list[str]] = {}
    for path, module in packed.items():
        packing = module.packing
        groups.setdefault((len(packing.planes), packing.symmetric, packing.group_size), []).append(path)
    return {
        "quant_method": "compressed-tensors",
        "format": _FORMAT,
        "quantization_status": "compressed",
        "ignore": list(others),
        "config_groups": {f"group_{i}": _group(*way, paths) for i, (way, paths) in enumerate(groups.items())},
    }


def _group(bits: int, symmetric: bool, group_size: int, paths: list[str]) -> dict[str, Any]:
    weights = {
        "num_bits": bits,
        "type": "int",
        "symmetric": symmetric,
        "strategy": "group",
        "group_size": group_size,
        "dynamic": False,
    }
    rest = {"input_activations": None, "output_activations": None, "format": _FORMAT}
    return {"targets": paths, "weights": weights, **rest}


def encode(module: MixedPrecisionLinear, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of a map that is packed in one number of bits, 4 or 8; its steps as they are in `dtype`."""
    packing, bits = module.packing, len(module.packing.planes)
    tensors = {
        "weight_packed": _words(module._lanes(range(bits)).view(packing.outputs, -1), bits),
        "weight_scale": module.steps.view(torch.bfloat16).to(dtype).view(packing.outputs, -1),
        "weight_shape": torch.tensor([packing.outputs, packing.inputs]),
    }
    if not packing.symmetric:
        zeros = module.zeros.view(packing.outputs, -1)
        tensors["weight_zero_point"] = _words(zeros.T, bits).T.contiguous()
    return tensors


def decode(tensors: Mapping[str, Tensor], weights: Mapping[str, Any]) -> Tensor:
    """The weight (outputs, inputs) that tensors stand for, as the JSON of their group says to read them."""
    bits, size = weights["num_bits"], weights["group_size"]
    outputs, inputs = tensors["weight_shape"].tolist()
    q = _numbers(tensors["weight_packed"], bits, inputs).view(outputs, -1, size)
    scale = tensors["weight_scale"][..., None]
    zero: Tensor | int = 1 << (bits - 1)
    if not weights["symmetric"]:
        zero = _numbers(tensors["weight_zero_point"].T, bits, outputs).T[..., None]
    return ((q - zero).to(scale.dtype) * scale).view(outputs, inputs)


def _words(q: Tensor, bits: int) -> Tensor:
    """Words of 32 bits (n, ceil(m·bits / 32)) int32 of numbers (n, m) uint8, the first lowest."""
    each = 32 // bits
    q = nn.functional.pad(q, (0, -q.shape[1] % each))
    words = torch.zeros(len(q), q.shape[1] // each, dtype=torch.int32, device=q.device)
    for place in range(each):
        words |= q[:, place::each].int() << (place * bits)
    return words


def _numbers(words: Tensor, bits: int, count: int) -> Tensor:
    """The inverse of `_words`, (n, count) int32."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32, device=words.device)
    return ((words[..., None] >> shifts) & ((1 << bits) - 1)).flatten(1)[:, :count]
