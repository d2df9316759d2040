import itertools
import math

import pandas as pd
import pytest
import torch
from datasets import Dataset

from hf_compress.calibration import reading
from hf_compress.evaluation.perplexity import Perplexity, perplexity
from tests.helpers.language import POSITIONS
from tests.helpers.tiny import tiny_seq2seq_model

NOTHING = ([], [""], ["w1"], ["</s> </s>"])


def slow_losses(model, ids, max_length, stride):
    """Loss of each token but the first, by its position: one unpadded forward pass a token, from the definition.

    The first window predicts tokens 1 … max_length; each further one predicts `stride` more and sees the `max_length`
    tokens before its last.
    """
    losses = {}
    for at in range(1, len(ids)):
        further = max(0, math.ceil((at - max_length) / stride))
        last = min(len(ids) - 1, max_length + further * stride)
        context = ids[max(0, last - max_length) : at]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([context])).logits[0, -1].double()
        losses[at] = -(logits[ids[at]] - logits.exp().sum().log()).item()
    return losses


@pytest.mark.parametrize(("max_length", "stride"), [(8, 8), (8, 3), (16, 1), (POSITIONS, None), (None, None)])
def test_is_what_the_definition_gives(model, tokenizer, texts, max_length, stride):
    measured = perplexity(model, tokenizer, texts, max_length=max_length, stride=stride, batch_size=3)
    longest = max_length or POSITIONS
    tokens = [tokenizer(text)["input_ids"] for text in texts]
    expected = [loss for ids in tokens for loss in slow_losses(model, ids, longest, stride or longest).values()]
    assert measured.tokens == len(expected) == 29 + 0 + 74 + 11
    assert measured.documents == 3  # the text of one word has nothing to score
    assert measured.loss == pytest.approx(sum(expected) / len(expected), rel=1e-5)
    assert measured.value == pytest.approx(math.exp(measured.loss))


def test_context_matters_in_these_tests(model, tokenizer, texts):
    """Otherwise the test above could not tell strided windows from unstrided ones."""
    losses = [perplexity(model, tokenizer, texts, max_length=8, stride=stride).loss for stride in (8, 3, 1)]
    assert all(abs(one - other) > 1e-3 for one, other in itertools.pairwise(losses))


def test_uniform_predictions_give_the_size_of_the_vocabulary(model, tokenizer, texts):
    torch.nn.init.zeros_(model.lm_head.weight)
    measured = perplexity(model, tokenizer, texts)
    assert measured.value == pytest.approx(model.config.vocab_size, rel=1e-6)
    assert measured.loss_standard_error == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("batch_size", [1, 2, 7])
def test_batches_and_padding_change_nothing(model, tokenizer, texts, batch_size):
    one = perplexity(model, tokenizer, texts, max_length=10, stride=4, batch_size=64)
    other = perplexity(model, tokenizer, texts, max_length=10, stride=4, batch_size=batch_size)
    assert other.loss == pytest.approx(one.loss, rel=1e-6)
    assert other.loss_standard_error == pytest.approx(one.loss_standard_error, rel=1e-4)


def test_special_tokens_are_context_and_never_scored(model, framing_tokenizer, texts):
    measured = perplexity(model, framing_tokenizer, texts)
    expected = []
    for text in texts:
        ids = framing_tokenizer(text)["input_ids"]
        assert (ids[0], ids[-1]) == (framing_tokenizer.bos_token_id, framing_tokenizer.eos_token_id)
        losses = slow_losses(model, ids, POSITIONS, POSITIONS)
        expected += [losses[at] for at in range(1, len(ids) - 1)]
    assert measured.tokens == len(expected) == 30 + 1 + 75 + 12
    assert measured.loss == pytest.approx(sum(expected) / len(expected), rel=1e-5)


def test_special_tokens_inside_a_text_are_not_scored_and_unknown_words_are(model, tokenizer):
    assert perplexity(model, tokenizer, ["w1 w2 </s> w3 <pad> w4"]).tokens == 3
    assert tokenizer("never")["input_ids"] == [tokenizer.unk_token_id]
    assert perplexity(model, tokenizer, ["w1 w2 never w3"]).tokens == 3


def test_standard_error_takes_documents_as_independent(model, tokenizer, texts):
    measured = perplexity(model, tokenizer, texts)
    documents = [tokenizer(text)["input_ids"] for text in texts]
    scored = [[*slow_losses(model, ids, POSITIONS, POSITIONS).values()] for ids in documents if len(ids) > 1]
    tokens = sum(map(len, scored))
    mean = sum(map(sum, scored)) / tokens
    squares = sum((sum(losses) - mean * len(losses)) ** 2 for losses in scored)
    expected = math.sqrt(len(scored) / (len(scored) - 1) * squares) / tokens
    assert measured.clustered_by == "documents"
    assert measured.loss_standard_error == pytest.approx(expected, rel=1e-4)
    assert measured.value_standard_error == pytest.approx(measured.value * expected, rel=1e-4)


def test_equal_documents_of_one_token_give_the_textbook_standard_error(model, tokenizer):
    """With one scored token a document, the cluster estimate is s / sqrt(n)."""
    texts = [f"w{number} w{number + 1}" for number in range(20)]
    losses = torch.tensor([perplexity(model, tokenizer, [text]).loss for text in texts], dtype=torch.float64)
    measured = perplexity(model, tokenizer, texts)
    assert measured.loss_standard_error == pytest.approx((losses.std() / math.sqrt(20)).item(), rel=1e-5)


