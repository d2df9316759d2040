"""The check that a model is what its own config and weights would give."""

import pytest
import torch
from torch import nn

from hf_compress.calibration.data import Batch
from hf_compress.errors import ParityError, UnsupportedModelError
from hf_compress.rewrite.parity import check_parity, rebuild
from hf_compress.rewrite.probe import Probe, same_outputs, same_tensor
from tests.helpers.tiny import tiny_base_model, tiny_inputs, tiny_model, tiny_vision_language_model


def check(model, probe=None) -> None:
    check_parity(model, probe or Probe.of(model, Batch(tiny_inputs(model), None)))


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "mixtral", "gemma3_text", "mamba2", "jamba"])
def test_an_untouched_model_agrees_with_itself(model_type):
    check(tiny_model(model_type))


@pytest.mark.parametrize("model_type", ["vit", "wav2vec2", "beit"])
def test_parametrized_weights_and_stochastic_depth_are_no_difference(model_type):
    check(tiny_base_model(model_type))


def test_the_rebuilt_model_shares_the_weights():
    model = tiny_model("llama")
    rebuilt = rebuild(model)
    assert rebuilt.model.layers[0].mlp.up_proj.weight.data_ptr() == model.model.layers[0].mlp.up_proj.weight.data_ptr()
    assert rebuilt is not model


def wrong_layer_index(model):
    model.model.layers[1].self_attn.layer_idx = 2


def wrong_list(model):
    model.config.layer_types = [*model.config.layer_types[1:], model.config.layer_types[0]]


def wrong_buffer(model):
    model.model.rotary_emb.full_attention_inv_freq.mul_(2)


def wrong_class(model):
    model.model.layers[3].mlp.act_fn = nn.ReLU()


def block_without_a_count(model):
    model.config.num_hidden_layers = 3
    model.config.layer_types = model.config.layer_types[:3]


def count_without_a_block(model):
    model.model.layers._modules.popitem()


@pytest.mark.parametrize(
    ("break_it", "error", "message"),
    [
        (wrong_layer_index, ParityError, r"model\.layers\.1\.self_attn\.layer_idx would be 1 instead of 2"),
        (wrong_list, ParityError, r"model\.layers\.0\.\S+ would be"),
        (wrong_buffer, ParityError, r"buffer model\.rotary_emb\.full_attention_inv_freq would have other values"),
        (wrong_class, ParityError, r"model\.layers\.3\.mlp\.act_fn would be \w+ instead of ReLU"),
        (block_without_a_count, UnsupportedModelError, "no list of blocks whose length a config field counts"),
        (count_without_a_block, UnsupportedModelError, "no list of blocks whose length a config field counts"),
    ],
)
def test_what_differs_is_named(break_it, error, message):
    model = tiny_model("gemma3_text")
    probe = Probe.of(model, Batch(tiny_inputs(model), None))
    break_it(model)
    with pytest.raises(error, match=message):
        check(model, probe)


def test_a_difference_that_no_setting_shows_is_found_in_the_outputs():
    model = tiny_model("llama")
    own = model.model.layers[1].forward
    model.model.layers[1].forward = lambda *args, **kwargs: own(*args, **kwargs) * 1.001
    with pytest.raises(ParityError, match="gives other outputs"):
        check(model)


def test_a_model_that_does_not_run_afterwards_is_told_from_one_that_never_did():
    model = tiny_model("llama")
    probe = Probe.of(model, Batch(tiny_inputs(model), None))
    model.model.layers[1].forward = lambda *args, **kwargs: 1 / 0
    with pytest.raises(UnsupportedModelError, match="does not run after the change: ZeroDivisionError"):
        check(model, probe)
    with pytest.raises(UnsupportedModelError, match="does not run on the inputs it would be checked with"):
        Probe.of(model)


def test_same_means_the_same_bits():
    one, nan = torch.tensor([1.0, 2.0]), torch.tensor([1.0, float("nan")])
    assert same_tensor(one, one.clone())
    assert same_tensor(nan, nan.clone())
    assert not same_tensor(one, nan)
    assert not same_tensor(one, torch.nextafter(one, one + 1))
    assert not same_tensor(one, one.double())
    assert not same_tensor(one, one[:1])
    assert same_outputs({"logits": nan}, {"logits": nan})
    assert not same_outputs({"logits": one}, {"logits": one, "more": one})
    assert not same_outputs({"logits": one, "more": one}, {"logits": one})


def test_a_model_with_added_tokens_is_itself():
    model = tiny_model("llama")
    model.resize_token_embeddings(model.config.vocab_size + 6)
    check(model)


def test_what_a_module_finds_out_when_it_runs_is_no_difference():
    """Gemma 4's audio tower learns how much to pad in its first pass; a probe without sound never gets there."""
    model = tiny_vision_language_model("gemma4")
    with torch.no_grad():
        model(**tiny_inputs(model))
    check(model)
    text = {name: value for name, value in tiny_inputs(model).items() if name in ("input_ids", "attention_mask")}
    text["input_ids"] = torch.randint(10, 40, text["input_ids"].shape)
    check(model, Probe.of(model, Batch(text, None)))
