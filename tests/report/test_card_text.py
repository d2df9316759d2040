"""What a model card says was done, and the lines with which it says to load the model."""

import json
from dataclasses import replace

import pytest
import torch
import transformers

from hf_compress.api.compress import compress
from hf_compress.evaluation.size import parameter_count, stored_bytes
from hf_compress.methods.base.settings import CompressionConfig
from hf_compress.methods.mka import MKAConfig
from hf_compress.report.card import model_card
from hf_compress.report.card_edits import MOST_ROWS, SHORT
from hf_compress.report.card_facts import CardDetails
from hf_compress.report.edits import decisions
from hf_compress.report.markdown import escape
from hf_compress.report.report import REPORT_FILE
from hf_compress.rewrite.edits.sealed import Seal
from hf_compress.rewrite.record import entry_of
from tests.helpers.cards import code_of, cut_down, healed, ours, perplexity, restage, rows_of
from tests.helpers.tiny import tiny_kind


@pytest.fixture
def small(model):
    return cut_down(model)


def test_method_sizes_and_circumstances(model, tokenizer, texts):
    before = parameter_count(model), stored_bytes(model)
    compress(model, MKAConfig(num_merges=2), texts, tokenizer)
    card = model_card(
        model,
        command="python first.py\npython second.py --x",
        details=CardDetails(name="mine", calibration="twelve texts of words", limitations=["It is random."]),
    )
    report = model.compression_report
    assert card.text.startswith("\n# mine\n")
    assert "the method mka ([arXiv 2406.16330](https://arxiv.org/abs/2406.16330))" in card.text
    sizes = {row[0]: row[1:] for row in rows_of(card, "Size")}
    after = parameter_count(model), stored_bytes(model)
    for name, old, new in zip(("parameters", "stored bytes"), before, after, strict=True):
        assert sizes[name] == [f"{old:,}", f"{new:,}", f"{100 * new / old - 100:+.1f}%"]
    assert sizes["blocks in model.layers"] == ["5", "3", "-40.0%"]
    assert code_of(card, "bash") == "python first.py\npython second.py --x\n"
    assert CompressionConfig.from_dict(json.loads(code_of(card, "json"))) == MKAConfig(num_merges=2)
    counts = f"{report.calibration['samples']} samples, {report.calibration['tokens']} tokens"
    assert f"Calibration data: {counts}; twelve texts of words." in card.text
    assert f"torch {torch.__version__}".replace("_", "\\_") in card.text
    assert f"Time: {sum(step.seconds for step in report.stages[0].steps):.1f} s" in card.text
    assert "Reload check: passed" in card.text
    assert card.text.rstrip().endswith("- It is random.")
    assert "changed after compression" not in card.text


def test_what_is_not_recorded_is_not_made_up(small):
    text = model_card(small).text
    assert "Calibration data: none was used." in text
    assert "This reproduces it" not in text
    assert "No training after compression is recorded." in text
    small.compression_report = replace(small.compression_report, base_model="")
    restage(small, parity=False, method="from the future")
    text = model_card(small).text
    assert "A model of unknown origin, made smaller by the method from the future with" in text
    assert "Reload check: **not passed**" in text
    assert "arXiv" not in text


def test_training_that_the_report_knows_of(small):
    small.compression_report.notes["trained_steps"] = 1200
    assert "Compressed in training: 1,200 steps." in model_card(small).content
    healed(small)
    text = model_card(small).content
    assert "Healed by distillation of the uncompressed model: 64 steps, adapters (LoRA), merged." in text
    assert "No training" not in text
    healed(small, steps=7, adapters=False)
    assert "7 steps, all weights." in model_card(small).content


def test_a_model_changed_after_compression_shows_its_present_size(small):
    after = small.compression_report.after
    small.to(torch.bfloat16)
    card = model_card(small, details=CardDetails(training="two epochs."))
    assert rows_of(card, "Size")[2][2] == f"{after.bytes // 2:,}"
    assert f"had left {after.parameters:,} parameters in {after.bytes:,} bytes" in card.text
    assert "most are bfloat16" in card.text
    assert "- Trained after compression: two epochs.\n" in card.text


