"""`hf-compress evaluate` of several models, with labelled data, and into cards."""

import json
import re
import shutil

import pytest

from hf_compress.storage.manifest import verify_files
from tests.helpers.classifiers import labelled_rows, tiny_classifier
from tests.helpers.command_line import LAST, done, refused
from tests.helpers.language import tiny_llama, word_tokenizer


@pytest.fixture(scope="module")
def small(home):
    """The model without two of its six blocks, as `compress` saves it."""
    done("compress", home / "model", *LAST, "--num", "2", "--output", home / "small")
    return home / "small"


@pytest.fixture(scope="module")
def classifier(home):
    tiny_classifier().save_pretrained(home / "classifier")
    word_tokenizer(add_special=False).save_pretrained(home / "classifier")
    (home / "labelled.jsonl").write_text("".join(json.dumps(row) + "\n" for row in labelled_rows()))
    return home / "classifier"


def columns(shown):
    """The cells of a printed table, row by row."""
    return [[cell.strip() for cell in re.split("[┃│]", line)[1:-1]] for line in shown.splitlines() if line[:1] in "┃│"]


def test_models_are_compared_and_cards_keep_what_was_edited(model_folder, small, text_file, tmp_path):
    copy = shutil.copytree(small, tmp_path / "small")
    card = copy / "README.md"
    card.write_text(card.read_text().replace("## Limitations", "## Thanks\n\nTo Ada.\n\n## Limitations"))
    arguments = ("--texts", text_file, "--limit", "6", "--no-speed", "--card", "--output", tmp_path / "out")
    shown = done("evaluate", model_folder, copy, *arguments)
    rows = {tuple(row[:2]): row[2:] for row in columns(shown)}
    assert rows["", "model"] == ["value", "against model"]
    assert rows["perplexity ↓ (6 documents)", "model"][1] == ""
    written = json.loads((tmp_path / "out" / "comparison.json").read_text())
    row = next(row for row in written["comparison"] if (row["metric"], row["model"]) == ("perplexity", "small"))
    assert f"× {row['change']:.1f}" in shown
    text = card.read_text()
    assert "To Ada." in text
    assert "not evaluated" not in text
    assert "on the first 6 texts of texts.jsonl" in text
    assert "| **this model** | uncompressed |" in text
    assert f"value: {row['value']}" in text
    verify_files(copy)
    assert "files are as they were written" in done("verify", copy)
    assert sorted(path.name for path in copy.iterdir()) == sorted(path.name for path in small.iterdir())


def test_a_card_is_made_where_there_is_none_and_calls_nothing_uncompressed_that_is_not(
    model_folder, small, text_file, tmp_path
):
    for name in ("one", "two"):
        shutil.copytree(small, tmp_path / name)
    (tmp_path / "two" / "README.md").unlink()
    tiny_llama(3).save_pretrained(tmp_path / "other")
    word_tokenizer(add_special=False).save_pretrained(tmp_path / "other")
    folders = [tmp_path / name for name in ("other", "one", "two")]
    shown = done("evaluate", *folders, "--texts", text_file, "--limit", "3", "--no-speed", "--card")
    assert shown.count("Wrote the scores into") == 2
    text = (tmp_path / "two" / "README.md").read_text()
    assert "| **this model** | other | one |" in text
    assert "The uncompressed model was not measured" in text
    verify_files(tmp_path / "two")


def test_a_classifier_on_labelled_data(classifier, home):
    shown = done("evaluate", classifier, "--labelled", home / "labelled.jsonl", "--limit", "12", "--no-speed")
    cells = {row[0]: row[1] for row in columns(shown)}
    assert 0 <= float(cells["labelled.jsonl accuracy"]) <= 1
    assert "labelled.jsonl F1 of yes" in cells


def test_speed_is_measured_in_turn(model_folder, small):
    shown = done("evaluate", model_folder, small)
    assert "seconds to first token" in shown
    told = " ".join(shown.split())
    assert "a prompt of 24 random tokens, and 24 generated after them; medians of 5 rounds" in told


def test_what_is_refused_in_one_line(home, model_folder, small, classifier, text_file, monkeypatch):
    monkeypatch.setattr("hf_compress.evaluation.perplexity.perplexity", None)
    monkeypatch.setattr("hf_compress.evaluation.compare.evaluate", None)
    labelled = ("--labelled", home / "labelled.jsonl")
    for arguments, message in (
        ((model_folder, home / "nowhere"), "nowhere: no such directory"),
        ((model_folder, home / "an empty folder"), "holds no config.json"),
        ((model_folder, model_folder), "the same one twice"),
        ((model_folder, small, *labelled), "labelled data needs a classifier"),
        ((classifier, "--texts", text_file), "perplexity needs a model that predicts the next token"),
        ((model_folder, classifier, "--texts", text_file), "which BertForSequenceClassification does not"),
        ((classifier, "--labelled", home / "nowhere.csv"), "no such file"),
        ((classifier, *labelled, "--label-column", "gold"), "has the columns text, label"),
        ((classifier, *labelled, "--label-column", "text"), "row 0 has the label"),
        ((classifier, *labelled, "--text-column", "body"), "no column 'body' for --text-column"),
        ((model_folder, "--text-column", "a", "--text-column", "b", "--texts", text_file), "--texts has one column"),
        ((model_folder, "--text-column", "a"), "neither is given"),
        ((model_folder, "--card"), "no directory there has a compression_report.json"),
        ((small, model_folder, "--card"), "give the uncompressed model first"),
    ):
        assert message in refused("evaluate", *arguments)
