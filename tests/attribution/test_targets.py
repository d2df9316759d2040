"""What is explained: the class or word predicted, named or labelled, of every kind of head, and what is refused."""

import numpy as np
import pytest
import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
)

import hf_compress as hfc
from hf_compress.calibration.data import Batch, Calibration
from hf_compress.errors import CalibrationError, UnsupportedModelError
from tests.helpers.models import refusing
from tests.helpers.relevance import FLOATS, make
from tests.helpers.round_trip import LLAMA, TEXT
from tests.helpers.tiny import randomise

IDS = torch.randint(4, 90, (3, 7), generator=torch.Generator().manual_seed(7))
PIXELS = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(7))
LENGTHS = (7, 4, 1)
CLASSIFIERS = ("BERT", "ViT", "Dense", "Llama classifier")
WORDS = ("Llama", "GPT-2", "Mixtral")


def made(family):
    if family != "Llama classifier":
        return make(family)
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(LlamaConfig(**LLAMA, num_labels=3, pad_token_id=0)).eval()
    randomise(model, seed=2)
    return model


def batch_of(model, labels=None):
    data = {"pixel_values": PIXELS, "input_values": FLOATS, "input_ids": IDS}
    return Batch({model.main_input_name: data[model.main_input_name]}, None, labels)


def explained(model, batch, target):
    return hfc.relevance(model, Calibration([batch]), target=target)


@torch.no_grad()
def logits(model, batch):
    return model(**batch.inputs).logits


def same_as(result, expected):
    torch.testing.assert_close(result.explained, expected, rtol=1e-4, atol=1e-5)


# --- classifiers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", CLASSIFIERS)
def test_classes(family):
    model = made(family)
    batch = batch_of(model, torch.tensor([2, 0, 1]))
    found = logits(model, batch)
    rows = torch.arange(3)
    same_as(explained(model, batch, "predicted"), found.max(dim=1).values)
    same_as(labelled := explained(model, batch, "label"), found[rows, batch.labels])
    assert labelled.targets == tuple(f"the class {model.config.id2label[one]}" for one in (2, 0, 1))
    for one in (1, torch.tensor(1), np.int64(1)):
        same_as(explained(model, batch, one), found[:, 1])
    for dtype in (torch.int64, torch.int32, torch.uint8):
        same_as(explained(model, batch, torch.tensor([1, 2, 0], dtype=dtype)), found[rows, torch.tensor([1, 2, 0])])


@pytest.mark.parametrize("family", CLASSIFIERS)
def test_relevance_is_of_the_class_chosen(family):
    """Of each sample for itself: as when all ask for that class."""
    model = made(family)
    batch = batch_of(model)
    each = [explained(model, batch, c).inputs for c in range(3)]
    mixed = explained(model, batch, torch.tensor([2, 0, 1])).inputs
    source = next(iter(mixed))
    for row, c in enumerate((2, 0, 1)):
        largest = float(each[c][source].abs().max())
        torch.testing.assert_close(mixed[source][row], each[c][source][row], rtol=1e-3, atol=1e-4 * largest)
    assert not torch.allclose(each[0][source], each[1][source], rtol=0.01)


def test_a_tokenizer_that_pads_with_a_known_token():
    """A classifier on the last token of each text, by the model's own count."""
    model = made("Llama classifier")
    ids = IDS.clone()
    ids[1, 4:] = 0
    mask = (ids != 0).long()
    batch = Batch({"input_ids": ids, "attention_mask": mask}, mask.bool())
    result = explained(model, batch, "predicted")
    same_as(result, logits(model, batch).max(dim=1).values)
    assert float(result.tokens[1, 4:].abs().max()) == 0
    assert float(result.tokens[1, :4].abs().min()) > 0


# --- language models --------------------------------------------------------------------------------------------------


