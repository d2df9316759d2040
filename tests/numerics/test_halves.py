"""Products of numbers that came from bfloat16."""

from contextlib import suppress

import pytest
import torch

from hf_compress.numerics import halves
from hf_compress.numerics.halves import CPU_PRODUCTS, bfloat16_factors
from hf_compress.numerics.moments import Moments


@pytest.fixture(autouse=True)
def _fast(monkeypatch):
    monkeypatch.setattr(halves, "multiplies_bfloat16", lambda: True)


def rows(dtype, features=600, count=900):
    """Of features that lie far apart, as activations do."""
    generator = torch.Generator().manual_seed(0)
    scales = torch.linspace(-4, 4, features).exp()
    return (torch.randn(count, features, generator=generator) * scales + 0.3 * scales).to(dtype)


def gap(found, exact):
    """Of each entry, over the sizes of its two features."""
    sizes = exact.diagonal().sqrt()
    return float(((found.double() - exact) / sizes / sizes[:, None]).abs().max())


def test_of_bfloat16_nothing_is_lost():
    own = rows(torch.bfloat16)
    with bfloat16_factors():
        found = own.float().T @ own.float()
    assert gap(found, own.double().T @ own.double()) < 2e-6


@pytest.mark.parametrize(
    "given",
    [
        {"rows": rows(torch.bfloat16)},
        {"rows": rows(torch.float32)},
        {"rows": rows(torch.float16)},
        {"rows": rows(torch.bfloat16), "weights": torch.rand(900, generator=torch.Generator().manual_seed(1))},
    ],
    ids=["bfloat16", "float32", "float16", "weighted"],
)
@pytest.mark.parametrize("origin", [None, rows(torch.float32).mean(dim=0)])
def test_sums_in_float32_are_as_good_whatever_the_rows(given, origin):
    """Products are taken in bfloat16 only where that is the same."""
    found, exact = (Moments(600, dtype=dtype, origin=origin) for dtype in (torch.float32, torch.float64))
    for moments in (found, exact):
        moments.add(given["rows"], given.get("weights"))
    assert gap(found.covariance, exact.covariance) < 1e-5


@pytest.mark.parametrize("before", ["none", "ieee", "bf16"])
def test_what_was_set_comes_back(before):
    CPU_PRODUCTS.fp32_precision = before
    try:
        with suppress(KeyError), bfloat16_factors():
            assert CPU_PRODUCTS.fp32_precision == "bf16"
            raise KeyError
        assert CPU_PRODUCTS.fp32_precision == before
        with bfloat16_factors(wanted=False):
            assert CPU_PRODUCTS.fp32_precision == before
    finally:
        CPU_PRODUCTS.fp32_precision = "none"


@pytest.mark.parametrize("switch", [torch.backends, torch.backends.mkldnn])
def test_what_was_set_above_still_goes_down(switch):
    """What is inherited is not pinned."""
    try:
        switch.fp32_precision = "ieee"
        with bfloat16_factors():
            pass
        switch.fp32_precision = "tf32"
        assert CPU_PRODUCTS.fp32_precision == "tf32"
    finally:
        switch.fp32_precision = "none"


def test_a_processor_that_is_no_faster_so_takes_float32(monkeypatch):
    monkeypatch.setattr(halves, "multiplies_bfloat16", lambda: False)
    before = CPU_PRODUCTS.fp32_precision
    with bfloat16_factors():
        assert CPU_PRODUCTS.fp32_precision == before


@pytest.mark.parametrize(
    ("told", "fast"),
    [
        ({"amx_bf16": True, "avx512_bf16": True}, True),
        ({"avx512_bf16": True, "amx_bf16": False, "cpu_name": "Intel(R) Xeon(R)"}, False),
        ({"avx512_bf16": True, "amx_bf16": False, "cpu_name": "AMD EPYC"}, True),
        ({"avx512_bf16": False, "cpu_name": "AMD EPYC"}, False),
        ({"bf16": True}, True),  # ARM
        ({"avx2": True}, False),
    ],
)
def test_what_a_processor_says_of_itself(monkeypatch, told, fast):
    monkeypatch.undo()
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: told, raising=False)
    assert halves.multiplies_bfloat16.__wrapped__() == fast
