"""What a block is made of, held against what the authors of the models called it."""

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_compress.anatomy.anatomy import Anatomy
from hf_compress.anatomy.parts import expert_axes, hidden_size, linear_map, linear_widths
from hf_compress.errors import UnsupportedModelError
from tests.helpers.tiny import tiny_base_model, tiny_model, tiny_seq2seq_model


def parts(model, index=0, path=None):
    anatomy = Anatomy(model)
    return anatomy.parts(anatomy.stack(path), index)


def shape(ffn):
    return ffn.kind, ffn.inputs, ffn.output, ffn.width


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
    assert shape(found.ffn) == ffn
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
    assert shape(parts(model, 1).ffn) == ("experts", (), None, 48)
    assert parts(model, 1).ffn.experts == "mlp.experts"


def test_the_attention_to_the_encoder_is_not_taken_for_the_own():
    found = parts(tiny_seq2seq_model("bart"), path="decoder")
    assert found.attention_output == "self_attn.out_proj"
    assert shape(found.ffn) == ("plain", ("fc1",), "fc2", 96)


@pytest.mark.parametrize(
    ("model_type", "activation"),
    [
        ("llama", "mlp.act_fn"),
        ("bert", "intermediate.intermediate_act_fn"),
        ("opt", "activation_fn"),  # beside the projections, in the block itself
        ("gpt2", "mlp.act"),
        ("mixtral", "mlp.experts.act_fn"),
        ("gpt_oss", None),  # computes it in a function of its own
    ],
)
def test_activation(model_type, activation):
    build = tiny_base_model if model_type == "bert" else tiny_model
    assert parts(build(model_type)).ffn.activation == activation


@pytest.mark.parametrize(
    ("model_type", "index", "of", "interleaved"),
    [
        ("mixtral", 0, {"gate_up_proj": (1, 2), "down_proj": (2, 1)}, False),
        ("qwen3_moe", 1, {"gate_up_proj": (1, 2), "down_proj": (2, 1)}, False),
        ("gpt_oss", 0, {"gate_up_proj": (2, 2), "gate_up_proj_bias": (1, 2), "down_proj": (1, 1)}, True),
    ],
)
def test_where_the_hidden_units_of_experts_are(model_type, index, of, interleaved):
    model = tiny_model(model_type)
    ffn = parts(model, index).ffn
    axes = expert_axes(model.get_submodule(f"model.layers.{index}.{ffn.experts}"))
    assert (axes.width, axes.of, axes.interleaved) == (ffn.width, of, interleaved)


def test_experts_that_do_not_tell_their_hidden_units():
    experts = nn.Module()
    experts.up, experts.down = nn.Parameter(torch.zeros(2, 6, 6)), nn.Parameter(torch.zeros(2, 6, 6))
    with pytest.raises(UnsupportedModelError, match="both sides of down could be the hidden units"):
        expert_axes(experts)


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
