"""What a block is made of, held against what the authors of the models called it."""

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_compress.anatomy.anatomy import Anatomy
from hf_compress.anatomy.parts import FFN, hidden_size, linear_map, linear_widths
from tests.architectures.tiny import tiny_base_model, tiny_model, tiny_seq2seq_model


def parts(model, index=0, path=None):
    anatomy = Anatomy(model)
    return anatomy.parts(anatomy.stack(path), index)


@pytest.mark.parametrize(
    ("build", "model_type", "attention", "ffn"),
    [
        (tiny_model, "llama", "self_attn.o_proj", ("gated", ("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj", 96)),
        (tiny_model, "phi3", "self_attn.o_proj", ("fused", ("mlp.gate_up_proj",), "mlp.down_proj", 96)),
        (tiny_model, "gpt2", "attn.c_proj", ("plain", ("mlp.c_fc",), "mlp.c_proj", 256)),
        (tiny_model, "gptj", "attn.out_proj", ("plain", ("mlp.fc_in",), "mlp.fc_out", 256)),
        (tiny_model, "opt", "self_attn.out_proj", ("plain", ("fc1",), "fc2", 96)),
        (tiny_model, "mixtral", "self_attn.o_proj", ("experts", (), None, 96)),
        (tiny_model, "qwen3_moe", "self_attn.o_proj", ("gated", ("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj", 96)),
        (tiny_base_model, "bert", "attention.output.dense", ("plain", ("intermediate.dense",), "output.dense", 96)),
        (tiny_base_model, "distilbert", "attention.out_lin", ("plain", ("ffn.lin1",), "ffn.lin2", 96)),
        (tiny_seq2seq_model, "bart", "self_attn.out_proj", ("plain", ("fc1",), "fc2", 96)),
    ],
)
def test_attention_and_ffn(build, model_type, attention, ffn):
    found = parts(build(model_type))
    assert found.attention_output == attention
    assert found.ffn == FFN(*ffn)
    assert found.writers == tuple(path for path in (attention, ffn[2]) if path)


@pytest.mark.parametrize(
    ("model_type", "mixer", "kind"),
    [
        ("mamba", "mixer.out_proj", None),  # its two projections alone would look like a fused FFN
        ("mamba2", "mixer.out_proj", None),
        ("jamba", "mamba.out_proj", "gated"),
        ("qwen3_next", "linear_attn.out_proj", "experts"),
        ("lfm2", "conv.out_proj", "gated"),
    ],
)
def test_a_token_mixer_without_attention(model_type, mixer, kind):
    found = parts(tiny_model(model_type))
    assert found.attention_output == mixer
    assert (found.ffn.kind if found.ffn else None) == kind


def test_the_second_block_of_a_mixture_has_experts():
    model = tiny_model("qwen3_moe")  # decoder_sparse_step = 2
    assert parts(model, 1).ffn == FFN("experts", (), None, 48)


def test_the_attention_to_the_encoder_is_not_taken_for_the_own():
    found = parts(tiny_seq2seq_model("bart"), path="decoder")
    assert found.attention_output == "self_attn.out_proj"
    assert found.ffn == FFN("plain", ("fc1",), "fc2", 96)


@pytest.mark.parametrize(
    ("model_type", "norms"),
    [("llama", ("input_layernorm", "post_attention_layernorm")), ("gpt2", ("ln_1", "ln_2")), ("gptj", ("ln_1",))],
)
def test_norms(model_type, norms):
    assert parts(tiny_model(model_type)).norms == norms


@pytest.mark.parametrize("module", [nn.Linear(3, 5), Conv1D(5, 3)])
def test_both_layouts_of_a_linear_map_are_read_alike(module):
    x = torch.randn(2, 3)
    assert linear_widths(module) == (3, 5)
    torch.testing.assert_close(x @ linear_map(module) + module.bias, module(x))


def test_the_width_of_the_stream_goes_by_several_names():
    assert hidden_size(tiny_model("gpt2").config) == hidden_size(tiny_seq2seq_model("t5").config) == 64


def test_a_config_without_a_width_is_named():
    with pytest.raises(ValueError, match="SimpleConfig names no width"):
        hidden_size(type("SimpleConfig", (), {})())
