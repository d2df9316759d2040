"""Models whose structure no config can say, through everything that Transformers does with a model."""

import copy

import peft
import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    Trainer,
)

from hf_compress.anatomy.anatomy import Anatomy
from hf_compress.errors import PlanError
from hf_compress.rewrite import builders
from hf_compress.rewrite.apply import apply
from hf_compress.storage.save import save
from tests.helpers.round_trip import EDITS, build, change, changed_throughout, inputs, logits
from tests.helpers.runs import arguments, same, state_of, token_rows
from tests.helpers.untrusted import config_of, write_config

RECORDED = ("narrow one FFN", "linear FFN", "low-rank FFN", "bottleneck", "packed linear", "blended activation")


def same_state(first, second):
    return same(state_of(first), state_of(second))


@pytest.mark.parametrize(
    ("family", "auto"),
    [
        ("Llama", AutoModelForCausalLM),
        ("Mixtral", AutoModelForCausalLM),
        ("BERT", AutoModelForSequenceClassification),
        ("ViT", AutoModelForImageClassification),
    ],
)
def test_the_auto_classes(family, auto, tmp_path):
    model = changed_throughout(family)
    loaded = auto.from_pretrained(save(model, tmp_path / "out"))
    assert type(loaded) is type(model)
    assert same_state(loaded, model)
    assert torch.equal(logits(loaded), logits(model))


def test_what_is_loaded_is_an_ordinary_model(tmp_path):
    loaded = AutoModelForCausalLM.from_pretrained(save(changed_throughout("Llama"), tmp_path / "out"))
    assert not loaded.is_quantized
    assert getattr(loaded, "hf_quantizer", None) is None
    assert not hasattr(loaded, "quantization_method")
    assert not hasattr(loaded.config, "_is_quantized")
    assert loaded.config.quantization_config["quant_method"] == "hf_compress"


@pytest.mark.parametrize("family", ["Llama", "BERT", "ViT"])
def test_the_body_alone(family, tmp_path):
    model = changed_throughout(family)
    body = AutoModel.from_pretrained(save(model, tmp_path / "out"))
    assert type(body) is type(model.base_model)
    own = model.base_model.state_dict()
    assert own
    assert all(torch.equal(body.state_dict()[name], own[name]) for name in own)
    again = AutoModel.from_pretrained(save(body, tmp_path / "body"))
    assert same_state(again, body)


def test_a_head_on_a_body_that_was_saved_alone(tmp_path):
    body = AutoModel.from_pretrained(save(changed_throughout("BERT"), tmp_path / "out"))
    folder = save(body, tmp_path / "body")
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3)
    inside, own = model.bert.state_dict(), body.state_dict()
    assert len(inside) > 30
    assert all(torch.equal(inside[name], own[name]) for name in inside)


def test_a_changed_head_is_left_out_with_the_head(tmp_path):
    model = build("Qwen3")
    bits = torch.full((99, 4), 8)
    apply(
        builders.pack_linear(model, "lm_head", bits, 8) + EDITS["bottleneck"](model, Anatomy(model).stack(), 1), model
    )
    folder = save(model, tmp_path / "out")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(folder)), logits(model))
    ids = inputs(model)["input_ids"]
    with torch.no_grad():
        assert torch.equal(AutoModel.from_pretrained(folder)(ids)[0], model.model(ids)[0])


@pytest.mark.parametrize("family", ["Llama", "Mixtral"])
def test_shards(family, tmp_path):
    model = changed_throughout(family)
    model.save_pretrained(tmp_path / "out", max_shard_size="40kB")
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 2
    assert same_state(AutoModelForCausalLM.from_pretrained(tmp_path / "out"), model)


def test_tied_embeddings_stay_tied(tmp_path):
    model = changed_throughout("Llama")
    assert model.config.tie_word_embeddings
    loaded = AutoModelForCausalLM.from_pretrained(save(model, tmp_path / "out"))
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_dtype(tmp_path):
    model = changed_throughout("Llama")
    folder = save(model, tmp_path / "out")
    half = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    packed = half.model.layers[2].self_attn.o_proj
    assert half.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16
    assert half.model.layers[1].residual_bottleneck.encoder.dtype == torch.bfloat16
    assert torch.equal(packed.unpacked(), model.model.layers[2].self_attn.o_proj.unpacked())
    assert torch.allclose(logits(half).float(), logits(model), atol=0.05)
    again = AutoModelForCausalLM.from_pretrained(save(half, tmp_path / "half"), dtype="auto")
    assert same_state(again, half)
    assert torch.equal(logits(again), logits(half))


