"""Nothing that a caller has switched on, and no state that a model is in, changes what a method makes of it."""

import copy
from contextlib import ExitStack
from functools import cache

import pytest
import torch
from transformers import LlamaForCausalLM

import hf_compress as hfc
from hf_compress.storage.save import own_memory
from tests.helpers.changes import same
from tests.helpers.language import tiny_llama
from tests.helpers.tiny import tiny_base_model

IDS = torch.randint(4, 60, (24, 24), generator=torch.Generator().manual_seed(0))
ADAPTIVE = {"layers": [1], "updates": 2, "warmup_steps": 1, "decay_steps": 1}
CONFIGS = {
    "merged": hfc.MKAConfig(num_merges=1),
    "averaged": hfc.MKAConfig(num_merges=1, variant="paper", components=3),
    "dropped": hfc.DropBlocksConfig(num_blocks=1),
    "dropped by loss": hfc.DropBlocksConfig(num_blocks=1, criterion="perplexity"),
    "collapsed": hfc.LayerCollapseConfig(num_layers=1),
    "collapsed by loss": hfc.LayerCollapseConfig(num_layers=1, criterion="loss", rank=4),
    "narrowed": hfc.ILLCConfig(gamma=0.5, head_gamma=0.5),
    "clustered": hfc.ILLCConfig(gamma=0.5, variant="paper"),
    "sparse": hfc.LRPConfig(sparsity=0.5),
    "sparse by relevance": hfc.LRPConfig(sparsity=0.5, score="relevance", granularity="row"),
    "sparse at random": hfc.LRPConfig(sparsity=0.5, score="random"),
    "packed": hfc.LRPConfig(bits=7, group_size=8),
    "packed by relevance": hfc.LRPConfig(bits=7, group_size=8, allocation="relevance"),
    "split": hfc.LRPConfig(variant="paper", split=(8, 4), prune=False),
} | {
    variant: hfc.AdaptiveCompressConfig(variant=variant, **ADAPTIVE)
    for variant in ("default", "paper", "pca", "linear", "topk", "batchtopk")
}


@cache
def plain(name):
    """What a method makes of the model in the usual surroundings."""
    return compressed(name, tiny_llama(4)).state_dict()


def compressed(name, model, ids=IDS):
    options = hfc.DataOptions(batch_size=6)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return hfc.compress(model, CONFIGS[name], ids, options=options)


def check_same(name, model):
    found, expected = model.state_dict(), plain(name)
    assert list(found) == list(expected)
    assert not [key for key in found if not same(found[key], expected[key])]


@pytest.mark.parametrize("name", CONFIGS)
def test_whatever_the_caller_has_switched_on(name, tmp_path):
    model = tiny_llama(4)
    with ExitStack() as around:
        around.callback(torch.set_default_dtype, torch.float32)
        torch.set_default_dtype(torch.bfloat16)
        for one in (torch.inference_mode(), torch.autocast("cpu", torch.bfloat16)):
            around.enter_context(one)
        with torch.device("meta"):
            compressed(name, model, IDS.clone())
        assert torch.is_inference_mode_enabled()
        assert torch.get_default_dtype() == torch.bfloat16
        assert torch.is_autocast_enabled("cpu")
        hfc.save(model, tmp_path / "saved")
    check_same(name, model)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "saved")
    own_memory(loaded)
    for one in (model, loaded):
        one(IDS[:2]).logits.sum().backward()
        assert one.lm_head.weight.grad is not None


@pytest.mark.parametrize("name", CONFIGS)
def test_whatever_state_the_model_is_in(name):
    model = tiny_llama(4).train()
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    for number, parameter in enumerate(model.parameters()):
        parameter.grad = torch.full_like(parameter, 3.0) if number % 3 == 0 else None
        parameter.requires_grad_(number % 2 == 0)
    own = {id(parameter): (number, parameter) for number, parameter in enumerate(model.parameters())}
    compressed(name, model)
    check_same(name, model)
    assert model.training
    assert model.is_gradient_checkpointing
    for path, parameter in model.named_parameters():
        if id(parameter) in own:
            number, _ = own[id(parameter)]
            assert parameter.requires_grad == (number % 2 == 0), path
            assert (parameter.grad is not None) == (number % 3 == 0), path
            assert parameter.grad is None or bool((parameter.grad == 3).all()), path


