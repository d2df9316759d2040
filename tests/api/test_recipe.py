"""Recipes: read, written, refused; and the same model again from a model's report."""

import json

import jsonschema
import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

import hf_compress as hfc
from hf_compress.api.recipe import CalibrationSource, EvaluationPlan, Recipe
from hf_compress.api.schema import recipe_schema
from hf_compress.calibration.files import load
from hf_compress.methods.base.settings import method_names
from tests.helpers.every_method import SETTINGS
from tests.helpers.language import tiny_llama, word_tokenizer, words

WHOLE = {
    "model": "some/model",
    "stages": [
        {"method": "mka", "ratio": 0.25},
        "heal",
        {"method": "lrp", "bits": 4.25, "granularity": "neuron", "sparsity": 0.1, "pattern": [1, 2]},
    ],
    "calibration": {"data": "texts.jsonl", "samples": 64, "max_length": 128, "batch_size": 4, "seed": None},
    "evaluate": {"tasks": ["manuals_cloze"], "texts": "heldout.jsonl", "limit": 32},
    "output": "smaller",
    "dtype": "bfloat16",
    "seed": 3,
    "portable": True,
}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    tiny_llama(6).save_pretrained(home / "model")
    word_tokenizer(add_special=False).save_pretrained(home / "model")
    (home / "texts.jsonl").write_text("".join(json.dumps({"text": words(20, s)}) + "\n" for s in range(24)))
    return home


def test_a_recipe_is_what_its_file_says(tmp_path):
    recipe = Recipe.from_dict(WHOLE)
    assert recipe.stages[1] == hfc.HealConfig()
    assert recipe.stages[2] == hfc.LRPConfig(bits=4.25, granularity="neuron", sparsity=0.1, pattern=(1, 2))
    assert recipe.calibration == CalibrationSource("texts.jsonl", 64, 128, 4, seed=None)
    assert recipe.evaluate == EvaluationPlan(("manuals_cloze",), "heldout.jsonl", limit=32)
    assert (recipe.output, recipe.dtype, recipe.seed, recipe.portable) == ("smaller", "bfloat16", 3, True)
    recipe.to_yaml(tmp_path / "recipe.yaml")
    (tmp_path / "recipe.json").write_text(json.dumps(recipe.to_dict()))
    assert Recipe.from_file(tmp_path / "recipe.yaml") == Recipe.from_file(tmp_path / "recipe.json") == recipe


def test_a_name_alone_is_calibration_data():
    recipe = Recipe.from_dict({"model": "m", "stages": ["adaptive_compress"], "calibration": "texts.jsonl"})
    assert recipe.calibration == CalibrationSource("texts.jsonl")


