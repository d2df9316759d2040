"""model_card(): what is known and measured, and nothing else."""

import json
import math
import re
from dataclasses import replace

import pytest
import torch
from huggingface_hub import EvalResult, ModelCard

from hf_compress.evaluation.evaluate import TaskScore
from hf_compress.evaluation.size import parameter_count
from hf_compress.report.card import model_card
from hf_compress.report.card_facts import CardDetails
from hf_compress.report.stages import Step
from tests.helpers.cards import code_of, cut_down, ours, perplexity, restage, result, rows_of


@pytest.fixture
def small(model):
    return cut_down(model)


def test_the_metadata_comes_back(small):
    words = {"license": "apache-2.0", "language": "en", "datasets": ["org/texts", "my own texts"]}
    details = CardDetails(**words, evaluation="held-out manuals", repo_id="me/Small")
    card = model_card(small, result=ours(small), details=details)
    data = ModelCard(str(card)).data
    assert data.to_dict() == card.data.to_dict()
    assert (data.base_model, data.get("base_model_relation")) == ("org/Base-1.5B", None)
    assert (data.library_name, data.pipeline_tag, data.license) == ("transformers", "text-generation", "apache-2.0")
    assert (data.tags, data.language, data.datasets) == (["hf-compress", "drop_blocks"], ["en"], ["org/texts"])
    assert data.model_name == "Small"
    value = math.exp(850 / 300)
    assert data.eval_results == [
        EvalResult("text-generation", "text", "held-out manuals", "perplexity", value, metric_name="perplexity"),
        EvalResult("text-generation", "cloze", "cloze", "acc", 0.625, metric_name="acc"),
        EvalResult("text-generation", "maths", "maths", "exact_match", 0.25, metric_name="exact_match,strict"),
    ]


@pytest.mark.parametrize(("edit", "relation"), [("PackLinear", "quantized"), ("NarrowFFN", None)])
def test_the_hub_is_told_of_packed_weights(small, edit, relation):
    restage(small, edits=[{"edit": edit, "module": "a.0.b"}])
    assert model_card(small).data.get("base_model_relation") == relation


@pytest.mark.parametrize(
    "base", ["{tmp}/private/Base-1.5B", "{tmp}/private/Base-1.5B/", "C:\\Users\\x\\private\\Base-1.5B"]
)
def test_of_a_path_the_last_folder_alone_is_told(small, tmp_path, base):
    file = f"{tmp_path}/private/texts.jsonl"
    small.compression_report = replace(small.compression_report, base_model=base.format(tmp=tmp_path))
    restage(small, config={"files": [file]})
    card = model_card(small, result=ours(small), controls={file: ours(small)}, details=CardDetails(datasets=file))
    assert card.data.base_model is None
    assert "private" not in str(card)
    assert str(tmp_path) not in str(card)
    assert "Base-1.5B, made smaller" in card.text
    assert "Datasets: texts.jsonl." in card.text
    assert json.loads(code_of(card, "json")) == {"files": ["texts.jsonl"]}
    assert rows_of(card, "Evaluation")[0] == ["", "this model", "texts.jsonl"]
    assert "huggingface.co" not in card.text


