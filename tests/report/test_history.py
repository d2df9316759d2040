"""One history: every change of a model, from the original on, wherever it was saved and loaded in between."""

import json
from dataclasses import replace
from functools import partial

import pytest
import torch
from huggingface_hub import constants, try_to_load_from_cache
from transformers import AutoModel, AutoModelForCausalLM, Trainer

import hf_compress as hfc
from hf_compress import CompressionReport, DropBlocksConfig, ILLCConfig, compress, heal, history_of, model_card, save
from hf_compress.report.history import model_size
from hf_compress.report.report import REPORT_FILE
from hf_compress.storage.compressed_tensors import save_compressed_tensors
from tests.helpers.cards import code_of, cut_down, rows_of
from tests.helpers.language import tiny_llama
from tests.helpers.linears import pack_all
from tests.helpers.runs import arguments, ids_of, token_rows

DROP = DropBlocksConfig(num_blocks=1, criterion="last")
IDS = ids_of(token_rows(48))


def told(model):
    return [stage.method for stage in history_of(model).stages]


@pytest.fixture
def folder(model, tmp_path):
    """A compressed model on disk; a plain checkpoint."""
    return save(compress(model, DROP), tmp_path / "small")


@pytest.fixture
def loaded(folder):
    return AutoModelForCausalLM.from_pretrained(folder)


def test_a_second_change_is_a_second_stage(model):
    model.config._name_or_path = model.name_or_path = "org/base"
    original = model_size(model)
    compress(model, DROP)
    between = model_size(model)
    report = compress(model, ILLCConfig(gamma=0.5), IDS).compression_report
    assert [(stage.method, stage.before, stage.after) for stage in report.stages] == [
        ("drop_blocks", original, between),
        ("illc", between, model_size(model)),
    ]
    assert (report.before, report.after, report.base_model) == (original, model_size(model), "org/base")
    assert (report.method, report.config["gamma"], report.methods) == ("illc", 0.5, ["drop_blocks", "illc"])
    assert CompressionReport.from_json(report.to_json()).to_json() == report.to_json()


@pytest.mark.parametrize("dtype", ["auto", torch.bfloat16], ids=["as it was", "in another dtype"])
def test_the_history_goes_on_after_loading(folder, dtype):
    first = json.loads((folder / REPORT_FILE).read_text())
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    assert history_of(loaded).to_dict() == first
    compress(loaded, DROP)
    assert told(loaded) == ["drop_blocks", "drop_blocks"]
    assert loaded.compression_report.to_dict()["stages"][0] == first["stages"][0]
    assert loaded.compression_report.before.blocks == {"model.layers": 5}


def test_a_model_that_needs_the_plugin_has_its_history_too(model, tmp_path):
    compress(compress(model, DROP), hfc.LRPConfig(prune=False, bits=8, group_size=16), IDS)
    again = AutoModelForCausalLM.from_pretrained(save(model, tmp_path / "out"))
    assert told(again) == told(model)


def test_healing_is_a_stage(loaded, make_llama):
    heal(loaded, make_llama(5), IDS)
    assert told(loaded) == ["drop_blocks", "heal"]
    heal(loaded, make_llama(5), IDS, lora=None)
    stages = loaded.compression_report.stages
    assert [stage.notes.get("adapters") for stage in stages] == [None, True, False]
    assert [stage.edits for stage in stages[1:]] == [[], []]
    assert loaded.compression_report.before.blocks == {"model.layers": 5}


def test_the_callback_adds_a_stage(loaded, tmp_path):
    callback = hfc.CompressionCallback(hfc.MKAConfig(num_merges=1, variant="paper"), IDS)
    Trainer(loaded, arguments(tmp_path / "run"), train_dataset=token_rows(), callbacks=[callback]).train()
    assert told(loaded) == ["drop_blocks", "mka"]
    assert loaded.compression_report.before.blocks == {"model.layers": 5}


def test_the_format_for_other_tools_brings_the_history(folder, loaded, tmp_path):
    other = save_compressed_tensors(pack_all(loaded), tmp_path / "out")
    assert (other / REPORT_FILE).read_text() == (folder / REPORT_FILE).read_text()
    assert not (other / "README.md").exists()


