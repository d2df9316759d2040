"""Weights in memory of their own while their module runs."""

import pytest
import torch
from torch import nn

from hf_compress.rewrite.aligned import aligned
from tests.helpers.models import leftovers
from tests.helpers.offloaded import dispatched
from tests.helpers.tiny import tiny_inputs, tiny_model


class Watched(nn.Linear):
    """A linear map that notes the weights that it is run with, and can fail."""

    fails = False

    def forward(self, inputs):
        self.seen = [self.weight]  # in a list, or it would be a parameter of the module
        if self.fails:
            raise ZeroDivisionError
        return super().forward(inputs)


def off_by_four_bytes():
    linear = Watched(4, 3)
    memory = torch.zeros(13)
    memory[1:] = linear.weight.detach().reshape(-1)
    linear.weight = nn.Parameter(memory[1:].view(3, 4))
    assert linear.weight.data_ptr() % 64 == 4
    return linear


def test_what_is_not_aligned_is_copied_while_it_runs():
    linear, inputs = off_by_four_bytes(), torch.randn(2, 4)
    weight, bias, expected = linear.weight, linear.bias, linear(inputs)
    with aligned(linear):
        assert torch.equal(linear(inputs), expected)
        assert linear.weight is weight
    assert linear.seen[0] is not weight
    assert linear.seen[0].data_ptr() % 64 == 0
    assert linear.weight is weight
    assert linear.bias is bias
    linear(inputs)
    assert linear.seen[0] is weight


def test_what_is_aligned_is_not_copied():
    linear = Watched(4, 3)
    with aligned(linear):
        linear(torch.randn(2, 4))
    assert linear.seen[0] is linear.weight


def test_copies_go_to_the_device_that_is_asked_for():
    linear = Watched(4, 3)
    with aligned(linear, torch.device("meta")):
        linear(torch.randn(2, 4, device="meta"))
    assert linear.seen[0].is_meta
    assert not linear.weight.is_meta


def test_a_failing_module_gets_its_own_weights_back():
    linear = off_by_four_bytes()
    weight, linear.fails = linear.weight, True
    with pytest.raises(ZeroDivisionError), aligned(linear):
        linear(torch.randn(2, 4))
    assert linear.seen[0] is not weight
    assert linear.weight is weight
    assert leftovers(linear) == []


def test_what_is_read_from_the_disk_is_aligned_too(tmp_path):
    model = tiny_model("llama")
    there, inputs = dispatched(model, tmp_path), tiny_inputs(model)
    hooks = [module._hf_hook for module in there.modules() if isinstance(module, nn.Linear)]
    maps = [hook.weights_map for hook in hooks]
    assert any(weights["weight"].data_ptr() % 64 for weights in maps)
    with aligned(there), torch.no_grad():
        assert all(hook.weights_map["weight"].data_ptr() % 64 == 0 for hook in hooks)
        assert torch.equal(there(**inputs).logits, model(**inputs).logits)
    assert [hook.weights_map for hook in hooks] == maps