def padded(side):
    """Texts of seven, four and one tokens."""
    mask = torch.zeros_like(IDS)
    for row, length in enumerate(LENGTHS):
        mask[row, :length] = 1
    mask = mask if side == "right" else mask.flip(1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    inputs = {"input_ids": IDS * mask, "attention_mask": mask, "position_ids": positions}
    return Batch(inputs, mask.bool())


def alone(model, row, side):
    """The logits of one text without padding, (tokens, words)."""
    length = LENGTHS[row]
    ids = IDS[row, :length] if side == "right" else IDS[row, 7 - length :]
    with torch.no_grad():
        return ids, model(ids[None]).logits[0]


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("family", WORDS)
def test_next_words_after_padded_texts(family, side):
    """Against each text alone."""
    model, batch = made(family), padded(side)
    ends = torch.stack([alone(model, row, side)[1][-1] for row in range(3)])
    same_as(explained(model, batch, "predicted"), ends.max(dim=1).values)
    same_as(named := explained(model, batch, 42), ends[:, 42])
    assert (
        named.targets
        == (f"{'the next word' if model.can_generate() else 'the word at the last token'}, number 42",) * 3
    )
    words = torch.tensor([98, 0, 5])
    same_as(explained(model, batch, words), ends[torch.arange(3), words])


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("family", WORDS)
def test_every_next_word_of_padded_texts(family, side):
    """The logit at every real token of the real token that follows; a text of one has none."""
    model, batch = made(family), padded(side)
    result = explained(model, batch, "label")
    assert result.targets == ("all labels of the text",) * 3
    totals = []
    for row in range(3):
        ids, found = alone(model, row, side)
        totals.append(sum(float(found[t, ids[t + 1]]) for t in range(len(ids) - 1)))
    same_as(result, torch.tensor(totals))
    assert totals[2] == 0
    assert float(result.tokens[2].abs().max()) == 0


def test_tokens_that_do_not_count_are_neither_explained_nor_followed():
    """A special token amid a text: neither what leads to it nor what comes after it."""
    model = made("Llama")
    real = torch.ones(3, 7, dtype=torch.bool)
    real[:, 3] = False
    real[:, 6] = False
    batch = Batch({"input_ids": IDS}, real)
    found = logits(model, batch)
    pairs = [(0, 1), (1, 2), (4, 5)]
    expected = sum(found[torch.arange(3), before, IDS[:, after]] for before, after in pairs)
    same_as(explained(model, batch, "label"), expected)
    same_as(explained(model, batch, "predicted"), found[:, 5].max(dim=1).values)


# --- refusals ---------------------------------------------------------------------------------------------------------


def refused(model, batch, error, message, target="predicted"):
    """It says why, and the model is as it was."""
    with refusing(model, error, message):
        explained(model, batch, target)


@pytest.mark.parametrize("family", CLASSIFIERS)
def test_no_labels(family):
    model = made(family)
    refused(model, batch_of(model), CalibrationError, "target='label' .* the data has none: give batches", "label")


@pytest.mark.parametrize(
    ("family", "target", "message"),
    [
        ("Dense", 3, "target must be 0 to 2; got 3 to 3"),
        ("Dense", -1, "target must be 0 to 2; got -1 to -1"),
        ("Dense", torch.tensor([0, 9, 1]), "target must be 0 to 2; got 0 to 9"),
        ("Dense", torch.tensor([0, 1]), r"one class for each of 3 samples; got \(2,\)"),
        ("Dense", torch.tensor([[0], [1], [2]]), r"one class for each of 3 samples; got \(3, 1\)"),
        ("Dense", torch.tensor([0.0, 1.0, 2.0]), "target must name one class"),
        ("Dense", torch.tensor([True, False, True]), "target must name one class"),
        ("Dense", 1.0, "target must name one class"),
        ("Dense", True, "target must name one class"),
        ("Dense", "magic", "must be 'predicted', 'label', a class, or one for each sample; got 'magic'"),
        ("Dense", "", "target must be 'predicted', 'label', .*; got ''"),
        ("Llama", 99, "target must be 0 to 98; got 99 to 99"),
        ("Llama", torch.tensor([0, 1]), r"for each of 3 samples; got \(2,\)"),
        ("Llama", "magic", "got 'magic'"),
    ],
    ids=str,
)
def test_targets_that_make_no_sense(family, target, message):
    model = made(family)
    refused(model, batch_of(model), ValueError, message, target)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 1, 3], "must be 0 to 2; got 0 to 3"),
        ([0, -100, 2], "must be 0 to 2; got -100 to 2"),
        ([0, 1], r"each of 3 samples; got \(2,\)"),
    ],
)
def test_labels_that_make_no_sense(labels, message):
    model = made("BERT")
    refused(model, batch_of(model, torch.tensor(labels)), ValueError, message, "label")


WITHOUT_LOGITS = {
    # their states have as many dimensions as logits of words, and are none
    "BERT": (lambda: made("BERT").bert, "BertModel gives .* load it with a head"),
    "Llama": (lambda: made("Llama").model, "LlamaModel gives .* load it with a head"),
    "ViT": (lambda: made("ViT").vit, "load it with a head"),
    # logits of classes at every token are no logits of words
    "tokens": (
        lambda: LlamaForTokenClassification(LlamaConfig(**LLAMA, num_labels=3)).eval(),
        "LlamaForTokenClassification gives .* no logits of classes or of words",
    ),
}


@pytest.mark.parametrize("target", ["predicted", "label", 0], ids=str)
@pytest.mark.parametrize("kind", WITHOUT_LOGITS)
def test_models_without_logits_of_a_class_or_a_word(kind, target):
    build, message = WITHOUT_LOGITS[kind]
    model = build()
    refused(model, batch_of(model, torch.tensor([0, 1, 2])), UnsupportedModelError, message, target)


def test_masked_language_models():
    """The word held most likely in the last place; BERT's own head has its activation as a module."""
    torch.manual_seed(0)
    model = BertForMaskedLM(BertConfig(**TEXT)).eval()
    batch = batch_of(model)
    same_as(explained(model, batch, "predicted"), logits(model, batch)[:, -1].max(dim=1).values)
