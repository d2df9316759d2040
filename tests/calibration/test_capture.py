"""Outputs in one form, whatever a model's config says of them; and the config as it was afterwards."""

import copy

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, MixtralConfig, MixtralForCausalLM, T5ForConditionalGeneration

import hf_compress as hfc
from hf_compress.api.compress import make_plan
from hf_compress.calibration.capture import forward, inference, watch_arguments
from hf_compress.calibration.data import prepare
from hf_compress.calibration.objective import first_tensor
from tests.helpers.language import WORDS, tiny_llama
from tests.helpers.round_trip import LLAMA, TEXT
from tests.helpers.tiny import tiny_base_model, tiny_config

FLAGS = {"tuples": {"return_dict": False}, "router logits": {"output_router_logits": True}}
FLAGS["all"] = FLAGS["tuples"] | FLAGS["router logits"] | {"output_hidden_states": True, "output_attentions": True}
METHODS = {
    "influence": hfc.DropBlocksConfig(num_blocks=1),
    "perplexity": hfc.DropBlocksConfig(num_blocks=1, criterion="perplexity"),
    "mka": hfc.MKAConfig(num_merges=1),
    "mka of the paper": hfc.MKAConfig(num_merges=1, variant="paper"),
    "lrp": hfc.LRPConfig(sparsity=0.5, group_size=16),
    "fisher": hfc.LRPConfig(bits=5, group_size=16),
    "bottlenecks": hfc.AdaptiveCompressConfig(variant="pca"),
}


MODELS = {"mixtral": (MixtralConfig, MixtralForCausalLM, LLAMA), "bert": (BertConfig, BertForMaskedLM, TEXT)}


def build(name, **flags):
    torch.manual_seed(0)
    config, kind, sizes = MODELS[name]
    # the only attention that gives its weights
    return kind(config(**sizes, **flags, attn_implementation="eager")).eval()


@pytest.mark.parametrize("flags", FLAGS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", MODELS)
def test_plans_do_not_hang_on_what_outputs_hold(kind, method, flags):
    """The same as without the flags, by value."""
    data = torch.randint(4, len(WORDS), (16, 24), generator=torch.Generator().manual_seed(0))
    plain, flagged = build(kind), build(kind, **FLAGS[flags])
    before = copy.deepcopy(vars(flagged.config))
    expected, found = (make_plan(model, METHODS[method], data) for model in (plain, flagged))
    assert found.edits == expected.edits
    assert found.tensors.keys() == expected.tensors.keys()
    for name, tensor in found.tensors.items():
        torch.testing.assert_close(tensor, expected.tensors[name])
    assert vars(flagged.config) == before


@pytest.mark.parametrize("flags", FLAGS)
def test_compressed_models_keep_what_their_config_says(flags, ids):
    model = build("mixtral", **FLAGS[flags])
    hfc.compress(model, hfc.DropBlocksConfig(num_blocks=1), ids)
    for name, value in FLAGS[flags].items():
        assert getattr(model.config, name) == value


def test_parts_with_configs_of_their_own():
    """T5's encoder and decoder have copies of the config."""
    config = copy.deepcopy(tiny_config("t5"))
    config.return_dict = False
    model = T5ForConditionalGeneration(config).eval()
    (batch,) = prepare(torch.full((2, 5), 7), model, None).batches
    with inference(model):
        output = forward(model, batch)
        assert first_tensor(output).shape == (2, 5, config.vocab_size)
        assert model.encoder.config.return_dict
    assert not model.config.return_dict
    assert not model.encoder.config.return_dict


def test_the_config_comes_back_after_errors():
    model = tiny_llama()
    model.config.return_dict = False
    with pytest.raises(KeyboardInterrupt), inference(model):
        raise KeyboardInterrupt
    assert model.config.return_dict is False


def test_what_is_asked_for_in_a_call_is_given(ids):
    model = tiny_base_model("bert")
    with inference(model):
        assert forward(model, prepare(ids, model, None).batches[0]).hidden_states is None
        assert model(ids, output_hidden_states=True).hidden_states is not None


def test_modules_keep_what_they_are_called_with():
    """Each call by itself, arguments with names last; and afterwards nothing."""
    called, silent = torch.nn.Bilinear(2, 2, 1), torch.nn.Linear(2, 2)
    one, two = torch.ones(1, 2), torch.zeros(1, 2)
    with watch_arguments({"called": called, "silent": silent}) as given:
        called(one, two)
        called(two, input2=one)
    called(one, one)
    assert given["silent"] == []
    assert [[id(value) for value in call] for call in given["called"]] == [[id(one), id(two)], [id(two), id(one)]]
