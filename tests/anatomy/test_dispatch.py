"""What accelerate has done to a model is found out, and what it leaves behind put right."""

import copy

import pytest
import torch
from torch import nn
from transformers import BertForMaskedLM, LlamaForCausalLM, Qwen3MoeForCausalLM, T5ForConditionalGeneration

from hf_compress.anatomy.compressible import check_model
from hf_compress.anatomy.dispatch import (
    check_readable,
    computing_device,
    is_dispatched,
    loading_hook,
    place_at,
    retie,
    without_hook,
    without_values,
)
from hf_compress.anatomy.undo import Undo
from hf_compress.calibration.capture import inference
from hf_compress.errors import OffloadError, UnsupportedModelError
from hf_compress.evaluation.perplexity import perplexity
from hf_compress.report.history import model_size
from hf_compress.rewrite.probe import Probe, outputs_on, same_outputs
from hf_compress.rewrite.site import Site, resized
from tests.helpers.disk import in_memory, logits_of, offloaded
from tests.helpers.language import tiny_llama
from tests.helpers.tiny import tiny_config, tiny_model

OUTSIDE = ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head")
MIXED = dict.fromkeys((*OUTSIDE, "model.layers.0"), "cpu") | {"model.layers.1": "disk"}
CPU = torch.device("cpu")


@pytest.fixture
def plain():
    return tiny_llama(layers=2, tied=True)


@pytest.fixture
def model(plain, tmp_path):
    return offloaded(plain, tmp_path)


def tied(model) -> bool:
    return model.lm_head.weight is model.model.embed_tokens.weight


def test_where_a_model_computes(plain, model):
    assert model.device.type == "meta"
    for one in (plain, model):
        for part in (one, one.model.layers[1], one.model.layers[1].mlp.up_proj, one.model.rotary_emb):
            assert computing_device(part) == CPU
    assert computing_device(nn.Linear(2, 2, device="meta")).type == "meta"
    assert is_dispatched(model)
    assert not is_dispatched(plain)


def test_places(plain, tmp_path):
    model = offloaded(tiny_llama(layers=2), tmp_path, MIXED)
    assert not place_at(model, "model.layers.0.mlp.up_proj").offloaded
    assert place_at(model, "model.layers.1.mlp.up_proj").offloaded
    assert place_at(model, "model.layers.1.mlp.up_proj").device == CPU
    assert place_at(plain, "model.layers.1.mlp").offloaded is False
    for block in model.model.layers:  # what is new has no hook, and belongs with what is around it
        block.mlp = nn.Sequential(nn.Linear(16, 16, device="meta"))
    assert not place_at(model, "model.layers.0.mlp.0").offloaded
    assert place_at(model, "model.layers.1.mlp.0").offloaded


def test_a_copy_of_a_module_runs_itself(model):
    layer = model.model.layers[0].mlp.up_proj
    assert copy.copy(layer).forward.args == (layer,)
    copied = without_hook(copy.copy(layer))
    assert loading_hook(copied) is None
    assert copied.forward.__self__ is copied
    new = resized(layer, 16, 8)
    new.weight = nn.Parameter(torch.ones(8, 16))
    assert torch.equal(new(torch.ones(16)), torch.full((8,), 16.0))
    assert loading_hook(layer) is not None


# --- tied weights -----------------------------------------------------------------------------------------------------


def test_tied_weights_stay_tied_in_our_own_passes(plain, model):
    assert tied(model)
    with inference(model):
        logits_of(model)
    assert tied(model)
    assert model_size(model) == model_size(plain)


def test_tied_weights_that_accelerate_has_untied(plain, model):
    logits_of(model)
    assert not tied(model)
    assert model_size(model) == model_size(plain)
    assert tied(model)
    logits_of(model)
    retie(model)
    assert tied(model)
    retie(plain)
    assert tied(plain)


def test_a_tied_weight_in_memory_is_the_one_that_stays(tmp_path):
    """As when a head is offloaded, and the embeddings that it is tied to are on the GPU."""
    model = offloaded(tiny_llama(layers=2, tied=True), tmp_path, MIXED)
    embeddings = model.model.embed_tokens.weight
    model.lm_head.weight = nn.Parameter(embeddings.to("meta"))
    retie(model)
    assert tied(model)
    assert model.lm_head.weight is embeddings


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "qwen3_moe", "deepseek_v3"])
@pytest.mark.parametrize("offload_buffers", [False, True])
def test_an_offloaded_model_is_accepted(kind, offload_buffers, tmp_path):
    model = offloaded(tiny_model(kind), tmp_path, offload_buffers=offload_buffers)
    check_model(model)
    assert without_values(model) == []
    assert in_memory(model) == []


def test_a_model_without_weights_is_refused(plain):
    with torch.device("meta"):
        empty = type(plain)(plain.config)
    with pytest.raises(
        UnsupportedModelError, match=r"model\.embed_tokens\.weight, are on the meta device, and no hook"
    ):
        check_model(empty)


def test_an_offloaded_model_with_a_part_that_nobody_reads_is_refused(model):
    model.model.layers[1].mlp = nn.Linear(16, 16, device="meta")
    with pytest.raises(UnsupportedModelError, match=r"2 parameters, such as model\.layers\.1\.mlp\.weight, are on the"):
        check_readable(model)


@pytest.mark.parametrize("kind", ["llama", "qwen3_moe"])
def test_a_missing_file_is_named(kind, tmp_path):
    model = offloaded(tiny_model(kind), tmp_path)
    folder = "saved" if kind == "llama" else "offloaded"
    file = next(file for file in (tmp_path / folder).iterdir() if file.suffix == ".safetensors")
    file.unlink()
    with pytest.raises(OffloadError, match=rf"{file} is gone, from which \S+ is read"):
        check_model(model)


def test_a_model_that_is_spread_without_hooks_is_refused(plain, monkeypatch):
    plain.model.norm.weight = nn.Parameter(plain.model.norm.weight.to("meta"))
    monkeypatch.setattr("hf_compress.anatomy.compressible.check_readable", lambda _: None)
    with pytest.raises(UnsupportedModelError, match=r"spread over \['cpu', 'meta'\]"):
        check_model(plain)


def test_a_broken_weight_in_memory_is_named(tmp_path):
    plain = tiny_llama(layers=2)
    plain.model.layers[0].mlp.up_proj.weight.data[1, 1] = float("nan")
    for one in (plain, offloaded(plain, tmp_path, MIXED)):
        with pytest.raises(ValueError, match=r"layers\.0\.mlp\.up_proj\.weight holds NaN"):
            check_model(one)


# --- running ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind",
    [LlamaForCausalLM, Qwen3MoeForCausalLM, T5ForConditionalGeneration, BertForMaskedLM],
    ids=lambda k: k.__name__,
)
def test_a_probe_runs_as_in_memory(kind, tmp_path):
    torch.manual_seed(0)
    plain = kind(tiny_config(kind.config_class.model_type)).eval()
    model = offloaded(plain, tmp_path)
    probe = Probe.of(model)
    assert probe.generates == Probe.of(plain).generates
    assert same_outputs(outputs_on(model, probe), outputs_on(plain, probe))
    assert model_size(model) == model_size(plain)


def test_perplexity(plain, model, framing_tokenizer, texts):
    assert perplexity(model, framing_tokenizer, texts) == perplexity(plain, framing_tokenizer, texts)


def test_a_site_finds_tied_weights_after_a_pass(model):
    logits_of(model)
    check_model(model)
    with pytest.raises(ValueError, match="is shared"):
        Site(model, Undo()).linear("lm_head")