def test_one_document_is_clustered_by_windows_and_one_window_has_no_error(model, tokenizer, texts):
    several = perplexity(model, tokenizer, texts[2:3], max_length=10)
    assert several.clustered_by == "windows"
    assert several.loss_standard_error > 0
    single = perplexity(model, tokenizer, texts[:1])
    assert single.documents == 1
    assert math.isnan(single.loss_standard_error)


def test_every_submodule_comes_back_in_its_own_mode(model, tokenizer, texts):
    model.train()
    model.model.layers[0].eval()
    before = [module.training for module in model.modules()]
    perplexity(model, tokenizer, texts)
    assert [module.training for module in model.modules()] == before
    assert len(set(before)) == 2


def test_prints_with_its_error():
    assert str(Perplexity(20.0, math.log(20), 0.05, 10, 2, "documents")) == "20.00 ± 1.00"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_length": 8, "stride": 9}, r"stride is 9.*max_length \(8\).*at most max_length"),
        ({"stride": 0}, "stride must be a whole number of at least 1; got 0"),
        ({"max_length": -1}, "max_length must be .* at least 1; got -1"),
        ({"max_length": POSITIONS + 1}, f"max_length is {POSITIONS + 1}.*at most {POSITIONS}"),
        ({"batch_size": 0}, "batch_size must be .* at least 1; got 0"),
    ],
)
def test_lengths_that_do_not_fit(model, tokenizer, texts, arguments, message):
    with pytest.raises(ValueError, match=message):
        perplexity(model, tokenizer, texts, **arguments)


@pytest.mark.parametrize(
    ("texts", "error", "message"),
    [
        ("w1 w2 w3", TypeError, r"single string.*pass \[text\]"),
        (["w1 w2", None], TypeError, r"texts\[1\] is a NoneType"),
        (pd.DataFrame({"a": ["w1 w2"], "b": ["w1 w2"]}), ValueError, r"columns \['a', 'b'\].*pass it alone, as a list"),
        ({"w1 w2", "w3 w4"}, ValueError, "a set, which has another order"),
        *((nothing, ValueError, "no token to score; expected at least one text") for nothing in NOTHING),
    ],
)
def test_what_is_no_text(texts, error, message, model, tokenizer):
    with pytest.raises(error, match=message):
        perplexity(model, tokenizer, texts)


@pytest.mark.parametrize(
    "form",
    [
        lambda texts: Dataset.from_dict({"text": texts}),
        lambda texts: Dataset.from_dict({"text": texts}).to_iterable_dataset(),
        lambda texts: pd.DataFrame({"source": ["w1"] * len(texts), "text": texts}),
        lambda texts: pd.Series(texts),
        iter,
    ],
    ids=["dataset", "stream", "frame", "series", "generator"],
)
def test_texts_in_other_containers(model, tokenizer, texts, form):
    assert perplexity(model, tokenizer, form(texts)) == perplexity(model, tokenizer, texts)


def test_texts_without_an_end(model, tokenizer, monkeypatch, caplog):
    monkeypatch.setattr(reading, "BOUND", 5)
    assert perplexity(model, tokenizer, itertools.repeat("w1 w2")).documents == 5
    assert "but the first 5 samples" in caplog.text


@pytest.mark.parametrize(
    "change",
    [
        lambda model, tokenizer: tokenizer.add_special_tokens({"pad_token": "[PAD]"}),
        lambda model, tokenizer: setattr(model.config, "return_dict", False),
    ],
    ids=["a padding token without an embedding", "tuples"],
)
def test_it_does_not_hang_on(change, model, tokenizer, texts):
    expected = perplexity(model, tokenizer, texts)
    change(model, tokenizer)
    assert perplexity(model, tokenizer, texts) == expected


def test_a_broken_model_is_an_error_and_not_a_number(model, tokenizer, texts):
    model.lm_head.weight.data[5] = math.nan
    with pytest.raises(ValueError, match=r"loss on text 2 is nan.*not a finite number"):
        perplexity(model, tokenizer, texts)


def test_an_encoder_decoder_is_refused(tokenizer, texts):
    with pytest.raises(ValueError, match="T5ForConditionalGeneration is an encoder-decoder"):
        perplexity(tiny_seq2seq_model("t5"), tokenizer, texts)


def test_paired_difference_is_the_ratio_of_sums_and_far_surer_than_the_losses(model, tokenizer):
    texts = ["the cat sat on the mat", "a dog ran", "the dog sat on the cat and the mat"]
    first = perplexity(model, tokenizer, texts)
    with torch.no_grad():
        model.lm_head.weight.mul_(1.01)
    second = perplexity(model, tokenizer, texts)
    gap, error = second.loss_difference(first)
    assert gap == pytest.approx(second.loss - first.loss, abs=1e-12)
    gaps = [(b - a, n) for (a, n), (b, _) in zip(first.by_document, second.by_document, strict=True)]
    squares = sum((total - gap * count) ** 2 for total, count in gaps)
    assert error == pytest.approx((len(gaps) / (len(gaps) - 1) * squares) ** 0.5 / first.tokens)
    with pytest.raises(ValueError, match="different texts"):
        second.loss_difference(perplexity(model, tokenizer, texts[:2]))


def test_no_tokenizer_is_said_in_words():
    with pytest.raises(TypeError, match="tokenizer is a NoneType; expected the model's own"):
        perplexity(None, None, ["a text"])
