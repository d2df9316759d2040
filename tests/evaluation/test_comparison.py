import json
import math
import statistics
from dataclasses import replace

import pytest

from hf_compress.errors import UnsupportedModelError
from hf_compress.evaluation.compare import compare
from hf_compress.evaluation.comparison import Comparison
from hf_compress.evaluation.evaluate import evaluate
from hf_compress.evaluation.scores import ByDocument, TaskScore
from hf_compress.evaluation.speed import Speed
from tests.helpers.cards import perplexity, result
from tests.helpers.classifiers import labelled_rows, tiny_classifier
from tests.helpers.language import tiny_llama, word_tokenizer

OURS, THEIRS = (250.0, 310.0, 290.0), (240.0, 295.0, 285.0)
HITS = {"dense": (1, 1, 1, 0), "small": (1, 0, 1, 0)}


def scored(name):
    documents = ByDocument(dict(enumerate(HITS[name])))
    return (TaskScore("cloze", "acc", statistics.fmean(HITS[name]), 0.25, True, 4, documents),)


@pytest.fixture
def made():
    """Two models' figures made by hand: three texts of 100 tokens, four questions, two rounds of speed."""
    return Comparison(
        {
            "dense": result(1000, losses=THEIRS, scores=scored("dense"), throughput=None),
            "small": result(750, losses=OURS, scores=scored("small"), throughput=None),
        },
        {"small": (Speed(64, 8, (2.0, 4.0), (10.0, 10.0), 8000), Speed(64, 8, (1.0, 3.0), (15.0, 20.0), 6000))},
    )


def test_differences_are_those_of_pairs(made):
    gaps = [(a - b) / 100 for a, b in zip(OURS, THEIRS, strict=True)]  # nats a token; documents of one length
    error = statistics.stdev(gaps) / math.sqrt(3)
    row = made.get("perplexity", "small")
    assert row.change == pytest.approx(math.exp(statistics.fmean(gaps)))
    assert row.change_error == pytest.approx(row.change * error)
    row = made.get("cloze acc", "small")
    assert (row.kind, row.change, row.value) == ("difference", -0.25, 0.5)
    assert row.change_error == pytest.approx(0.25)  # of -1, 0, 0, 0
    row = made.get("seconds to first token", "small")
    assert (row.value, row.change) == (2.0, pytest.approx((1 / 2 + 3 / 4) / 2))
    assert made.get("seconds to first token", "dense").value == 3.0
    assert made.get("generated tokens/s", "small").change == 1.75
    assert made.get("bytes of memory to run", "small").change == 0.75
    assert made.get("parameters", "small").change == 0.75
    assert math.isnan(made.get("parameters", "dense").change)
    with pytest.raises(KeyError, match="no 'bleu' of 'small'; there is"):
        made.get("bleu", "small")


def test_the_table_puts_the_models_under_each_other(made):
    lines = made.table().splitlines()
    assert [line.split("  ")[-1].strip() for line in lines[2:4]] == ["1,000", "× 0.75"]
    assert " ".join(lines[0].split()) == "model value against dense"
    assert " ".join(lines[-4].split()) == "cloze acc ↑ (4 documents) dense 0.75 ± 0.25"
    assert " ".join(lines[-3].split()) == "small 0.50 ± 0.25 −0.25 ± 0.25"
    assert len({line.index("dense") for line in (lines[2], lines[-4])}) == 1  # in columns
    assert "64 random tokens, and 8 generated after them; medians of 2 rounds" in lines[-1]
    assert "<td>× 0.75</td>" in made._repr_html_()


def test_json_has_every_row_and_no_nan(made):
    content = json.loads(made.to_json())
    assert content["reference"] == "dense"
    assert list(content["models"]) == ["dense", "small"]
    assert content["speeds"]["small"]["dense"]["first_token_median"] == 3.0
    by_name = {(row["metric"], row["model"]): row for row in content["comparison"]}
    assert by_name["parameters", "small"]["change"] == 0.75
    assert by_name["parameters", "dense"]["change"] is None


def test_what_cannot_be_paired_is_said(made):
    dense, small = made.results.values()
    token, unpaired = perplexity(OURS, tokens_sha256="a"), perplexity(THEIRS, tokens_sha256="b")
    fewer = replace(small.scores[0], by_document=ByDocument({0: 1}))
    unknown = replace(small.scores[0], by_document=None)
    for ours, theirs, note in (
        ({"perplexity": token, "scores": ()}, {"perplexity": unpaired, "scores": ()}, "other tokens"),
        ({"perplexity": token, "scores": ()}, {"perplexity": None, "scores": ()}, "not measured of the first"),
        ({"perplexity": None, "scores": (fewer,)}, {"perplexity": None}, "other documents"),
        ({"perplexity": None}, {"perplexity": None, "scores": ()}, "not measured of the first"),
    ):
        row = Comparison({"a": replace(dense, **theirs), "b": replace(small, **ours)}).rows()[-1]
        assert row.note.startswith(note)
        assert math.isnan(row.change)
    row = Comparison({"a": dense, "b": replace(small, scores=(unknown,))}).rows()[-1]
    assert (row.change, row.note) == (-0.25, "error not known")