def test_the_hubs_cache_has_it_and_nothing_is_downloaded(folder, loaded, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    snapshot = tmp_path / "hub" / "models--me--small" / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    loaded.name_or_path, loaded.config._commit_hash = "me/small", "0123abc"
    in_cache = partial(try_to_load_from_cache, cache_dir=tmp_path / "hub")
    monkeypatch.setattr("hf_compress.report.history.try_to_load_from_cache", in_cache)
    assert history_of(loaded) is None
    (snapshot / REPORT_FILE).write_text((folder / REPORT_FILE).read_text())
    assert told(loaded) == ["drop_blocks"]
    loaded.config._commit_hash = "another"
    assert history_of(loaded) is None


def resized(model, folder):
    model.resize_token_embeddings(70, mean_resizing=False)
    model.model.vocab_size = 70  # which Transformers leaves as it was
    return f"{folder / REPORT_FILE} tells of a model with"


def of_another_depth(model, folder):
    report = history_of(model)
    size = replace(report.after, blocks={"model.layers": 7})
    replace(report, stages=[replace(report.stages[0], after=size)]).to_json(folder / REPORT_FILE)
    return "7} blocks, but this one has"


def no_report(model, folder):
    (folder / REPORT_FILE).write_bytes(b"\xff\xfe{")
    return "no compression report of this version"


@pytest.mark.parametrize("spoil", [resized, of_another_depth, no_report])
def test_a_report_that_does_not_fit_is_passed_over_and_named(spoil, folder, loaded, caplog):
    message = spoil(loaded, folder)
    assert history_of(loaded) is None
    assert message in caplog.text
    compress(loaded, DROP)
    assert told(loaded) == ["drop_blocks"]
    assert loaded.compression_report.base_model == str(folder)


def test_a_model_without_its_head_is_another(folder, caplog):
    assert history_of(AutoModel.from_pretrained(folder)) is None
    assert "its history is not known" in caplog.text


@pytest.mark.parametrize("name", ["", "no/such/place", "org/name", "/gone"])
def test_where_nothing_lies_there_is_no_history(name, model, caplog):
    model.name_or_path = name
    assert history_of(model) is None
    assert not caplog.text


BROKEN = {
    "no object": lambda data: [],
    "no stages": lambda data: data | {"stages": []},
    "of an older version": lambda data: {"method": "mka", "config": {}, "stages": []},
    "a stage without sizes": lambda data: data | {"stages": [{"method": "mka"}]},
    "a number as text": lambda data: _with(data, after={"parameters": "5", "bytes": 1, "blocks": {}}),
    "an unknown field": lambda data: _with(data, colour="red"),
    "edits that are none": lambda data: _with(data, edits=["all"]),
    "a method that is none": lambda data: _with(data, method=None),
    "deep": lambda data: "[" * 100_000,
}


def _with(data, **changes):
    return data | {"stages": [data["stages"][0] | changes]}


@pytest.mark.parametrize("broken", BROKEN)
def test_what_is_no_report_gets_a_typed_error(broken, folder):
    data = BROKEN[broken](json.loads((folder / REPORT_FILE).read_text()))
    with pytest.raises(ValueError, match="no compression report of this version of hf_compress"):
        CompressionReport.from_json(data if isinstance(data, str) else json.dumps(data))


def test_the_card_tells_all_stages(model):
    changed_twice = compress(cut_down(model), ILLCConfig(gamma=0.5), IDS)
    heal(changed_twice, tiny_llama(5), IDS)
    report = changed_twice.compression_report
    before, between, after = report.before, report.stages[0].after, report.after
    card = model_card(changed_twice)
    assert card.data.tags == ["hf-compress", "drop_blocks", "illc", "heal"]
    assert "the method drop_blocks" in card.text
    assert ", then by the method illc" in card.text
    assert ", then by distillation of the uncompressed model with hf_compress." in card.text
    sizes = {row[0]: row[1:3] for row in rows_of(card, "Size")}
    assert sizes["parameters"] == [f"{before.parameters:,}", f"{after.parameters:,}"]
    assert sizes["blocks in model.layers"] == ["5", "3"]
    changed = card.text.partition("## What was changed")[2].partition("## How it was made")[0]
    headings = [line for line in changed.splitlines() if line.startswith("###")]
    assert headings == ["### 1. drop_blocks", "### 2. illc", "### 3. heal"]
    assert changed.count("in the model before this change") == 2
    assert f"Parameters: {before.parameters:,} → {between.parameters:,};" in changed
    made = card.text.partition("## How it was made")[2]
    assert made.count("Reload check: passed") == 2
    assert made.count("Versions:") == 3
    assert "Healed by distillation" in made
    assert "No training after compression" not in card.text
    assert json.loads(code_of(card, "json"))["method"] == "drop_blocks"
