"""Products of numbers that came from bfloat16, at its speed and with sums in float32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch

# What processors call it, of x86 and of ARM. AVX-512 has products of bfloat16 too: on an AMD EPYC they take 0.43 of
# the time of those of float32, on an Intel Xeon without AMX 1.6 times as long. That is of tensors in bfloat16; where
# `bfloat16_factors` asks for them, oneDNN takes float32 on an EPYC, as it does wherever there is no AMX.
_FAST = ("amx_bf16", "bf16")
_FAST_ON_AMD = "avx512_bf16"
CPU_PRODUCTS: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]  # its `fp32_precision` says of what


@contextmanager
def bfloat16_factors(wanted: bool = True) -> Iterator[None]:
    """Inside, the CPU's float32 products take their factors in bfloat16, and sum in float32.

    Of factors that came from bfloat16, and were changed by nothing but signs and powers of two, that loses nothing. A
    processor that is no faster so takes float32. What the caller has set comes back, however this ends.
    """
    before = CPU_PRODUCTS.fp32_precision
    if not wanted or before == "bf16" or not multiplies_bfloat16():
        yield
        return
    inherited = before == torch.backends.mkldnn.fp32_precision  # type: ignore[attr-defined]
    CPU_PRODUCTS.fp32_precision = "bf16"
    try:
        yield
    finally:
        CPU_PRODUCTS.fp32_precision = "none" if inherited else before


@lru_cache
def multiplies_bfloat16() -> bool:
    """Whether the CPU has products of bfloat16, faster than those of float32; no, where torch is too old to tell."""
    told: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    amd = str(told.get("cpu_name", "")).startswith("AMD")
    return any(told.get(name) for name in _FAST) or (amd and bool(told.get(_FAST_ON_AMD)))