def test_a_model_without_a_report(model, tmp_path):
    model.config._name_or_path = model.name_or_path = f"{tmp_path}/thing"
    card = model_card(model, details=CardDetails(calibration="words"))
    told = {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["hf-compress"]}
    assert card.data.to_dict() == told
    assert card.text.startswith("\n# thing\n\nA LlamaForCausalLM, saved with hf_compress. No compression report")
    assert f"{parameter_count(model):,} parameters, {stored_bytes(model):,} stored bytes." in card.text
    assert "What was changed" not in card.text
    assert "Reload check" not in card.text
    assert "Calibration data: words." in card.text


def test_edits_in_words(small):
    gate, up, down = (f"model.layers.{{}}.mlp.{part}_proj" for part in ("gate", "up", "down"))
    narrow = [
        {"inputs": [gate.format(i), up.format(i)], "output": down.format(i), "width": 8, "bias": False}
        for i in (0, 1, 2, 4)
    ]
    restage(
        small,
        edits=[
            {"edit": "MergeBlocks", "stack": "model.layers", "kept": 2, "absorbed": [3, 4]},
            {"edit": "RemoveBlocks", "stack": "model.layers", "blocks": [0, 6, 7, 8]},
            *({"edit": "NarrowFFN", **fields} for fields in narrow),
            {"edit": "NarrowFFN", **narrow[0], "output": down.format(3), "width": 4},
            {"edit": "InsertBottleneck", "block": "model.layers.1", "skip": 0.1, "gated": True, "note": None},
            {"edit": "Unheard", "groups": list(range(40)), "planes": [3, 4], "map": {"a": 1}, "to": "/home/me/x"},
        ],
    )
    assert rows_of(model_card(small), "What was changed")[1:] == [
        ["MergeBlocks", "model.layers", "block 2 stands for blocks 2–4"],
        ["RemoveBlocks", "model.layers", "left out: 0, 6–8"],
        ["NarrowFFN", "model.layers.0–2, 4.mlp.down_proj", "8 hidden units"],
        ["NarrowFFN", "model.layers.3.mlp.down_proj", "4 hidden units"],
        ["InsertBottleneck", "model.layers.1", "skip: 0.1, gated: true, note: null"],
        ["Unheard", "", "groups: 40 values, planes: 3, 4, map: a 1, to: x"],
    ]


def narrowed(count):
    return [{"edit": "NarrowFFN", "output": f"h.{i}.fc", "width": i + 1} for i in range(count)]


def test_many_edits_are_cut_short(small):
    edits = narrowed(MOST_ROWS + 7)
    restage(small, edits=edits)
    card = model_card(small)
    assert len(rows_of(card, "What was changed")) == 1 + MOST_ROWS
    assert f"And 7 more lines; {REPORT_FILE} has every one of the {len(edits)} edits." in card.text


@pytest.mark.parametrize("count", [SHORT, SHORT + 1])
def test_a_long_table_opens_on_demand(count, small):
    restage(small, edits=narrowed(count))
    text = model_card(small).text
    opening = f"<details>\n<summary>All {count} edits</summary>\n\n| edit |"
    assert (opening in text) is (count > SHORT)
    assert text.count("</details>") == (count > SHORT)


def test_bits_are_a_histogram(small):
    """Of 192 weights, two thirds have one bit and a sixth each two and three."""
    packed = {"edit": "PackLinear", "group_size": 16, "symmetric": False}
    restage(
        small,
        edits=[{**packed, "module": "h.0.a", "planes": [4, 2, 2]}, {**packed, "module": "h.0.b", "planes": [8, 2]}],
    )
    card = model_card(small)
    assert rows_of(card, "What was changed")[:3] == [
        ["bits", "1", "2", "3"],
        ["share of the weights", "66.7%", "16.7%", "16.7%"],
        ["", "█", "▃", "▃"],
    ]
    before = small.compression_report.before
    told = "2 linear maps, of 192 weights: 1.5 bits a weight on average (1 to 3), 3.5 with the steps of groups"
    assert f"{told}; the original has {8 * before.bytes / before.parameters:.4g}." in card.text


