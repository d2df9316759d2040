"""Calibration data: every kind in, the same batches out, and nothing but real tokens in the masks."""

from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from torch.utils.data import DataLoader, TensorDataset

from hf_compress.calibration.data import Batch, Calibration, DataOptions, prepare
from hf_compress.calibration.vocabulary import position_limit, special_ids
from hf_compress.errors import CalibrationError
from tests.helpers.language import POSITIONS, WORDS, words
from tests.helpers.relevance import dense
from tests.helpers.tiny import tiny_base_model, tiny_model

BOS, EOS, PAD = WORDS.index("<s>"), WORDS.index("</s>"), WORDS.index("<pad>")


def real_rows(calibration):
    """The token ids that count, sample by sample."""
    return [
        row[mask].tolist()
        for batch in calibration
        for row, mask in zip(batch.inputs["input_ids"], batch.real, strict=True)
    ]


@pytest.fixture
def rows(texts):
    """The ids of the texts, as any input kind should give them."""
    return [[WORDS.index(word) for word in text.split()] for text in texts]


def test_texts(model, framing_tokenizer, texts, rows):
    calibration = prepare(texts, model, framing_tokenizer, DataOptions(batch_size=5))
    assert real_rows(calibration) == rows
    assert [batch.samples for batch in calibration] == [5, 5, 2]
    assert calibration.samples == 12
    assert calibration.tokens == sum(map(len, rows))
    assert calibration.describe() == {"samples": 12, "tokens": sum(map(len, rows)), "truncated": 0}
    first = calibration.batches[0]
    assert first.inputs["input_ids"][1].tolist() == [BOS, *rows[1], EOS, *[PAD] * 9]
    assert first.inputs["attention_mask"][1].tolist() == [1] * 5 + [0] * 9


def padded(rows):
    """On the left, by an id that is no special token."""
    longest = max(map(len, rows))
    masks = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
    return Dataset.from_dict({"input_ids": [[7] * (longest - len(row)) + row for row in rows], "attention_mask": masks})


@pytest.mark.parametrize("form", [None, "torch", "numpy"])
def test_dataset_of_ids_in_any_format(model, rows, form):
    assert real_rows(prepare(Dataset.from_dict({"input_ids": rows}).with_format(form), model, None)) == rows


@pytest.mark.parametrize("make", [padded, list])
def test_padding_in_a_dataset_of_ids_is_left_out_and_lists_of_ids_have_none(model, rows, make):
    assert real_rows(prepare(make(rows), model, None)) == rows


@pytest.mark.parametrize(
    ("columns", "named"), [(("a", "text"), None), (("title", "body"), "body")], ids=["called text", "named"]
)
def test_of_two_columns_of_texts_one_is_meant(model, tokenizer, texts, rows, columns, named):
    data = Dataset.from_dict({columns[0]: ["w1"] * 12, columns[1]: texts})
    assert real_rows(prepare(data, model, tokenizer, DataOptions(text_column=named))) == rows


def test_a_generator_is_read_once_and_kept(model, tokenizer, texts, rows):
    calibration = prepare((text for text in texts), model, tokenizer)
    assert real_rows(calibration) == real_rows(calibration) == rows


