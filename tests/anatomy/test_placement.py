"""Models in memory that are computed a module at a time; the CPU stands for the device here."""

import copy

import pytest
import torch

import hf_compress as hfc
from hf_compress.anatomy.placement import computed_on
from hf_compress.errors import UnsupportedModelError
from tests.helpers.disk import logits_of, offloaded
from tests.helpers.every_method import NAMES, SETTINGS
from tests.helpers.tiny import tiny_model

CPU = torch.device("cpu")
IDS = torch.randint(4, 90, (24, 9), generator=torch.Generator().manual_seed(3))


def hooked(model):
    return [m for m in model.modules() if {"_hf_hook", "_old_forward", "forward"} & vars(m).keys()]


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "mixtral", "gemma3_text"])
def test_a_model_that_was_only_run_is_the_very_same(model_type):
    model = tiny_model(model_type)
    own, expected = dict(model.named_parameters()), logits_of(model)
    with computed_on(model, CPU):
        assert all(parameter.is_meta for parameter in model.parameters())
        assert torch.equal(logits_of(model), expected)
    assert all(model.get_parameter(name) is parameter for name, parameter in own.items())
    assert hooked(model) == []
    assert torch.equal(logits_of(model), expected)


@pytest.mark.parametrize("name", NAMES)
def test_what_a_method_makes_of_it_is_the_same(name, tmp_path):
    plain, placed = tiny_model("llama"), tiny_model("llama")
    own = {id(parameter) for parameter in placed.parameters()}
    hfc.compress(plain, SETTINGS[name], IDS)
    with computed_on(placed, CPU):
        hfc.compress(placed, SETTINGS[name], IDS)
    expected, state = plain.state_dict(), placed.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[key], expected[key]) for key in expected)
    assert hooked(placed) == []
    assert id(placed.model.embed_tokens.weight) in own, "what has not changed is not copied"
    hfc.save(placed, tmp_path / "saved")


def test_a_failure_leaves_the_model_as_it_was():
    model = tiny_model("llama")
    own = dict(model.named_parameters())
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="leaves none"), computed_on(model, CPU):
        hfc.compress(model, hfc.MKAConfig(num_merges=9), IDS)
    assert all(model.get_parameter(name) is parameter for name, parameter in own.items())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert hooked(model) == []


def test_a_forward_of_the_model_s_own_stays():
    model = tiny_model("llama")
    own = model.model.layers[1].mlp.forward
    model.model.layers[1].mlp.forward = lambda x: own(x) * 2
    mine, expected = model.model.layers[1].mlp.forward, logits_of(model)
    with computed_on(model, CPU):
        assert torch.equal(logits_of(model), expected)
    assert model.model.layers[1].mlp.forward is mine
    assert torch.equal(logits_of(model), expected)


def test_a_dispatched_model_is_refused(tmp_path):
    model = offloaded(tiny_model("llama"), tmp_path)
    with pytest.raises(UnsupportedModelError, match="was dispatched when it was loaded"), computed_on(model, CPU):
        pass