@pytest.mark.parametrize("device_map", ["auto", "cpu", {"": "cpu"}])
def test_device_map(device_map, tmp_path):
    model = changed_throughout("Llama")
    loaded = AutoModelForCausalLM.from_pretrained(save(model, tmp_path / "out"), device_map=device_map)
    assert torch.equal(logits(loaded), logits(model))


def test_saving_a_loaded_model_writes_the_same_files(tmp_path):
    model = changed_throughout("Mixtral")
    model.save_pretrained(tmp_path / "first")
    AutoModelForCausalLM.from_pretrained(tmp_path / "first").save_pretrained(tmp_path / "second")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()


def test_a_deep_copy_is_the_same_model(tmp_path):
    model = changed_throughout("Llama")
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin), logits(model))
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(save(twin, tmp_path / "out"))), logits(model))


def trainer(folder, output):
    """For four steps, with a checkpoint after two of them."""
    settings = {"save_strategy": "steps", "save_steps": 2, "learning_rate": 1e-3, "lr_scheduler_type": "linear"}
    model = AutoModelForCausalLM.from_pretrained(folder)
    return Trainer(model, arguments(output, **settings, train_sampling_strategy="random"), train_dataset=token_rows())


def test_trainer(tmp_path):
    """Trained in two stretches from a checkpoint or in one go, and loaded from what Trainer wrote."""
    folder = save(changed_throughout("Llama"), tmp_path / "out")
    whole = trainer(folder, tmp_path / "whole")
    whole.train()
    assert not torch.equal(logits(whole.model), logits(changed_throughout("Llama")))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "whole" / "checkpoint-4")
    assert torch.equal(logits(loaded), logits(whole.model))
    resumed = trainer(folder, tmp_path / "whole")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert same_state(resumed.model, whole.model)


@pytest.mark.parametrize("edit", RECORDED)
def test_lora_and_merging_it(edit, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(save(change(build("Llama"), edit), tmp_path / "out"))
    before = logits(model)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "down_proj"], r=2))
    torch.manual_seed(4)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    merged = adapted.merge_and_unload()
    assert not torch.allclose(logits(merged), before, atol=1e-3)
    again = AutoModelForCausalLM.from_pretrained(save(merged, tmp_path / "merged"))
    assert torch.equal(logits(again), logits(merged))


def test_an_adapter_finds_its_way_back(tmp_path):
    folder = save(changed_throughout("Llama"), tmp_path / "out")
    adapted = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(folder),
        peft.LoraConfig(target_modules=["up_proj"], init_lora_weights=False),
    )
    adapted.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), tmp_path / "adapter")
    with torch.no_grad():
        ids = inputs(build("Llama"))["input_ids"]
        assert torch.equal(again.eval()(ids).logits, adapted.eval()(ids).logits)


MLP = "model.layers.1.mlp"
WIDE = {"edit": "NarrowFFN", "inputs": [f"{MLP}.gate_proj", f"{MLP}.up_proj"], "output": f"{MLP}.down_proj"}


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"version": 2}, "has version 2, known is 1: upgrade hf-compress"),
        ({"version": None}, "has version None"),
        ({"plan": {}}, "a list of at most"),
        (
            {"plan": [{"edit": "Teleport"}]},
            "unknown edit in the plan.*known are RemoveBlocks, .*Seal: upgrade hf-compress",
        ),
        ({"plan": [{"edit": "RemoveBlocks", "stack": "model.layers", "blocks": [0]}]}, "says by itself which blocks"),
        ({"plan": [{"edit": "Seal", "module": "../model"}]}, "must be the path of a module"),
        ({"plan": [{"edit": "Seal", "module": "model.nowhere"}]}, "LlamaForCausalLM has no module model.nowhere"),
        ({"plan": [WIDE | {"width": 10**9}]}, "has 64 hidden units; the plan asks for 1000000000"),
        ({"surprise": 1}, "unknown fields .'surprise'"),
    ],
)
def test_a_record_that_cannot_be_carried_out(entry, message, tmp_path):
    folder = save(change(build("Llama"), "narrow one FFN"), tmp_path / "out")
    config = config_of(folder)
    write_config(folder, config | {"quantization_config": config["quantization_config"] | entry})
    with pytest.raises(PlanError, match=message):
        AutoModelForCausalLM.from_pretrained(folder)
