"""load_saved(): the class that a model was saved by, and nothing made up."""

import json

import pytest
from safetensors.torch import load_file, save_file
from transformers import BertForMaskedLM, BertForSequenceClassification, BertModel, ViTForImageClassification

from hf_compress import evaluate
from hf_compress.errors import UnsupportedModelError
from hf_compress.evaluation.loading import load_saved, saved_class
from tests.helpers.language import tiny_llama
from tests.helpers.relevance import dense
from tests.helpers.tiny import tiny_kind

MODELS = {
    "causal": tiny_llama,
    "classifier": lambda: tiny_kind(BertForSequenceClassification, "bert"),
    "masked": lambda: tiny_kind(BertForMaskedLM, "bert"),
    "encoder": lambda: tiny_kind(BertModel, "bert"),
    "images": lambda: tiny_kind(ViTForImageClassification, "vit"),
    "our own": dense,
}


@pytest.mark.parametrize("kind", MODELS)
def test_the_class_that_saved_it(kind, tmp_path):
    model = MODELS[kind]()
    model.save_pretrained(tmp_path)
    assert type(load_saved(str(tmp_path))) is type(model)
    assert evaluate(tmp_path).parameters == sum(p.numel() for p in model.parameters())


def test_a_config_without_a_class_is_that_of_a_language_model(tmp_path):
    model = tiny_llama()
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": None}))
    assert saved_class(str(tmp_path))[0] is type(load_saved(str(tmp_path))) is type(model)


@pytest.mark.parametrize(
    "architecture", ["MyOwnForCausalLM", "Trainer", "pipeline", "BertConfig", "AutoModel", "__doc__"]
)
def test_a_class_that_is_not_known_is_named(architecture, model, tmp_path):
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": [architecture]}))
    with pytest.raises(UnsupportedModelError, match=f"was saved by the class {architecture}, which is no model of"):
        load_saved(str(tmp_path))


@pytest.mark.parametrize("kind", ["causal", "classifier", "masked"])
def test_a_head_whose_weights_are_missing_is_not_made_up(kind, tmp_path):
    MODELS[kind]().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    gone = next(name for name in weights if name.startswith(("lm_head", "classifier", "cls")))
    del weights[gone]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    for load in (load_saved, evaluate):
        with pytest.raises(UnsupportedModelError, match=r"are missing there .* they would be random"):
            load(str(tmp_path))


def test_what_is_not_there_is_named():
    with pytest.raises(OSError, match="no model 'org/no-such-model'"):
        load_saved("org/no-such-model")
