"""The check that a model is what its own config and weights would give."""

import pytest
import torch
from torch import nn

from hf_compress.calibration.data import Batch
from hf_compress.errors import ParityError, UnsupportedModelError
from hf_compress.rewrite.parity import check_parity, module_differences, rebuild
from hf_compress.rewrite.probe import Probe, outputs_on, same_outputs, same_tensor
from tests.helpers.offloaded import dispatched, every_second_block
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


def all_on_the_disk(model):
    return {"": "disk"}


@pytest.mark.parametrize(
    ("model_type", "place"),
    [
        ("llama", every_second_block),
        *((kind, all_on_the_disk) for kind in ("llama", "gpt2", "gemma3_text", "mixtral", "qwen3_moe", "jamba")),
    ],
)
def test_a_dispatched_model_agrees_with_itself(tmp_path, model_type, place):
    model = tiny_model(model_type)
    there = dispatched(model, tmp_path, place(model))
    probe = Probe.of(model, Batch(tiny_inputs(model), None))
    assert same_outputs(check_parity(there, probe), outputs_on(model, probe))
    assert any(parameter.is_meta for parameter in there.parameters())


def test_the_model_rebuilt_from_a_dispatched_one_reads_what_it_reads(tmp_path):
    model = tiny_model("llama")
    there = dispatched(model, tmp_path, every_second_block(model))
    rebuilt = rebuild(there)
    for name, parameter in there.named_parameters():
        assert rebuilt.get_parameter(name).is_meta == parameter.is_meta
        assert rebuilt.get_parameter(name).data_ptr() == parameter.data_ptr()
    there.lm_head._hf_hook.weights_map = {"weight": torch.zeros(model.lm_head.weight.shape)}
    inputs = tiny_inputs(model)
    with torch.no_grad():
        assert torch.equal(rebuilt(**inputs).logits, model(**inputs).logits)  # whose hooks are copies
        assert not rebuild(there)(**inputs).logits.any()


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text"])
def test_a_buffer_that_is_on_the_disk_too_is_no_difference(tmp_path, model_type):
    model = tiny_model(model_type)
    model.save_pretrained(tmp_path)
    check(type(model).from_pretrained(tmp_path, device_map={"": "disk"}, offload_buffers=True))


@pytest.mark.parametrize(("theirs", "same"), [(["b", "a"], True), (["b", "a", "a"], False), ([2, 1], False)])
def test_outside_of_the_blocks_kinds_have_no_order_and_sizes_have(theirs, same):
    here, there = tiny_model("gemma3_text"), tiny_model("gemma3_text")
    here.model.rotary_emb.layer_types = sorted(theirs)
    there.model.rotary_emb.layer_types = theirs
    assert (not list(module_differences(here, there))) == same


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
@pytest.mark.parametrize("place", [None, all_on_the_disk, every_second_block])
def test_what_differs_is_named(tmp_path, place, break_it, error, message):
    model = tiny_model("gemma3_text")
    model = model if place is None else dispatched(model, tmp_path, place(model))
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


def test_a_weight_on_the_disk_that_has_another_shape_is_named(tmp_path):
    there = dispatched(tiny_model("llama"), tmp_path)
    probe = Probe.of(there, Batch(tiny_inputs(there), None))
    there.model.layers[1].mlp.up_proj.weight = nn.Parameter(torch.empty(3, 5, device="meta"))
    with pytest.raises(ParityError, match=r"mismatched keys: model\.layers\.1\.mlp\.up_proj\.weight"):
        check(there, probe)


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
