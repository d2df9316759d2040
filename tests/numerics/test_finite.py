"""NaN and infinity are found, in every dtype, and nothing else is taken for them."""

import pytest
import torch

from hf_compress.numerics.finite import all_finite

FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("place", [0, 500, 999])
def test_one_entry_is_enough(dtype, value, place):
    tensor = torch.linspace(-3, 3, 1000).to(dtype)
    assert all_finite(tensor)
    tensor[place] = value
    assert not all_finite(tensor)
    assert not all_finite(tensor.view(50, 20).T)


@pytest.mark.parametrize("dtype", FLOATS)
def test_the_largest_numbers_are_finite(dtype):
    assert all_finite(torch.tensor([torch.finfo(dtype).max, torch.finfo(dtype).min], dtype=dtype))


def test_what_can_hold_neither():
    assert all_finite(torch.tensor([True, False]))
    assert all_finite(torch.arange(3))
    assert all_finite(torch.empty(0, 4))


def test_complex_numbers():
    assert all_finite(torch.tensor([1 + 2j]))
    assert not all_finite(torch.tensor([complex(1, float("inf"))]))