@pytest.mark.parametrize("name", CONFIGS)
def test_all_that_transformers_collects_is_what_the_loaded_model_gives(name, tmp_path):
    asked = {"output_hidden_states": True, "output_attentions": True}
    model = tiny_llama(4)
    model.set_attn_implementation("eager")
    model(IDS, **asked)  # puts hooks that collect on the blocks, and for good
    compressed(name, model)
    model.save_pretrained(tmp_path)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    own_memory(loaded)
    twin = copy.deepcopy(model)
    expected = loaded(IDS, **asked)
    for one in (model, twin, model):
        given = one(IDS, **asked)
        for what in ("hidden_states", "attentions"):
            assert len(given[what]) == len(expected[what]) == model.config.num_hidden_layers + (what[0] == "h")
            assert all(torch.equal(a, b) for a, b in zip(given[what], expected[what], strict=True)), what


def test_bottlenecks_spliced_for_a_while_are_collected_too():
    model = tiny_llama(4)
    model(IDS, output_hidden_states=True)
    compressed("pca", model)
    found = hfc.fit(model, hfc.AdaptiveCompressConfig(variant="pca", layers=[1], retention_final=0.5), IDS)
    with torch.no_grad(), found.spliced(model):
        spliced = model(IDS, output_hidden_states=True).hidden_states
    with torch.no_grad():
        once = model(IDS, output_hidden_states=True).hidden_states
        expected = found.places[1].module(once[2])
    torch.testing.assert_close(spliced[2], expected)
    assert not torch.allclose(once[2], expected, atol=1e-3)


# --- gradients where none are taken -----------------------------------------------------------------------------------


def test_a_model_of_inference_mode_is_refused_with_the_remedy():
    with torch.inference_mode():
        model = tiny_llama(2)
    for refused in (
        lambda: hfc.compress(model, CONFIGS["dropped"], IDS),
        lambda: hfc.make_plan(model, CONFIGS["dropped"], IDS),
        lambda: hfc.heal(model, tiny_llama(2), IDS),
        lambda: hfc.relevance(model, IDS[:2]),
    ):
        with pytest.raises(hfc.UnsupportedModelError, match=r"made under torch\.inference_mode.* copy\.deepcopy"):
            refused()
    compressed("dropped", copy.deepcopy(model))(IDS).logits.sum().backward()


@pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
def test_what_takes_gradients_takes_them_where_they_are_off(off):
    model, teacher = tiny_llama(3), tiny_llama(3)
    before = model.lm_head.weight.clone()
    with off():
        ids = IDS.clone()
        hfc.heal(model, teacher, ids, lora=None)
        hfc.fit(model, hfc.AdaptiveCompressConfig(variant="linear", **ADAPTIVE), ids)
        hfc.relevance(model, ids[:2])
        hfc.analyze(model, ids)
        plan = hfc.make_plan(model, CONFIGS["packed"], ids)
        dense = hfc.models.from_sequential(
            torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.ReLU(), torch.nn.Linear(5, 2))
        )
        assert not torch.is_grad_enabled()
    assert not torch.equal(model.lm_head.weight, before)
    assert plan.edits
    dense(torch.randn(3, 4)).logits.sum().backward()
    model(IDS).logits.sum().backward()


def test_the_callers_tensors_get_no_gradient():
    model = tiny_base_model("vit")
    pixels = torch.randn(8, 3, model.config.image_size, model.config.image_size).requires_grad_()
    hfc.compress(model, hfc.LRPConfig(bits=7, group_size=8), pixels)
    assert pixels.grad is None