LOADERS = {
    "dicts": lambda ids: DataLoader(
        [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in ids], batch_size=4
    ),
    "dicts with labels and what the model does not know": lambda ids: DataLoader(
        [{"input_ids": row, "labels": row, "name": "a text", "source_id": 3} for row in ids], batch_size=4
    ),
    "a tensor": lambda ids: ids,
    "tensors": lambda ids: DataLoader(ids, batch_size=4),
    "a mapping": lambda ids: {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": 0 * ids},
    "pairs": lambda ids: DataLoader(TensorDataset(ids, torch.zeros(len(ids))), batch_size=4),
    "pairs of a dict and labels": lambda ids: [({"input_ids": part}, part) for part in ids.split(4)],
    "generator of tensors": lambda ids: iter(ids.split(4)),
}


@pytest.mark.parametrize("kind", LOADERS)
def test_batches(model, ids, kind):
    calibration = prepare(LOADERS[kind](ids), model, None, DataOptions(batch_size=4))
    assert real_rows(calibration) == ids.tolist()
    assert [batch.samples for batch in calibration] == [4, 4, 4]
    for batch in calibration:
        assert set(batch.inputs) <= {"input_ids", "attention_mask"}


@pytest.mark.parametrize("options", [{}, {"return_tensors": "pt", "padding": True}])
def test_what_a_tokenizer_returns(model, framing_tokenizer, texts, rows, options):
    assert real_rows(prepare(framing_tokenizer(texts, **options), model, framing_tokenizer)) == rows


@pytest.mark.parametrize("dataset", [False, True])
def test_pixel_values(dataset):
    model = tiny_base_model("vit")
    size = model.config.image_size
    images = torch.randn(5, 3, size, size)
    data = Dataset.from_dict({"pixel_values": images.tolist(), "label": [0] * 5}) if dataset else images
    calibration = prepare(data, model, None, DataOptions(batch_size=2))
    assert [list(batch.inputs) for batch in calibration] == [["pixel_values"]] * 3
    assert all(batch.real is None for batch in calibration)
    assert torch.equal(torch.cat([batch.inputs["pixel_values"] for batch in calibration]), images)
    assert calibration.describe() == {"samples": 5, "tokens": 0, "truncated": 0}


def test_prepared_data_passes_through(model, calibration):
    assert prepare(calibration, model, None) is calibration


def test_masked_and_special_tokens_of_a_batch_do_not_count(model, ids):
    ids[0, 2], ids[1, 0], ids[2, 7] = BOS, EOS, PAD
    mask = torch.ones_like(ids)
    mask[3, :4] = 0
    expected = mask.bool()
    expected[0, 2] = expected[1, 0] = expected[2, 7] = False
    calibration = prepare({"input_ids": ids, "attention_mask": mask}, model, None, DataOptions(batch_size=12))
    assert torch.equal(calibration.batches[0].real, expected)


def test_special_ids_are_the_tokenizers_or_else_the_configs(tokenizer):
    config = SimpleNamespace(bos_token_id=8, eos_token_id=[9, 11], pad_token_id=None)
    config.get_text_config = lambda: config
    assert special_ids(config, None).tolist() == [8, 9, 11]
    assert special_ids(config, tokenizer).tolist() == sorted(tokenizer.all_special_ids) == [0, 1, 2, 3]


def test_the_mask_of_embeddings_is_boolean(model):
    batch = {"inputs_embeds": torch.randn(2, 4, 16), "attention_mask": torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])}
    real = prepare(batch, model, None).batches[0].real
    assert (real.dtype, real.sum()) == (torch.bool, 7)


def test_texts_beyond_the_models_positions_are_truncated_with_a_note(model, tokenizer, caplog):
    long = [words(POSITIONS + extra, seed=extra) for extra in (-1, 0, 1, 30)]
    calibration = prepare(long, model, tokenizer)
    assert f"2 calibration samples are longer than {POSITIONS} positions and were truncated" in caplog.text
    assert calibration.truncated == 2
    assert [len(row) for row in real_rows(calibration)] == [POSITIONS - 1, POSITIONS, POSITIONS, POSITIONS]
    assert real_rows(calibration)[3] == [WORDS.index(word) for word in long[3].split()][:POSITIONS]


def test_tensors_beyond_the_limit_are_truncated_with_a_note(model, ids, caplog):
    for data in (ids, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, ids.tolist()):
        caplog.clear()
        calibration = prepare(data, model, None, DataOptions(max_length=6))
        assert "12 calibration samples are longer than 6 positions" in caplog.text
        assert real_rows(calibration) == ids[:, :6].tolist()
        assert all(value.shape[1] == 6 for batch in calibration for value in batch.inputs.values())


def test_nothing_is_said_when_nothing_is_truncated(model, ids, caplog):
    assert prepare(ids, model, None, DataOptions(max_length=8)).truncated == 0
    assert not caplog.records


def test_a_length_beyond_the_models_positions_is_cut_to_them(model, tokenizer):
    calibration = prepare([words(80, seed=1)], model, tokenizer, DataOptions(max_length=70))
    assert calibration.tokens == POSITIONS


def test_roberta_loses_the_positions_up_to_its_padding_index():
    model = tiny_model("roberta")
    assert position_limit(model.config) == model.config.max_position_embeddings - model.config.pad_token_id - 1
    longest = torch.full((1, position_limit(model.config)), 9)
    model(longest)
    with pytest.raises((IndexError, RuntimeError), match="out of"):
        model(torch.full((1, longest.shape[1] + 1), 9))


