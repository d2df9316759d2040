"""Draws: the same for the same seed, each sample as likely as any other, and no more read than was said."""

import itertools
import json
import logging
from collections import Counter

import pandas as pd
import pyarrow as pa
import pytest
import torch
from datasets import Dataset, DatasetDict
from torch.utils.data import DataLoader

from hf_compress.calibration import files
from hf_compress.calibration.data import DataOptions, prepare
from hf_compress.calibration.files import load, load_texts
from hf_compress.calibration.reading import read, read_texts
from hf_compress.calibration.sampling import Drawn, choose, from_stream, indices, reservoir, shuffled

NUMBERED = [f"w{number}" for number in range(40)]


def jsonl(folder, texts):
    path = folder / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def parquet(folder, texts):
    Dataset.from_dict({"text": texts}).to_parquet(path := folder / "texts.parquet")
    return path


def paragraphs(folder, texts):
    (path := folder / "texts.txt").write_text("\n\n".join(texts))
    return path


def saved(folder, texts):
    Dataset.from_dict({"text": texts}).save_to_disk(path := folder / "saved")
    return path


INDEXED = {
    "list": lambda texts: texts,
    "dataset": lambda texts: Dataset.from_dict({"text": texts}),
    "frame": lambda texts: pd.DataFrame({"text": texts}),
    "series": lambda texts: pd.Series(texts, index=range(100, 100 + len(texts))),
    "arrow": lambda texts: pa.table({"text": texts}),
    "rows": lambda texts: [{"text": text} for text in texts],
    "column": lambda texts: Dataset.from_dict({"text": texts})["text"],
}
STREAMED = {
    "generator": iter,
    "stream": lambda texts: Dataset.from_dict({"text": texts}).to_iterable_dataset(),
    "rows of a generator": lambda texts: ({"text": text} for text in texts),
}
FILES = {"jsonl": jsonl, "parquet": parquet, "paragraphs": paragraphs, "saved": saved}


def drawn(kind, folder, count, seed=0, texts=NUMBERED):
    if kind in FILES:
        return load(FILES[kind](folder, texts), max_samples=count, seed=seed)
    return read((INDEXED | STREAMED)[kind](texts), max_samples=count, seed=seed)


@pytest.mark.parametrize("kind", INDEXED | STREAMED | FILES)
def test_draws_hang_on_the_seed_and_come_from_everywhere(kind, tmp_path):
    one, again, other = (drawn(kind, tmp_path, 10, seed) for seed in (3, 3, 4))
    assert one == again
    assert one.items != other.items
    assert len(set(one.items)) == 10
    assert one.seed == 3
    assert one.of == (None if kind == "stream" else 40)
    seen = set().union(*(drawn(kind, tmp_path, 20, seed).items for seed in range(8)))
    assert {NUMBERED[0], NUMBERED[-1]} <= seen, "the last ones are drawn, too"
    if kind != "stream":
        assert one.items == sorted(one.items, key=NUMBERED.index), "they stay in their order"
    first = drawn(kind, tmp_path, 10, None)
    assert first.items == NUMBERED[:10]
    assert first.seed is None
    every = drawn(kind, tmp_path, 40)
    assert every.items == drawn(kind, tmp_path, 99).items == NUMBERED
    assert every.all_there_are
    assert every.seed is None


def test_what_can_be_indexed_gives_the_same_samples_in_every_form(tmp_path):
    expected = [NUMBERED[index] for index in indices(40, 7, 5)]
    assert all(drawn(kind, tmp_path, 7, 5).items == expected for kind in INDEXED)
    ids = torch.arange(80).view(40, 2)
    for data in (ids, {"input_ids": ids}, Dataset.from_dict({"input_ids": ids.tolist()}), ids.tolist()):
        items = read(data, max_samples=7, seed=5).items
        rows = [row for item in items for row in torch.as_tensor(item["input_ids"] if isinstance(item, dict) else item)]
        assert torch.equal(torch.stack(rows).view(7, 2), ids[indices(40, 7, 5)])


@pytest.mark.parametrize("kind", [*INDEXED, "generator", "jsonl", "paragraphs", "saved"])
def test_empty_texts_are_no_samples(kind, tmp_path):
    if kind == "rows":
        return  # what of a row is its text, is seen later
    texts = [text for word in NUMBERED[:20] for text in (word, " ")]
    assert len(set(drawn(kind, tmp_path, 12, texts=texts).items) - {" "}) == 12


def test_numbers_are_shuffled_with_memory_for_those_asked_for_alone():
    assert sorted(shuffled(1000, 1)) == list(range(1000)) != list(shuffled(1000, 1))
    assert list(itertools.islice(shuffled(10**15, 0), 3)) == list(itertools.islice(shuffled(10**15, 0), 3))
    assert list(shuffled(5, None)) == [0, 1, 2, 3, 4]


DRAWS = {
    "indices": lambda seed: indices(12, 4, seed),
    "chosen": lambda seed: choose(range(12), 4, seed).items,
    "reservoir": lambda seed: reservoir(range(12), 4, seed, 12).items,
}