REFUSED = {
    "key": ({"stagse": []}, TypeError, r"a recipe has no setting 'stagse' \(did you mean 'stages'\?\); it has model"),
    "no model": ({"model": ...}, ValueError, "a recipe needs 'model'; got stages"),
    "no stages": ({"stages": ...}, ValueError, "a recipe needs 'stages'"),
    "stages that are none": ({"stages": "mka"}, TypeError, "stages is a list of methods and their settings; got 'mka'"),
    "empty": ({"stages": []}, ValueError, "there are no stages"),
    "sequence": ({"stages": ["heal"]}, ValueError, "stage 1 is heal"),
    "section": ({"calibration": 3}, TypeError, "calibration is a mapping of data, samples, .*; got 3"),
    "section's key": (
        {"calibration": {"date": "x"}},
        TypeError,
        r"calibration has no setting 'date' \(did you mean 'data",
    ),
    "section's value": (
        {"calibration": {"data": "x", "samples": 0}},
        ValueError,
        "calibration: samples must be a whole",
    ),
    "no data": ({"calibration": {"samples": 3}}, ValueError, "calibration: say where the data is"),
    "no data to heal on": (
        {"stages": ["adaptive_compress", "heal"]},
        ValueError,
        "heal learns from data, and the recipe has none",
    ),
    "tests on what it was fitted to": (
        {"calibration": "t.jsonl", "evaluate": {"texts": "t.jsonl"}},
        ValueError,
        "calibration and evaluate are given the same texts, t.jsonl",
    ),
    "nothing measured": ({"evaluate": {"limit": 3}}, ValueError, "evaluate: say what to measure"),
    "dtype": ({"dtype": "fp16"}, ValueError, "dtype must be one of auto, float32, bfloat16, float16; got 'fp16'"),
    "seed": ({"seed": -1}, ValueError, r"seed must be a whole number in \[0, 4294967295\]; got -1"),
    "output": ({"output": 3}, ValueError, "output must be a string; got 3"),
    "portable": ({"portable": "yes"}, ValueError, "portable must be True or False; got 'yes'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_makes_no_sense_is_refused(case):
    changes, error, message = REFUSED[case]
    values = {"model": "m", "stages": ["adaptive_compress"], **changes}
    with pytest.raises(error, match=message):
        Recipe.from_dict({name: value for name, value in values.items() if value is not ...})


def test_settings_of_one_method_are_no_recipe(tmp_path):
    (tmp_path / "settings.yaml").write_text("method: mka\nratio: 0.25\n")
    with pytest.raises(ValueError, match="has settings of one method, and no stages: give it to `compress --recipe`"):
        Recipe.from_file(tmp_path / "settings.yaml")


# --- the schema -------------------------------------------------------------------------------------------------------


def test_the_schema_takes_every_recipe_and_refuses_what_the_recipe_refuses():
    schema = recipe_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    valid = jsonschema.Draft202012Validator(schema)
    valid.validate(WHOLE)
    for config in SETTINGS.values():
        recipe = Recipe("m", (config,))
        valid.validate(yaml.safe_load(recipe.to_yaml()))
    for changes in (
        {"stagse": []},
        {"stages": []},
        {"stages": "mka"},
        {"stages": ["mka"]},  # which needs to know how much
        {"stages": [{"method": "mka", "ratio": 1.5}]},
        {"stages": [{"method": "mka", "ratio": "a quarter"}]},
        {"stages": [{"method": "lrp", "score": "wandaa"}]},
        {"stages": [{"method": "lrp", "pattern": [1, 2, 3]}]},
        {"stages": [{"method": "mka", "gamma": 0.5}]},
        {"calibration": {"samples": 3}},
        {"dtype": "fp16"},
        {"seed": -1},
    ):
        assert not valid.is_valid(WHOLE | changes), changes


def test_the_schema_knows_every_method_and_tells_what_settings_mean():
    stages = recipe_schema()["properties"]["stages"]["items"]["anyOf"]
    assert [stage["properties"]["method"]["const"] for stage in stages[1:]] == [*method_names(), "heal"]
    mka = next(stage for stage in stages[1:] if stage["properties"]["method"]["const"] == "mka")
    assert mka["properties"]["ratio"]["description"]


# --- from a report ----------------------------------------------------------------------------------------------------


def test_a_report_is_a_recipe_that_makes_the_model_again(home):
    stages = [
        {"method": "mka", "num_merges": 1},
        {"method": "heal", "steps": 1, "rank": 2},
        {"method": "lrp", "bits": 6},
    ]
    stages[2]["group_size"] = 16
    source = {"data": str(home / "texts.jsonl"), "samples": 16, "max_length": 12, "batch_size": 4, "seed": 1}
    recipe = {"model": str(home / "model"), "stages": stages, "calibration": source, "output": str(home / "first")}
    hfc.run(recipe)
    again = Recipe.from_file(home / "first")
    assert again.calibration == CalibrationSource(**source)
    assert again.stages == Recipe.from_dict(recipe).stages
    hfc.run(Recipe.from_dict(again.to_dict() | {"output": str(home / "second")}))
    first, second = (load_file(home / name / "model.safetensors") for name in ("first", "second"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(("samples", "seed"), [(10, None), (10, 3), (None, 0), (24, 0)])
def test_a_report_knows_how_the_data_was_asked_for(home, samples, seed):
    """Whether there was a draw or not; and the dtype."""
    source = {"data": str(home / "texts.jsonl"), "samples": samples, "seed": seed, "batch_size": 4}
    given = CalibrationSource(**source)
    model = LlamaForCausalLM.from_pretrained(home / "model", dtype=torch.bfloat16)
    data = load(given.data, given.text_column, given.samples, given.seed)
    hfc.compress(model, hfc.MKAConfig(num_merges=1), data, word_tokenizer(add_special=False), given.options)
    recipe = Recipe.from_report(hfc.CompressionReport.from_json(model.compression_report.to_json()))
    assert recipe.calibration == given
    assert recipe.dtype == "bfloat16"


def test_a_model_that_taught_when_it_was_compressed_already_is_said():
    model, ids = tiny_llama(5), torch.randint(4, 60, (16, 12))
    hfc.compress(model, hfc.DropBlocksConfig(num_blocks=1, criterion="last"), ids)
    hfc.compress(model, [hfc.DropBlocksConfig(num_blocks=1, criterion="last"), hfc.HealConfig(steps=1, rank=2)], ids)
    with pytest.raises(ValueError, match=r"stage 3 \(heal\) learned from a model that was compressed already"):
        Recipe.from_report(model.compression_report)


def test_small_numbers_are_read_as_python_writes_them(tmp_path):
    (tmp_path / "recipe.yaml").write_text(
        "model: m\nstages:\n- {method: mka, num_merges: 1}\n- {method: heal, learning_rate: 1e-4}\ncalibration: t.txt\n"
    )
    assert Recipe.from_file(tmp_path / "recipe.yaml").stages[1].learning_rate == 1e-4


def test_a_recipe_is_written_by_public_names():
    recipe = hfc.Recipe("m", (hfc.AdaptiveCompressConfig(),), "t.jsonl", {"texts": "h.jsonl"})
    assert recipe.calibration == hfc.CalibrationSource("t.jsonl")
    assert recipe.evaluate == hfc.EvaluationPlan(texts="h.jsonl")
    assert Recipe.from_dict(recipe.to_dict()) == recipe


def test_what_a_report_does_not_know_is_said():
    model, ids = tiny_llama(4), torch.randint(4, 60, (8, 12))
    hfc.compress(model, hfc.MKAConfig(num_merges=1), ids)
    with pytest.raises(ValueError, match="the calibration data came from memory"):
        Recipe.from_report(model.compression_report)
    hfc.heal(model, tiny_llama(4), ids)
    with pytest.raises(ValueError, match=r"stage 2 \(heal\) was made in Python, by arguments that no recipe can hold"):
        Recipe.from_report(model.compression_report)


def test_a_method_without_data_makes_a_recipe_without(home):
    model = tiny_llama(4)
    hfc.compress(model, hfc.DropBlocksConfig(num_blocks=1, criterion="last"))
    assert Recipe.from_report(model.compression_report).calibration is None