@pytest.fixture
def folders(tmp_path, tokenizer):
    """Two language models with their tokenizers."""
    for name, layers in {"dense": 3, "small": 2}.items():
        tiny_llama(layers).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    return [tmp_path / "dense", tmp_path / "small"]


def test_directories_are_measured_as_evaluate_measures_them(folders, texts, task_folder, tmp_path):
    given = {"tasks": "tiny_cloze", "texts": texts, "include_path": task_folder, "limit": 3}
    found = compare(folders, **given, speed=False, output_dir=tmp_path / "out")
    alone = evaluate(folders[1], **given, speed=False)
    assert (found.reference, list(found.results)) == ("dense", ["dense", "small"])
    assert found.results["small"].to_dict() == alone.to_dict()
    assert found.results["dense"].perplexity.documents == 2  # the first three, of which one has nothing to score
    row = found.get("tiny_cloze acc", "small")
    assert (row.documents, math.isnan(row.change_error)) == (3, False)
    assert json.loads((tmp_path / "out" / "comparison.json").read_text()) == found.to_dict()
    assert (tmp_path / "out" / "small" / "evaluation.json").is_file()


def test_live_models_with_their_speed(tokenizer, texts):
    found = compare({"a": tiny_llama(2), "b": tiny_llama(1)}, tokenizer, texts=iter(texts))
    assert found.get("perplexity", "a").documents == found.get("perplexity", "b").documents
    assert len(found.speeds["b"][0].first_token) == 5
    assert found.get("generated tokens/s", "b").change > 0


@pytest.mark.parametrize(("room", "turns"), [(2**40, ["abc"]), (0, ["ab", "ac"])])
def test_models_run_in_turn_as_far_as_there_is_room(tmp_path, monkeypatch, room, turns):
    for name, layers in {"a": 1, "b": 2, "c": 3}.items():
        tiny_llama(layers).save_pretrained(tmp_path / name)
    seen = []

    def in_turn(models):
        seen.append("".join("_abc"[model.config.num_hidden_layers] for model in models))
        return [Speed(8, 8, (float(model.config.num_hidden_layers),), (1.0,), 9) for model in models]

    monkeypatch.setattr("hf_compress.evaluation.compare.speeds_in_turn", in_turn)
    monkeypatch.setattr("hf_compress.evaluation.compare.get_max_memory", lambda: {"cpu": room})
    found = compare([tmp_path / name for name in "abc"])
    assert seen == turns
    assert found.get("seconds to first token", "c").change == 3
    assert len(found._first_speeds()) == len(turns)


def test_classifiers_document_by_document(tokenizer):
    models = {"first": tiny_classifier(seed=0), "second": tiny_classifier(seed=1)}
    found = compare(models, tokenizer, labelled=labelled_rows(), speed=False)
    hits = [found.results[name].labelled.hits for name in models]
    gaps = [int(b) - int(a) for a, b in zip(*hits, strict=True)]
    assert any(gaps)
    row = found.get("labelled data accuracy", "second")
    assert row.change == pytest.approx(statistics.fmean(gaps))
    assert row.change_error == pytest.approx(statistics.stdev(gaps) / math.sqrt(len(gaps)))
    row = found.get("labelled data F1 of yes", "second")
    assert 0 < row.change_error < 0.5


def test_other_tokens_are_not_compared(folders, texts):
    word_tokenizer(add_special=True).save_pretrained(folders[1])  # <s> before a text: its first word is scored, too
    row = compare(folders, texts=texts, speed=False).get("perplexity", "small")
    assert (row.note, math.isnan(row.change), row.value > 0) == ("other tokens: not comparable", True, True)


def test_a_model_without_a_tokenizer_takes_the_firsts(folders, texts, caplog):
    for path in folders[1].glob("*token*"):
        path.unlink()
    assert compare(folders, texts=texts, speed=False).get("perplexity", "small").change > 0
    assert "the first model's is used" in caplog.text


def test_directories_of_one_name_are_told_apart(tmp_path):
    for parent in ("one", "two"):
        tiny_llama(1).save_pretrained(tmp_path / parent / "model")
    found = compare([tmp_path / "one" / "model", tmp_path / "two" / "model"], speed=False)
    assert list(found.results) == ["one/model", "two/model"]


def test_what_is_refused_before_any_work(folders, tmp_path, monkeypatch):
    monkeypatch.setattr("hf_compress.evaluation.compare.evaluate", None)
    dense, small = folders
    tiny_classifier().save_pretrained(tmp_path / "classifier")
    live = tiny_llama()
    for models, error, message in (
        ([dense], ValueError, "two or more"),
        ([dense, small, tmp_path / "small" / ".." / "dense"], ValueError, "the same one twice"),
        ({"a": live, "b": live}, ValueError, "twice, as 'a' and 'b'"),
        ([live, live], TypeError, "expected directories, or a mapping"),
        ([dense, tmp_path / "none"], OSError, "none"),
        ([dense, tmp_path / "classifier"], UnsupportedModelError, "perplexity needs .*BertForSequenceClassification"),
    ):
        with pytest.raises(error, match=message):
            compare(models, texts=["w1 w2"])
    with pytest.raises(UnsupportedModelError, match="which LlamaForCausalLM is not"):
        compare(folders, labelled=labelled_rows())
