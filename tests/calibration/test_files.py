"""Texts from files: every kind, and every way in which there are none."""

import json
from pathlib import Path

import pytest
import torch
from datasets import Dataset, DatasetDict

from hf_compress.calibration.data import DataOptions, prepare
from hf_compress.calibration.files import is_source, load, load_texts
from hf_compress.calibration.reading import read_texts
from hf_compress.errors import CalibrationError

ROWS = ["one two", "three", "four five six"]


def _file(folder, kind):
    path = folder / f"texts.{kind}"
    data = Dataset.from_dict({"text": ROWS, "number": [1, 2, 3]})
    if kind == "txt":
        path.write_text("\n\n".join(ROWS))
    elif kind == "json":
        path.write_text(json.dumps([{"text": row, "number": 1} for row in ROWS]))
    elif kind == "jsonl":
        path.write_text("".join(json.dumps({"text": row}) + "\n" for row in ROWS))
    elif kind == "csv":
        data.to_csv(path, index=False)
    else:
        data.to_parquet(path)
    return path


@pytest.mark.parametrize("kind", ["txt", "json", "jsonl", "csv", "parquet"])
def test_every_kind_of_file_gives_its_texts(tmp_path, kind):
    path = _file(tmp_path, kind)
    assert load_texts(path) == ROWS
    assert load_texts(str(path), limit=2) == ROWS[:2]


@pytest.mark.parametrize("given", [str, Path])
def test_data_by_the_name_of_a_file(given, tmp_path, make_llama, tokenizer):
    path = tmp_path / "my texts.jsonl"
    path.write_text("".join(json.dumps({"body": text, "number": 1}) + "\n" for text in ("w1 w2", "w3", "w4 w5 w6")))
    model = make_llama()
    found = prepare(given(path), model, tokenizer, DataOptions(max_samples=2, text_column="body", seed=None))
    expected = prepare(["w1 w2", "w3"], model, tokenizer)
    assert torch.equal(found.batches[0].inputs["input_ids"], expected.batches[0].inputs["input_ids"])
    assert read_texts(given(path)) == ["w1 w2", "w3", "w4 w5 w6"]


@pytest.mark.parametrize(
    ("data", "named"),
    [
        ("nowhere.jsonl", True),
        ("Salesforce/wikitext:wikitext-2-raw-v1:test", True),
        ("imdb", True),
        (Path("x"), True),
        ("once upon a time", False),
        ("a text\n", False),
        ("", False),
        ("word " * 2000, False),
        ("word" * 2000, False),
        (["imdb"], False),
        (b"imdb", False),
    ],
)
def test_what_is_a_name_and_what_a_text(data, named):
    assert is_source(data) is named


def test_a_name_of_nothing(model, tokenizer):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.jsonl: no such file or folder, nor a dataset"):
        prepare("nowhere.jsonl", model, tokenizer)


def test_a_saved_dataset_and_a_folder_of_files_give_their_texts(tmp_path):
    Dataset.from_dict({"text": ROWS}).save_to_disk(tmp_path / "one")
    splits = {"train": Dataset.from_dict({"text": ROWS}), "test": Dataset.from_dict({"text": ["no"]})}
    DatasetDict(splits).save_to_disk(tmp_path / "two")
    (tmp_path / "three").mkdir()
    _file(tmp_path / "three", "jsonl")
    assert all(load_texts(tmp_path / name) == ROWS for name in ("one", "three"))
    assert load(tmp_path / "two").items == ROWS


def test_paragraphs_of_a_text_file_are_texts_and_empty_ones_are_not(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("first line\nsecond line\n\n  \n\nlast\n")
    assert load_texts(path) == ["first line\nsecond line", "last"]


def test_the_column_is_the_named_one_or_the_only_one_of_strings(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"body": "yes", "title": "no"}) + "\n")
    assert load_texts(path, text_column="body") == ["yes"]
    with pytest.raises(CalibrationError, match="columns body, title"):
        load_texts(path)
    with pytest.raises(CalibrationError, match="there is no 'text'"):
        load_texts(path, text_column="text")
    path.write_text(json.dumps({"body": "yes", "number": 3}) + "\n")
    assert load_texts(path) == ["yes"]
    with pytest.raises(CalibrationError, match="row 0 has a int"):
        load_texts(path, text_column="number")


def test_empty_texts_do_not_count_towards_the_limit(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in ["", "a", " ", "b", "c"]))
    assert load_texts(path, limit=2) == ["a", "b"]
    with pytest.raises(ValueError, match="at least 1; got 0"):
        load_texts(path, limit=0)


@pytest.mark.parametrize("name", ["missing.jsonl", "./missing", "/no/such/place", "what is this?"])
def test_what_is_not_there_is_said(name):
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        load_texts(name)
