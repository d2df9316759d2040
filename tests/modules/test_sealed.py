"""A seal changes what a weight is called and nothing else."""

import pytest
import torch
from torch import nn

from hf_compress.modules.sealed import Sealed


class Scaled(nn.LayerNorm):
    """A norm that is called with more than its inputs."""

    def forward(self, inputs, by=1.0, *, shift=0.0):
        return super().forward(inputs) * by + shift


def norm(kind=nn.LayerNorm):
    module = kind(6)
    with torch.no_grad():
        module.weight.uniform_(0.5, 2)
        module.bias.uniform_(-1, 1)
    return module


def test_the_output_is_the_same():
    inner, x = norm(), torch.randn(2, 3, 6)
    assert torch.equal(Sealed(inner)(x), inner(x))


def test_every_argument_is_passed_on():
    inner, x = norm(Scaled), torch.randn(2, 6)
    assert torch.equal(Sealed(inner)(x, 2.0, shift=3.0), inner(x, 2.0, shift=3.0))


def test_the_weight_goes_by_another_name_and_an_empty_one_by_its_own():
    inner = norm()
    state = Sealed(inner).state_dict()
    assert set(state) == {"weight", "inner.weight", "inner.bias"}
    assert state["weight"].shape == (0,)
    assert torch.equal(state["inner.weight"], inner.weight)


def test_what_is_trained_is_what_was_trained():
    inner = norm()
    sealed = Sealed(inner)
    assert [id(p) for p in sealed.parameters()] == [id(inner.weight), id(inner.bias)]


def test_a_state_dict_fits_another_sealed_module():
    first, second, x = Sealed(norm()), Sealed(norm()), torch.randn(2, 6)
    assert not torch.equal(second(x), first(x))
    second.load_state_dict(first.state_dict())
    assert torch.equal(second(x), first(x))


def test_a_sealed_state_dict_does_not_fit_the_plain_module():
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        norm().load_state_dict(Sealed(norm()).state_dict())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_who_looks_up_the_dtype_of_the_weight_finds_it(dtype):
    sealed = Sealed(norm().to(dtype))
    assert sealed.weight.dtype == dtype
    assert sealed.to(torch.float16).weight.dtype == torch.float16


def test_on_meta_it_stays_on_meta():
    with torch.device("meta"):
        inner = nn.LayerNorm(6)
    assert Sealed(inner).weight.is_meta