def test_the_summary_stands_first(model, tokenizer, texts):
    """What it is made of, how much smaller, how good, how it loads: before any section."""
    before = parameter_count(model)
    compress(model, MKAConfig(num_merges=2), texts, tokenizer)
    kept = parameter_count(model)
    base = replace(ours(model), parameters=before, perplexity=perplexity([200.0, 300.0, 250.0]))
    first = model_card(model, result=ours(model), controls={"uncompressed": base}).text.partition("\n## ")[0]
    assert "- **Made of:** a LlamaForCausalLM, 3 blocks of the original's 5. " in first
    assert all(escape(line) in first for line in decisions(model.compression_report.edits))
    share = 100 * (1 - kept / before)
    assert f"kB stored, {share:.1f}% less than the original's " in first
    assert f"; {kept:,} parameters, {share:.1f}% fewer than its {before:,}." in first
    assert "- **Quality:** perplexity 17.00 ± 0.85 (uncompressed: 12.18 ± 0.61); cloze acc 0.625 ± 0.034 (unc" in first
    assert "- **Loading:** plain checkpoint: stock Transformers loads it.\n" in first


def test_figures_of_other_texts_do_not_stand_beside(small):
    other = ours(small, perplexity=perplexity([1.0, 2.0]), scores=())
    first = model_card(small, result=ours(small), controls={"uncompressed": other}).text.partition("\n## ")[0]
    assert "perplexity 17.00 ± 0.85; cloze acc 0.625 ± 0.034; " in first


MODELS = {
    "AutoModelForCausalLM": (transformers.LlamaForCausalLM, "llama", "text-generation", True),
    "AutoModelForMaskedLM": (transformers.BertForMaskedLM, "bert", "fill-mask", True),
    "AutoModel": (transformers.BertModel, "bert", None, True),
    "AutoModelForImageClassification": (transformers.ViTForImageClassification, "vit", "image-classification", False),
    "AutoModelForSeq2SeqLM": (transformers.T5ForConditionalGeneration, "t5", None, True),
}


@pytest.mark.parametrize("auto", MODELS)
def test_the_lines_that_load_it_do(auto, tokenizer, tmp_path, monkeypatch):
    kind, model_type, task, text = MODELS[auto]
    model = tiny_kind(kind, model_type)
    folder = tmp_path / 'a "quoted" name'
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    card = model_card(model, details=CardDetails(name=folder.name))
    assert card.data.pipeline_tag == task
    code = code_of(card, "python")
    assert f"{auto}.from_pretrained" in code
    (tmp_path / "path" / "to").mkdir(parents=True)
    folder.rename(tmp_path / "path" / "to" / folder.name)
    monkeypatch.chdir(tmp_path)
    loaded = {}
    exec(code, loaded)
    assert type(loaded["model"]) is type(model)
    assert ("tokenizer" in loaded) is text
    assert "hf_compress" not in loaded
    assert "It is a plain checkpoint" in card.text


def test_without_a_tokenizer_beside_it_no_line_loads_one(small):
    assert "AutoTokenizer" in model_card(small).text
    assert "AutoTokenizer" not in model_card(small, details=CardDetails(tokenizer=False)).text


def test_a_class_of_somebodys_own(small):
    small.__class__ = type("MyModel", (transformers.LlamaForCausalLM,), {})
    card = model_card(small)
    assert "# MyModel is no part of Transformers" in code_of(card, "python")
    assert 'MyModel.from_pretrained("path/to/Base-1.5B-drop_blocks")' in code_of(card, "python")
    assert card.data.pipeline_tag is None


@pytest.mark.parametrize(
    ("config", "plugin"),
    [
        (entry_of([Seal("model.layers.0.input_layernorm")]), True),
        ({"quant_method": "bitsandbytes"}, False),
        (transformers.BitsAndBytesConfig(load_in_8bit=True), False),
    ],
)
def test_the_plugin_is_imported_where_it_is_needed(small, config, plugin):
    small.config.quantization_config = config
    card = model_card(small, details=CardDetails(repo_id="me/small"))
    code = code_of(card, "python")
    assert code.startswith("import hf_compress") is plugin
    assert ("- **Loading:** needs `import hf_compress` (`pip install hf-compress`)." in card.text) is plugin
    assert 'from_pretrained("me/small")' in code
    assert ("Without the plugin, stock Transformers stops with a size-mismatch error." in card.text) is plugin
    assert ("It is a plain checkpoint" in card.text) is not plugin
    portable = model_card(small, details=CardDetails(portable=True)).text
    assert ("`trust_remote_code=True`" in portable) is plugin
