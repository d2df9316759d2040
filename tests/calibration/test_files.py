"""Texts from files: every kind, and every way in which there are none."""

import json

import pytest
from datasets import Dataset, DatasetDict

from hf_compress.calibration.files import load_texts
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


def test_a_saved_dataset_and_a_folder_of_files_give_their_texts(tmp_path):
    Dataset.from_dict({"text": ROWS}).save_to_disk(tmp_path / "one")
    splits = {"train": Dataset.from_dict({"text": ROWS}), "test": Dataset.from_dict({"text": ["no"]})}
    DatasetDict(splits).save_to_disk(tmp_path / "two")
    (tmp_path / "three").mkdir()
    _file(tmp_path / "three", "jsonl")
    assert all(load_texts(tmp_path / name) == ROWS for name in ("one", "two", "three"))


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
