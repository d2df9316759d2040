"""Where the tensors of a dispatched model are."""

import pytest
import torch
from safetensors import SafetensorError
from torch import nn

from hf_compress.anatomy.dispatch import computing_device, is_dispatched, is_offloaded
from hf_compress.anatomy.offloaded import loading_device, stand_ins, stored, whole_state
from hf_compress.errors import UnsupportedModelError
from tests.helpers.offloaded import dispatched, every_second_block
from tests.helpers.tiny import tiny_inputs, tiny_model


def same_state(state, model):
    expected = model.state_dict()
    return state.keys() == expected.keys() and all(torch.equal(state[name], expected[name]) for name in expected)


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "qwen3_moe", "mixtral"])
def test_what_is_on_the_disk_is_found(tmp_path, model_type):
    model = tiny_model(model_type)
    there = dispatched(model, tmp_path, max_shard_size="20KB")
    assert is_dispatched(there)
    assert is_offloaded(there)
    assert all(parameter.is_meta for parameter in there.parameters())
    assert same_state(whole_state(there), model)


def test_what_is_in_memory_is_not_read_from_anywhere(tmp_path):
    model = tiny_model("llama")
    there = dispatched(model, tmp_path, every_second_block(model))
    here, name = there.state_dict(), "model.layers.0.mlp.up_proj.weight"
    assert whole_state(there)[name].data_ptr() == here[name].data_ptr()
    assert same_state(whole_state(there), model)
    assert not is_dispatched(model)
    assert whole_state(model)[name].data_ptr() == model.get_parameter(name).data_ptr()


def test_tied_weights_stay_tied_after_a_pass(tmp_path):
    model = tiny_model("gpt2")
    there = dispatched(model, tmp_path)
    with torch.no_grad():
        there(**tiny_inputs(model))
    state = whole_state(there)
    assert there.lm_head.weight is not there.transformer.wte.weight  # accelerate has made each anew
    assert state["lm_head.weight"].data_ptr() == state["transformer.wte.weight"].data_ptr()


def test_tensors_are_read_to_the_cpu_though_a_gpu_computes(tmp_path):
    there = dispatched(tiny_model("llama"), tmp_path)
    there.lm_head._hf_hook.weights_map.dataset.device = "meta"
    with pytest.raises(SafetensorError, match="device meta is invalid"):
        there.lm_head._hf_hook.weights_map["weight"]
    assert stored(there, "lm_head.weight").device.type == "cpu"


def test_a_parameter_that_nobody_can_load_is_named():
    model = tiny_model("llama")
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.to("meta"))
    with pytest.raises(UnsupportedModelError, match=r"lm_head\.weight is on the meta device, and no hook"):
        whole_state(model)


def test_a_model_computes_where_its_hooks_say(tmp_path):
    there = dispatched(tiny_model("llama"), tmp_path)
    assert computing_device(there) == torch.device("cpu")
    there._hf_hook.execution_device = "cuda:1"
    assert computing_device(there) == torch.device("cuda", 1)
    assert computing_device(tiny_model("llama")) == torch.device("cpu")


@pytest.mark.parametrize(
    ("placed", "device"),
    [
        ({"": "disk"}, "cpu"),
        ({"": "cpu", "model": "cuda:1", "model.rotary_emb": "cuda:2"}, "cuda:2"),
        ({"model": "cuda:1", "model.rotary": "cuda:2"}, "cuda:1"),
        ({"model": "cuda:1", "model.rotary_emb": "disk"}, "cpu"),
        ({"lm_head": "cuda:1"}, "cpu"),
    ],
)
def test_tables_are_made_where_the_device_map_says(placed, device):
    model = tiny_model("llama")
    model.hf_device_map = placed
    assert loading_device(model) == torch.device(device)


def test_stand_ins_are_one_number_each():
    model = tiny_model("llama")
    for name, tensor in stand_ins(model, torch.device("cpu")).items():
        own = model.state_dict()[name]
        assert (tensor.shape, tensor.dtype) == (own.shape, own.dtype)
        assert tensor.untyped_storage().nbytes() == own.element_size()