VOCABULARY = len(WORDS)
BAD = {
    "missing": (lambda: None, "no calibration data: pass calibration="),
    "empty list": (list, "empty; pass at least"),
    "empty tensor": (lambda: torch.zeros((0, 8), dtype=torch.long), "empty; pass at least"),
    "empty samples": (lambda: [[], []], "empty; pass at least"),
    "empty texts": (lambda: ["", ""], "empty; pass at least"),
    "only special tokens": (lambda: [[BOS, EOS], [PAD, PAD]], "no token that counts.*pass longer texts"),
    "one string": (lambda: "once upon a time", r"list of texts, not one string \('once upon a time'"),
    "a number": (lambda: 3, "cannot be a int; pass texts"),
    "numbers": (lambda: [3.5, 4.5], "must be a tensor or hold one of input_ids.*got a float"),
    "texts and None": (lambda: ["w1", None], "all texts or none; entry 1 is a NoneType"),
    "ids too large": (lambda: torch.tensor([[4, VOCABULARY]]), f"4 to {VOCABULARY}, but.*0 to {VOCABULARY - 1}"),
    "ids below zero": (lambda: [[4, -100]], f"-100 to 4, but.*0 to {VOCABULARY - 1}.*tokenizer"),
    "float ids": (lambda: torch.ones(2, 8), r"must be whole numbers; got a tensor of torch.float32.*\.long\(\)"),
    "float ids in a mapping": (lambda: {"input_ids": torch.ones(2, 8)}, "must be whole numbers; got.*float32"),
    "one dimension": (lambda: torch.arange(8), r"\(samples, positions\).*got the shape \(8,\).*unsqueeze"),
    "one dimension in batches": (lambda: [torch.arange(8)], r"\(samples, positions\).*got the shape \(8,\)"),
    "pictures for a text model": (lambda: torch.rand(2, 3, 8, 8), "LlamaForCausalLM takes none of pixel_values"),
    "other names": (lambda: [{"tokens": torch.ones(2, 8)}], r"got a mapping of \['tokens'\]"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_data(model, tokenizer, kind):
    make, message = BAD[kind]
    with pytest.raises(CalibrationError, match=f"(?s){message}"):
        prepare(make(), model, tokenizer)


@pytest.mark.parametrize("form", ["mapping", "tuples", "loader"])
def test_classes_come_along(form):
    """One class a sample, cut into batches with the samples; what else may be called labels is left alone."""
    values, classes = torch.randn(10, 6), torch.arange(10) % 3
    data = {
        "mapping": {"input_values": values, "labels": classes},
        "tuples": [(values[:4], classes[:4]), (values[4:], classes[4:])],
        "loader": DataLoader(TensorDataset(values, classes), batch_size=4),
    }[form]
    batches = prepare(data, dense(), None, DataOptions(batch_size=4)).batches
    assert torch.equal(torch.cat([batch.labels for batch in batches]), classes)
    assert all(len(batch.labels) == batch.samples for batch in batches)


@pytest.mark.parametrize("labels", [{}, {"labels": torch.randn(10)}, {"labels": torch.ones(10, 2, dtype=torch.long)}])
def test_labels_that_are_no_classes(labels):
    data = {"input_values": torch.randn(10, 6), **labels}
    assert all(batch.labels is None for batch in prepare(data, dense(), None))


@pytest.mark.parametrize(
    ("amount", "options", "expected"),
    [
        (30, {}, [0, 3, 6]),
        (31, {}, [0, 2, 5, 7]),  # at least so many,
        (31, {"rounded": round}, [0, 3, 6]),  # or the nearest
        (1, {}, [0]),
        (0, {"rounded": round}, [0]),
        (1, {"least": 2}, [0, 5]),
        (10**9, {}, list(range(10))),
    ],
)
def test_about_so_many_tokens(amount, options, expected):
    batches = [Batch({"input_ids": torch.zeros(1, 10)}, torch.ones(1, 10, dtype=torch.bool)) for _ in range(10)]
    found = Calibration(batches).about(amount, 100, **options)
    assert [next(i for i, batch in enumerate(batches) if batch is one) for one in found] == expected
