"""The blends of an activation, each weighed against its formula entry by entry."""

import math
from itertools import product

import pytest
import torch
from torch import nn

from hf_compress.modules.activation import BLENDS, BlendedActivation

WIDTH = 5
PLACES = list(product(range(2), range(3), range(WIDTH)))
CONSTANTS = (0.5, -1.25, 0.0, 2.0, -0.1)


def blended(blend, alpha):
    module = BlendedActivation(nn.SiLU(), blend, WIDTH if blend == "constant" else None).double()
    with torch.no_grad():
        module.alpha.fill_(alpha)
        if blend == "constant":
            module.constant.copy_(torch.tensor(CONSTANTS, dtype=torch.double))
    return module


def hidden():
    """(2, 3, 5) values on both sides of zero, and zero itself."""
    z = 2 * torch.randn(2, 3, WIDTH, dtype=torch.double, generator=torch.Generator().manual_seed(1))
    z[0, 0, 0] = 0.0
    return z


def silu(z):
    return z / (1 + math.exp(-z))


def expected(blend, alpha, z, unit):
    """One entry, as the docstring of the class has it."""
    if blend == "leaky":
        return max(z, 0) + alpha * min(z, 0)
    if blend == "identity":
        return (1 - alpha) * silu(z) + alpha * z
    return (1 - alpha) * silu(z) + alpha * CONSTANTS[unit]


def slope(blend, z, unit):
    """The derivative of one entry by alpha."""
    if blend == "leaky":
        return min(z, 0)
    return (z if blend == "identity" else CONSTANTS[unit]) - silu(z)


@pytest.mark.parametrize("blend", BLENDS)
def test_every_entry_follows_the_formula(blend):
    z = hidden()
    for alpha in (0.0, 0.3, 1.0, 1.5):
        got = blended(blend, alpha)(z)
        assert got.shape == z.shape
        for place in PLACES:
            entry = expected(blend, alpha, z[place].item(), place[2])
            assert got[place].item() == pytest.approx(entry, abs=1e-12)


@pytest.mark.parametrize("blend", BLENDS)
def test_alpha_learns_from_the_sum_of_what_it_moves(blend):
    z = hidden()
    upstream = torch.randn(z.shape, dtype=torch.double, generator=torch.Generator().manual_seed(2))
    moved = [upstream[place].item() * slope(blend, z[place].item(), place[2]) for place in PLACES]
    for alpha in (0.0, 0.3, 1.0):
        module = blended(blend, alpha)
        (module(z) * upstream).sum().backward()
        assert module.alpha.grad.item() == pytest.approx(sum(moved), abs=1e-12)


@pytest.mark.parametrize("blend", BLENDS)
def test_the_gradient_reaches_the_inputs(blend):
    z = hidden()
    z[0, 0, 0] = 0.7  # away from the kink
    assert torch.autograd.gradcheck(blended(blend, 0.3), z.requires_grad_())


@pytest.mark.parametrize("blend", BLENDS)
def test_alpha_alone_is_trained_and_starts_at_zero(blend):
    module = BlendedActivation(nn.SiLU(), blend, WIDTH if blend == "constant" else None)
    assert [name for name, _ in module.named_parameters()] == ["alpha"]
    assert module.alpha.tolist() == [0.0]
    assert list(module.state_dict()) == ["alpha", *(["constant"] if blend == "constant" else [])]


@pytest.mark.parametrize("blend", BLENDS)
def test_on_meta_it_takes_its_tensors_from_a_state_dict(blend):
    source = blended(blend, 0.3)
    empty = BlendedActivation(nn.SiLU(), blend, WIDTH if blend == "constant" else None, device="meta")
    assert all(tensor.is_meta for tensor in empty.state_dict().values())
    empty.load_state_dict(source.state_dict(), assign=True)
    assert torch.equal(empty(hidden()), source(hidden()))


@pytest.mark.parametrize("blend", BLENDS)
def test_it_computes_in_the_dtype_of_its_inputs(blend):
    module = blended(blend, 0.3).to(torch.bfloat16)
    assert module(hidden().bfloat16()).dtype == torch.bfloat16
