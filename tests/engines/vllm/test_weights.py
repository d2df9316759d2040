"""The tensors of a checkpoint as vLLM gets them: matrices, by the names that stock checkpoints have."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

import hf_compress as hfc
from hf_compress.engines.vllm.structure import structure_of
from hf_compress.engines.vllm.weights import written_out
from hf_compress.errors import PlanError
from hf_compress.rewrite.dense import write_out
from tests.helpers.engines import CHANGES, wide_llama
from tests.helpers.linears import lrp, made


def given(folder, dtype=torch.float32, change=lambda weights: weights):
    """What vLLM would get."""
    config = AutoConfig.from_pretrained(folder)
    weights = change(load_file(folder / "model.safetensors"))
    return dict(written_out(weights.items(), structure_of(config), config, dtype))


def check(folder):
    """It is what a checkpoint has in which nothing is packed, but for seals."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    write_out(model)
    tied = set(model.all_tied_weights_keys)
    state = {name: tensor for name, tensor in model.state_dict().items() if name not in tied}
    expected = {name.replace(".inner.", "."): tensor for name, tensor in state.items() if tensor.numel()}
    found = given(folder)
    assert found.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


@pytest.mark.parametrize("change", ["several widths", "packed", "sparse", "linear", "bottleneck"])
def test_every_change(change, tmp_path):
    model = wide_llama()
    hfc.compress(model, CHANGES[change], torch.randint(2, 250, (16, 24)))
    check(hfc.save(model, tmp_path / "model"))


def test_maps_that_lie_the_other_way_round(tmp_path):
    model = made("GPT-2")
    lrp(model, bits=6, group_size=16)
    check(hfc.save(model, tmp_path / "model"))


def test_several_changes_at_once(tmp_path):
    model, data = wide_llama(), torch.randint(2, 250, (16, 24))
    for change in ("several widths", "linear", "bottleneck", "packed"):
        hfc.compress(model, CHANGES[change], data)
    check(hfc.save(model, tmp_path / "model"))


@pytest.fixture
def packed(tmp_path):
    model = wide_llama()
    hfc.compress(model, CHANGES["packed"], torch.randint(2, 250, (16, 24)))
    return hfc.save(model, tmp_path / "model")


def test_the_dtype_is_that_of_the_engine(packed):
    found = given(packed, torch.bfloat16)
    assert found["model.layers.0.mlp.up_proj.weight"].dtype == torch.bfloat16


def test_tensors_that_are_missing_are_named(packed):
    def without(weights):
        return {name: tensor for name, tensor in weights.items() if name != "model.layers.1.mlp.up_proj.steps"}

    with pytest.raises(PlanError, match=r"do not have model.layers.1.mlp.up_proj.steps"):
        given(packed, change=without)


def test_tensors_of_another_shape_are_named(packed):
    def shorter(weights):
        return weights | {"model.layers.1.mlp.up_proj.steps": weights["model.layers.1.mlp.up_proj.steps"][:-1]}

    with pytest.raises(PlanError, match=r"steps of a stored linear map is \(\d+,\); expected"):
        given(packed, change=shorter)


def test_a_class_that_transformers_does_not_have(packed):
    config = AutoConfig.from_pretrained(packed)
    config.architectures = ["NoSuchModel"]
    with pytest.raises(PlanError, match="NoSuchModel"):
        list(written_out([], structure_of(config), config, torch.float32))
