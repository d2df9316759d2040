"""Single experts: what they are said to do, added up as the router says, is what the whole mixture does."""

import pytest
import torch

from hf_compress.anatomy.anatomy import Anatomy
from hf_compress.anatomy.experts import check_experts, expert_hidden, expert_writes
from hf_compress.errors import UnsupportedModelError
from hf_compress.modules.experts import routed
from tests.helpers.ffns import HIDDEN, noise
from tests.helpers.tiny import tiny_model

# plain; gate and up interleaved, transposed, with biases and a gate of its own; shared experts beside them
FAMILIES = ["mixtral", "gpt_oss", "qwen3_moe", "deepseek_v3", "olmoe", "ernie4_5_moe"]


def experts_of(name):
    model = tiny_model(name)
    stack = Anatomy(model).stack()
    for index, block in enumerate(stack.blocks):
        ffn = Anatomy(model).parts(stack, index).ffn
        if ffn.kind == "experts":
            return block.get_submodule(ffn.experts), ffn.width
    raise AssertionError(f"{name} has no experts")


@pytest.mark.parametrize("name", FAMILIES)
def test_a_mixture_is_the_weighted_sum_of_its_experts(name):
    experts, width = experts_of(name)
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.normal_(std=0.2)
    check_experts(experts, name)
    count = len(expert_writes(experts))
    states = noise(9, HIDDEN)
    index = torch.stack([torch.randperm(count, generator=torch.Generator().manual_seed(i))[:2] for i in range(9)])
    weights = noise(9, 2, seed=3).abs()
    with torch.no_grad():
        expected = experts(states, index, weights)
        total = torch.zeros_like(states)
        for number in range(count):
            token, weight = routed(index, weights, number)
            hidden = expert_hidden(experts, number, states[token])
            assert hidden.shape == (len(token), width)
            written = hidden @ expert_writes(experts)[number]
            if experts.has_bias:
                written = written + experts.down_proj_bias[number]
            total[token] += weight[:, None] * written
    torch.testing.assert_close(total, expected, rtol=1e-4, atol=1e-5)


def test_experts_that_do_not_say_how_they_compute_are_refused():
    experts, _ = experts_of("llama4_text")
    with pytest.raises(UnsupportedModelError, match="does not tell has_gate"):
        check_experts(experts, "model.layers.0.feed_forward.experts")
