"""Which blocks may be merged with each other."""

import pytest

from hf_compress.anatomy.anatomy import Anatomy
from tests.helpers.tiny import tiny_model


def kinds(model_type):
    """Every block's kind, as the index of the first block like it."""
    anatomy = Anatomy(tiny_model(model_type))
    found = anatomy.kinds(anatomy.stack())
    return [found.index(kind) for kind in found]


@pytest.mark.parametrize(
    ("model_type", "expected"),
    [
        ("llama", [0, 0, 0, 0]),
        ("mixtral", [0, 0, 0, 0]),
        ("deepseek_v3", [0, 1, 1, 1]),  # the first is dense, the others have experts
        ("qwen3_moe", [0, 1, 0, 1]),  # dense and experts by turns
        ("gemma3_text", [0, 1, 0, 1]),  # sliding and full attention: the same shapes
        ("jamba", [0, 1, 0, 1]),  # Mamba and attention
        ("smollm3", [0, 1, 0, 1]),  # with and without rotary embedding: a flag alone
        ("gpt_neo", [0, 1, 0, 1]),  # global and local attention: a word in the config alone
    ],
)
def test_only_alike_blocks_are_of_a_kind(model_type, expected):
    assert kinds(model_type) == expected


def test_neither_weights_nor_place_make_a_kind():
    model = tiny_model("llama")
    anatomy = Anatomy(model)
    stack = anatomy.stack()
    before = anatomy.kinds(stack)
    stack.blocks[1].self_attn.layer_idx = 17
    stack.blocks[1].mlp.up_proj.weight.data.zero_()
    stack.blocks[1].train()
    assert anatomy.kinds(stack) == before
    assert before[1] == before[0]


def test_a_narrower_ffn_makes_a_kind():
    anatomy = Anatomy(tiny_model("llama"))
    stack = anatomy.stack()
    weight = stack.blocks[2].mlp.down_proj.weight
    weight.data = weight.data[:, :-1].clone()
    found = anatomy.kinds(stack)
    assert found[2] != found[1] == found[0]
