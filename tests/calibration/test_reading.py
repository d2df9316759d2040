"""Containers of texts and tokens: every kind gives the same samples, and what never ends is read up to a bound."""

import itertools

import pandas as pd
import pyarrow as pa
import pytest
import torch
from datasets import Dataset, DatasetDict, IterableDataset
from torch.utils.data import DataLoader
from torch.utils.data import IterableDataset as Stream

from hf_compress.calibration import reading
from hf_compress.calibration.data import DataOptions, prepare
from hf_compress.calibration.reading import read, read_texts
from hf_compress.errors import CalibrationError
from tests.helpers.language import WORDS, tiny_llama
from tests.helpers.tiny import tiny_seq2seq_model

TEXTS = ["w1 w2 w3", "w4 w5", "w6"]
IDS = [[WORDS.index(word) for word in text.split()] for text in TEXTS]
LABELS = [[-100, *ids[1:]] for ids in IDS]
ROWS = [{"number": n, "text": text} for n, text in enumerate(TEXTS)]


def unknown_columns(rows):
    """A stream that does not say what columns it has, as from_generator and map leave it."""
    found = IterableDataset.from_generator(lambda: iter(rows))
    assert found.column_names is None
    return found


TABLES = {
    "dataset": Dataset.from_list,
    "stream": lambda rows: Dataset.from_list(rows).to_iterable_dataset(),
    "stream of unknown columns": unknown_columns,
    "the only split": lambda rows: DatasetDict({"test": Dataset.from_list(rows)}),
    "frame": pd.DataFrame,
    "arrow": lambda rows: pa.table(pd.DataFrame(rows)),
    "lists by name": lambda rows: {name: [row[name] for row in rows] for name in rows[0]},
    "rows": list,
    "generator of rows": iter,
}
TEXT_ALONE = {
    "list": list,
    "tuple": tuple,
    "series": pd.Series,
    "array": lambda texts: pd.Series(texts).to_numpy(dtype=str),
    "generator": iter,
    "column": lambda texts: Dataset.from_dict({"text": texts})["text"],
}


@pytest.mark.parametrize("kind", TABLES | TEXT_ALONE)
def test_texts(kind, model, tokenizer):
    def make():
        return TABLES[kind](ROWS) if kind in TABLES else TEXT_ALONE[kind](TEXTS)

    assert read(make()).items == read_texts(make()) == TEXTS
    (batch,) = prepare(make(), model, tokenizer).batches
    assert [row[mask].tolist() for row, mask in zip(batch.inputs["input_ids"], batch.real, strict=True)] == IDS


@pytest.mark.parametrize("kind", TABLES)
def test_the_column_is_found_or_named(kind):
    rows = [{"a": number, "b": text} for number, text in enumerate(TEXTS)]
    make = TABLES[kind]
    assert read(make(rows)).items == read(make(rows), text_column="b").items == TEXTS
    with pytest.raises(CalibrationError, match=r"columns \['a', 'b'\].*text_column= \(got 'c'\)"):
        read(make(rows), text_column="c")


@pytest.mark.parametrize("labels", [None, LABELS], ids=["ids alone", "labels"])
@pytest.mark.parametrize("kind", ["dataset", "stream", "stream of unknown columns", "frame", "lists by name", "rows"])
def test_token_ids_and_labels(kind, labels, model):
    columns = {"input_ids": IDS} | ({} if labels is None else {"labels": labels})
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    (batch,) = prepare(TABLES[kind](rows), model, None).batches
    assert [row[mask].tolist() for row, mask in zip(batch.inputs["input_ids"], batch.real, strict=True)] == IDS
    if labels is None:
        assert batch.targets is None
    else:
        assert [row[: len(ids)].tolist() for row, ids in zip(batch.targets, IDS, strict=True)] == labels
        assert all((row[len(ids) :] == -100).all() for row, ids in zip(batch.targets, IDS, strict=True))


def test_labels_of_sounds_are_padded():
    """As a dataset for speech has them: sounds of one shape, labels of their own lengths."""
    model = tiny_seq2seq_model("whisper")
    sounds = torch.randn(3, model.config.num_mel_bins, 2 * model.config.max_source_positions)
    data = Dataset.from_dict({"input_features": sounds.tolist(), "labels": LABELS})
    (batch,) = prepare(data, model, None).batches
    torch.testing.assert_close(batch.inputs["input_features"], sounds)
    assert batch.targets.tolist() == [row + [-100] * (3 - len(row)) for row in LABELS]
    assert batch.inputs["decoder_input_ids"].shape == (3, 3)