def test_a_folder_that_looks_like_a_name_on_the_hub_is_none(small, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert model_card(small).data.base_model == "org/Base-1.5B"
    (tmp_path / "org" / "Base-1.5B").mkdir(parents=True)
    assert model_card(small).data.base_model is None


@pytest.mark.parametrize(("folder", "name"), [("models--org--Base-7B", "org/Base-7B"), ("models--gpt2", "gpt2")])
def test_the_hubs_own_cache_is_known(small, folder, name):
    path = f"/home/someone/.cache/huggingface/hub/{folder}/snapshots/0123abc"
    small.compression_report = replace(small.compression_report, base_model=path)
    card = model_card(small)
    assert card.data.base_model == name
    assert f"[{name}](https://huggingface.co/{name})" in card.text
    assert "someone" not in str(card)


def test_the_model_stands_beside_its_controls(small):
    controls = {
        "uncompressed": result(9999, losses=(240.0, 295.0, 285.0), acc=0.7),
        "last blocks left out": result(parameter_count(small), losses=(300.0, 390.0, 330.0), acc=0.5, scores=()),
    }
    card = model_card(small, result=ours(small), controls=controls)
    count = f"{parameter_count(small):,}"
    size = f"{4 * parameter_count(small):,}"
    assert rows_of(card, "Evaluation") == [
        ["", "this model", "uncompressed", "last blocks left out"],
        ["parameters", count, "9,999", count],
        ["stored bytes", size, "39,996", size],
        ["perplexity ↓ (3 documents, 300 tokens)", "17.00 ± 0.85", "15.38 ± 0.77", "30.0 ± 1.5"],
        ["loss above this model's", "(reference)", "-0.100 ± 0.029", "+0.57 ± 0.12"],
        ["cloze acc ↑ (200 documents)", "0.625 ± 0.034", "0.700 ± 0.034", ""],
        ["maths exact_match,strict", "0.25", "0.25", ""],
    ]
    assert "was not measured" not in card.text.replace("an empty cell was not measured", "")
    assert "No control" not in card.text


def test_texts_without_a_name_are_called_so(small):
    card = model_card(small, result=ours(small), details=CardDetails(evaluation="\n"))
    assert card.data.eval_results[0].dataset_name == "unnamed texts"
    assert "Perplexity: on texts that are not named here." in card.text


def test_differences_are_taken_in_pairs_of_the_same_texts_alone(small):
    other = {"more": result(5, losses=(1.0, 2.0)), "none": result(5, perplexity=None)}
    rows = {row[0]: row[1:] for row in rows_of(model_card(small, result=ours(small), controls=other), "Evaluation")}
    assert rows["perplexity ↓ (3 documents, 300 tokens)"][1].endswith("(other texts: 2 documents, 200 tokens)")
    assert rows["perplexity ↓ (3 documents, 300 tokens)"][2] == ""
    assert "loss above this model's" not in rows
    bare = ours(small, perplexity=perplexity([250.0, 260.0], by_document=()))
    assert "loss above" not in model_card(small, result=bare, controls={"same": bare}).text


def test_scores_on_other_documents_say_so(small):
    scores = TaskScore("cloze", "acc", 0.5, 0.1, True, 25), TaskScore("other", "acc", 1.0, 0.1, True, 9)
    few = result(5, scores=scores)
    rows = rows_of(model_card(small, result=ours(small), controls={"few": few}), "Evaluation")
    assert ["cloze acc ↑ (200 documents)", "0.625 ± 0.034", "0.50 ± 0.10 (25 documents)"] in rows
    assert not any("other" in row[0] for row in rows)


@pytest.mark.parametrize("nothing", [True, False])
def test_without_an_evaluation_there_is_no_figure(small, nothing):
    card = model_card(small, result=None if nothing else ours(small, perplexity=None, scores=()))
    assert "This model was **not evaluated**" in card.text
    assert "Nothing was evaluated" in card.text
    assert "±" not in card.text
    assert "perplexity" not in card.text
    assert card.data.eval_results is None
    assert "model-index" not in str(card)


@pytest.mark.parametrize("names", [(), ("uncompressed",), ("random",), ("uncompressed", "x")])
def test_what_was_not_measured_beside_it_is_named(small, names):
    text = model_card(small, result=ours(small), controls={name: ours(small) for name in names}).text
    assert ("The uncompressed model was not measured" in text) is ("uncompressed" not in names)
    assert ("No control was measured" in text) is (set(names) <= {"uncompressed"})


def test_what_is_not_finite_is_no_score(small):
    broken = ours(
        small,
        perplexity=perplexity([250.0, 260.0], value=math.nan, loss=math.inf, loss_standard_error=math.nan),
        scores=(TaskScore("cloze", "acc", math.nan, math.nan, True, 5), TaskScore("b", "acc", 0.5, math.inf, None, 5)),
    )
    restage(
        small,
        config={**small.compression_report.config, "weight": math.nan},
        notes={"loss": math.nan},
        steps=[Step("first", math.nan), Step("second", 2.0)],
        edits=[{"edit": "New", "scale": math.inf, "by": math.nan}],
    )
    card = model_card(small, result=broken, controls={"control": broken})
    assert not re.search(r"\b(nan|inf)\b", str(card), re.IGNORECASE)
    assert [(entry.dataset_name, entry.metric_value) for entry in card.data.eval_results] == [("b", 0.5)]
    assert ["cloze acc ↑ (5 documents)", "not finite", "not finite"] in rows_of(card, "Evaluation")
    assert rows_of(card, "What was changed")[1] == ["New", "", "scale: not finite, by: not finite"]
    assert "Time: 2.0 s (second 2.0 s)." in card.text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": torch.nn.Linear(2, 2)}, "model is a Linear; expected a PreTrainedModel"),
        ({"result": {}}, "result is a dict; expected what"),
        ({"controls": {"last": 0.5}}, r"controls\['last'\] is a float; expected what"),
        ({"result": result(7)}, r"result is of a model with 7 parameters, but this one has [\d,]+: pass what"),
        ({"result": None, "controls": {"uncompressed": result(7)}}, "result is None: pass result=evaluate"),
    ],
)
def test_bad_arguments(arguments, message, small):
    with pytest.raises((TypeError, ValueError), match=message):
        model_card(**{"model": small, "result": ours(small)} | arguments)


@pytest.mark.parametrize("field", ["repo_id", "base_model"])
@pytest.mark.parametrize("value", ["name", "/home/me/model", "a/b/c", "org/na me", "org/x](y)", ""])
def test_what_is_no_id_on_the_hub_is_refused(field, value):
    with pytest.raises(ValueError, match=rf"{field} is {re.escape(repr(value))}; expected an id on the Hub"):
        CardDetails(**{field: value})
