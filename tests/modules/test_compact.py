"""Compact linear maps that keep the weights they compute with for a while."""

import pytest
import torch
from torch import nn

from hf_compress.modules.compact import kept_dense
from hf_compress.modules.packed import MixedPrecisionLinear, pack
from hf_compress.modules.sparse import SparseLinear, pack_mask


def packed_linear():
    packing, buffers = pack(torch.randn(8, 16), torch.full((8, 1), 4), 16)
    linear = MixedPrecisionLinear(packing, bias=False)
    linear.load_state_dict(buffers)
    return linear


def sparse_linear():
    mask = torch.arange(128).view(8, 16) % 3 > 0
    linear = SparseLinear(16, 8, int(mask.sum()), bias=False)
    linear.mask.copy_(pack_mask(mask))
    nn.init.normal_(linear.weight)
    return linear


@pytest.mark.parametrize("make", [packed_linear, sparse_linear])
@pytest.mark.parametrize(("room", "times"), [(2**20, 1), (8 * 16 * 4, 1), (8 * 16 * 4 - 1, 3)])
def test_a_weight_is_made_once_if_there_is_room(make, room, times, monkeypatch):
    torch.manual_seed(0)
    linear, inputs = make(), torch.randn(2, 16)
    made = []
    dense = type(linear)._dense
    monkeypatch.setattr(type(linear), "_dense", lambda own, dtype: made.append(dtype) or dense(own, dtype))
    with torch.no_grad():
        expected = linear(inputs)
        made.clear()
        with kept_dense(nn.Sequential(nn.ReLU(), linear), room):
            outputs = [linear(inputs) for _ in range(3)]
        assert made == [torch.float32] * times
        assert all(torch.equal(output, expected) for output in outputs)
        with kept_dense(linear, room):
            assert linear(inputs.bfloat16()).dtype == torch.bfloat16
        made.clear()
        linear(inputs)
        assert made, "nothing is kept afterwards"


def test_not_with_gradients_and_one_inside_another():
    linear, inputs = sparse_linear(), torch.randn(2, 16)
    with kept_dense(linear):
        for _ in range(2):
            linear(inputs).sum().backward()
        with kept_dense(linear), torch.no_grad():
            linear(inputs)
        assert linear._kept is not None
    assert linear._kept is None
    assert linear.weight.grad is not None


def test_the_room_is_shared(monkeypatch):
    both = nn.ModuleList([packed_linear(), packed_linear()])
    made = []
    dense = MixedPrecisionLinear._dense
    monkeypatch.setattr(MixedPrecisionLinear, "_dense", lambda own, dtype: made.append(own) or dense(own, dtype))
    with kept_dense(both, room=8 * 16 * 4), torch.no_grad():
        for _ in range(3):
            for linear in both:
                linear(torch.ones(1, 16))
    assert [made.count(linear) for linear in both] == [1, 3]