BAD = {
    "a string": (lambda: "w1 w2", "not one string"),
    "bytes": (lambda: b"w1 w2", "not one string"),
    "a set": (lambda: set(TEXTS), "another order in every run: pass a list"),
    "several splits": (
        lambda: DatasetDict({name: Dataset.from_list(ROWS) for name in ("train", "test")}),
        r"splits train, test: pass one, as data\['train'\]",
    ),
    "a dataset of two texts": (lambda: Dataset.from_dict({"a": TEXTS, "b": TEXTS}), r"\['a', 'b'\]; name the one"),
    "a frame of two texts": (lambda: pd.DataFrame({"a": TEXTS, "b": TEXTS}), r"columns \['a', 'b'\]; name the one"),
    "a frame of numbers": (lambda: pd.DataFrame({"a": [1, 2]}), "pass numbers as a tensor"),
    "lists by name of two texts": (lambda: {"a": TEXTS, "b": TEXTS}, r"columns \['a', 'b'\]; name the one"),
    "rows that differ": (lambda: [{"text": "w1"}, {"body": "w2"}], "sample 1 has no 'text'"),
    "a text that is missing": (lambda: pd.DataFrame({"text": ["w1", None]}), "entry 1 is a"),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_is_no_container_of_samples(kind, model, tokenizer):
    make, message = BAD[kind]
    with pytest.raises(CalibrationError, match=message):
        prepare(make(), model, tokenizer)


class Numbers(Stream):
    def __iter__(self):
        return itertools.repeat(torch.tensor([5, 6]))


ENDLESS = {
    "texts": lambda: itertools.repeat("w1 w2"),
    "empty texts": lambda: (text for text in itertools.chain(["w1"], itertools.repeat(""))),
    "rows": lambda: itertools.repeat({"input_ids": [5, 6]}),
    "batches": lambda: (torch.tensor([[5, 6]] * 3) for _ in itertools.count()),
    "batches by name": lambda: itertools.repeat({"input_ids": torch.tensor([[5, 6]] * 3)}),
    "batches with labels": lambda: itertools.repeat((torch.tensor([[5, 6]] * 3), torch.zeros(3))),
    "stream": lambda: IterableDataset.from_generator(lambda: itertools.repeat({"text": "w1 w2"})),
    "loader of a stream": lambda: DataLoader(Numbers(), batch_size=3),
}


@pytest.mark.parametrize("kind", ENDLESS)
def test_what_never_ends_is_read_up_to_a_bound_that_is_told(kind, model, tokenizer, monkeypatch, caplog):
    monkeypatch.setattr(reading, "BOUND", 10)
    samples = prepare(ENDLESS[kind](), model, tokenizer).samples
    assert "not all of the calibration data is read, but" in caplog.text
    assert samples == (1 if kind == "empty texts" else 12 if "batch" in kind or "loader" in kind else 10)
    caplog.clear()
    assert prepare(ENDLESS[kind](), model, tokenizer, DataOptions(max_samples=2)).samples <= 3
    assert not caplog.records, "what was asked for need not be told"


@pytest.mark.parametrize(
    "data",
    [
        ["w1"] * 30,
        Dataset.from_dict({"text": ["w1"] * 30}),
        [torch.tensor([[5, 6]])] * 30,
        torch.full((30, 2), 5),
        pd.DataFrame({"text": ["w1"] * 30}),
        DataLoader(torch.full((30, 2), 5), batch_size=3),
    ],
    ids=["list", "dataset", "batches", "tensor", "frame", "loader"],
)
def test_what_has_a_length_is_taken_whole_unless_asked(data, model, tokenizer, monkeypatch, caplog):
    monkeypatch.setattr(reading, "BOUND", 10)
    assert prepare(data, model, tokenizer).samples == 30
    assert prepare(data, model, tokenizer, DataOptions(max_samples=6)).samples == 6
    assert not caplog.records


def test_an_end_at_the_bound_is_no_cut(model, tokenizer, monkeypatch, caplog):
    monkeypatch.setattr(reading, "BOUND", 10)
    assert prepare(iter(["w1"] * 10), model, tokenizer).samples == 10
    assert not caplog.records


@pytest.mark.parametrize("form", ["texts", "padded"])
def test_a_padding_token_without_an_embedding(form, model, tokenizer):
    """Added to the tokenizer alone. Padding is masked, so any token does."""
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    assert tokenizer.pad_token_id >= tiny_llama().config.vocab_size
    data = TEXTS if form == "texts" else tokenizer(TEXTS, padding=True, return_tensors="pt")
    (batch,) = prepare(data, model, tokenizer).batches
    assert int(batch.inputs["input_ids"].max()) < model.config.vocab_size
    assert [row[mask].tolist() for row, mask in zip(batch.inputs["input_ids"], batch.real, strict=True)] == IDS