@pytest.mark.parametrize("kind", DRAWS)
def test_every_sample_and_every_pair_is_as_likely_as_any_other(kind):
    """Within five standard deviations of what a draw without replacement gives."""
    draws = 6000
    found = [DRAWS[kind](seed) for seed in range(draws)]
    for size, chance in ((1, 4 / 12), (2, 4 * 3 / (12 * 11))):
        counts = Counter(group for draw in found for group in itertools.combinations(draw, size))
        spread = 5 * (draws * chance * (1 - chance)) ** 0.5
        for group in itertools.combinations(range(12), size):
            assert abs(counts[group] - draws * chance) < spread, group


def test_a_reservoir_looks_at_its_pool_alone():
    numbers = itertools.count()
    found = reservoir(numbers, 5, 0, 100)
    assert next(numbers) == 101, "one more, to see that there is more"
    assert found == Drawn(found.items, 5, 100, 0, more=True)
    assert max(found.items) < 100
    assert str(found) == "5 of the first 100 samples, drawn with seed 0"
    assert reservoir(itertools.count(), 200, 0, 100) == Drawn(list(range(200)), 200, None, None, more=True)


def test_a_stream_is_shuffled_by_its_own_means_in_a_bounded_buffer(monkeypatch):
    rows = Dataset.from_dict({"n": range(1000)}).to_iterable_dataset()
    monkeypatch.setattr("hf_compress.calibration.sampling.POOL", 100)
    shuffled_rows = rows.shuffle(seed=7, buffer_size=100)
    assert from_stream(rows, 20, 7).items == list(itertools.islice(shuffled_rows, 20))
    assert from_stream(rows, 20, 7).facts() == {"seed": 7}


def test_of_a_file_so_many_rows_are_looked_at(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "ROWS", 10)
    path = jsonl(tmp_path, NUMBERED)
    found = load(path, max_samples=4)
    assert set(found.items) <= set(NUMBERED[:10])
    assert found.facts() == {"source": str(path), "asked": 4, "drawn_with": 0, "of_the_first": 10, "seed": 0}


def test_batches_of_a_loader_are_the_first_and_those_of_a_list_are_drawn():
    ids = torch.arange(80).view(40, 2)
    batches = list(DataLoader(ids, batch_size=4))
    assert torch.equal(torch.cat(read(DataLoader(ids, batch_size=4), max_samples=10).items), ids[:12])
    assert torch.equal(torch.cat(read(iter(batches), max_samples=10).items), ids[:12])
    found = read(batches, max_samples=10).items
    assert len(found) == 3
    assert all(any(torch.equal(one, batch) for batch in batches) for one in found)
    assert not torch.equal(torch.cat(found), ids[:12])


def test_the_first_ones_are_not_looked_for_in_a_pool():
    thin = [str(number) if number % 10 == 0 else "" for number in range(1000)]
    assert reservoir(iter(thin), 50, None, 100).items == [text for text in thin if text][:50]


@pytest.mark.parametrize(("read", "split"), [(load_texts, "test"), (lambda path: load(path).items, "train")])
def test_of_several_splits_texts_to_test_on_are_those_of_the_test(read, split, tmp_path):
    DatasetDict({name: Dataset.from_dict({"text": [f"{name} text"] * 3}) for name in ("train", "test")}).save_to_disk(
        str(tmp_path / "data")
    )
    assert read(tmp_path / "data") == [f"{split} text"] * 3


FACTS = {
    "all of a list": (lambda path: NUMBERED, {}, {}),
    "some of a list": (lambda path: NUMBERED, {"max_samples": 4}, {"of": 40, "seed": 0}),
    "the first of a list": (lambda path: NUMBERED, {"max_samples": 4, "seed": None}, {"of": 40}),
    "some of a generator": (lambda path: iter(NUMBERED), {"max_samples": 4, "seed": 2}, {"of": 40, "seed": 2}),
    "the first of a generator": (lambda path: iter(NUMBERED), {"max_samples": 4, "seed": None}, {}),
    "all of a file": (lambda path: path, {}, {"source": "texts.jsonl", "batch_size": 8, "drawn_with": 0}),
    "some of a file": (
        lambda path: str(path),
        {"max_samples": 4, "max_length": 9, "text_column": "text"},
        {"source": "texts.jsonl", "asked": 4, "drawn_with": 0, "of": 40, "seed": 0}
        | {"batch_size": 8, "max_length": 9, "text_column": "text"},
    ),
}


@pytest.mark.parametrize("kind", FACTS)
def test_what_was_drawn_is_told(kind, tmp_path, model, tokenizer, caplog):
    make, options, expected = FACTS[kind]
    caplog.set_level(logging.INFO, logger="hf_compress")
    found = prepare(make(jsonl(tmp_path, NUMBERED)), model, tokenizer, DataOptions(**options)).describe()
    if "source" in found:
        assert found["source"] == str(tmp_path / expected["source"])
        found["source"] = expected["source"]
    samples = options.get("max_samples", 40)
    assert found == expected | {"samples": samples, "tokens": samples, "truncated": 0}
    told = [record.getMessage() for record in caplog.records]
    if samples == 40:
        assert told == []
    elif "seed" in expected:
        assert told == [f"calibration data: 4 of 40 samples, drawn with seed {expected['seed']}"]
    else:
        assert told[0].startswith("calibration data: the first 4")


def test_texts_to_score_are_the_first(tmp_path, monkeypatch):
    monkeypatch.setattr("hf_compress.calibration.reading.BOUND", 6)
    assert read_texts(iter(NUMBERED)) == NUMBERED[:6]
    assert load_texts(jsonl(tmp_path, NUMBERED), limit=3) == NUMBERED[:3]
