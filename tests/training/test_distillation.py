"""The distance from a teacher, against loops over the places that count."""

import math

import pytest
import torch
from transformers import BertConfig, BertForTokenClassification

from hf_compress.training.distillation import Distillation
from tests.helpers.language import WORDS, tiny_llama
from tests.helpers.models import leftovers
from tests.helpers.runs import tiny_dense
from tests.helpers.tiny import tiny_seq2seq_model


def shaken(model, seed=1):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model


def slowly(own, other, places, temperature):
    """The mean of Σ p log(p / q) over (row, position), in Python's own numbers, times T²."""
    total = 0.0
    for row, position in places:
        scores = [[value / temperature for value in logits[row, position].tolist()] for logits in (own, other)]
        q, p = ([math.exp(s - max(line)) for s in line] for line in scores)
        q, p = ([value / sum(line) for value in line] for line in (q, p))
        total += sum(b * math.log(b / a) for a, b in zip(q, p, strict=True))
    return temperature**2 * total / len(places)


def tagger(seed=0):
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return BertForTokenClassification(BertConfig(**sizes, vocab_size=len(WORDS), num_labels=3)).eval()


IDS = torch.randint(4, 60, (3, 6), generator=torch.Generator().manual_seed(0))
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1]])
LABELS = torch.where(MASK.bool() & (IDS % 4 > 0), IDS, -100)
ALL = [(row, place) for row in range(3) for place in range(6)]


def found_and_expected(student, teacher, kwargs, places, temperature=1.0):
    distillation = Distillation(student, teacher, temperature=temperature)
    with torch.no_grad():
        output = student(**kwargs)
        other = teacher(**kwargs).logits
    divergence, streams = distillation.losses(kwargs, output, torch.tensor(1.0))
    assert streams is None
    return divergence.item(), slowly(output.logits, other, places, temperature)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_a_causal_model_counts_shifted_labels(temperature):
    kwargs = {"input_ids": IDS, "attention_mask": MASK, "labels": LABELS}
    places = [(row, place - 1) for row, place in ALL if place > 0 and LABELS[row, place] != -100]
    found, expected = found_and_expected(tiny_llama(2), shaken(tiny_llama(2)), kwargs, places, temperature)
    assert found == pytest.approx(expected, rel=1e-4)


def test_without_labels_what_is_no_padding_counts():
    places = [(row, place) for row, place in ALL if MASK[row, place]]
    kwargs = {"input_ids": IDS, "attention_mask": MASK}
    found, expected = found_and_expected(tiny_llama(2), shaken(tiny_llama(2)), kwargs, places)
    assert found == pytest.approx(expected, rel=1e-4)


def test_labels_of_tokens_are_not_shifted():
    labels = torch.where(LABELS == -100, -100, LABELS % 3)
    places = [(row, place) for row, place in ALL if labels[row, place] != -100]
    kwargs = {"input_ids": IDS, "attention_mask": MASK, "labels": labels}
    found, expected = found_and_expected(tagger(), shaken(tagger()), kwargs, places)
    assert found == pytest.approx(expected, rel=1e-4)


def test_an_encoder_decoder_counts_its_labels():
    labels = LABELS.clone()
    places = [(row, place) for row, place in ALL if labels[row, place] != -100]
    student = tiny_seq2seq_model("t5")
    kwargs = {"input_ids": IDS, "attention_mask": MASK, "labels": labels}
    found, expected = found_and_expected(student, shaken(tiny_seq2seq_model("t5")), kwargs, places)
    assert found == pytest.approx(expected, rel=1e-3)


def test_one_logit_is_a_regression():
    student, teacher = tiny_dense(num_labels=1), shaken(tiny_dense(num_labels=1))
    values = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    output = student(input_values=values)
    found, _ = Distillation(student, teacher).losses({"input_values": values}, output, torch.tensor(0.5))
    other = teacher(input_values=values).logits
    gaps = [(a - b) ** 2 for a, b in zip(output.logits[:, 0].tolist(), other[:, 0].tolist(), strict=True)]
    assert found.item() == pytest.approx(0.5 * sum(gaps) / 5, rel=1e-5)


def test_nothing_that_counts_is_no_distance():
    student = tiny_llama(2)
    kwargs = {"input_ids": IDS, "labels": torch.full_like(IDS, -100)}
    found, _ = Distillation(student, shaken(tiny_llama(2))).losses(kwargs, student(**kwargs), torch.tensor(0.0))
    found.backward()
    assert found.item() == 0


def test_streams_are_compared_at_real_tokens():
    student, teacher = tiny_llama(3), shaken(tiny_llama(3))
    distillation = Distillation(student, teacher, pairs=[(0, 0), (2, 2)])
    kwargs = {"input_ids": IDS, "attention_mask": MASK}
    with distillation.watching():
        output = student.train()(**kwargs)
    teacher.train()
    _, found = distillation.losses(kwargs, output, torch.tensor(0.5))
    assert teacher.training
    assert leftovers(student) == leftovers(teacher) == []
    gaps = []
    for block in (0, 2):
        streams = []
        for model in (student, teacher.eval()):
            kept = []
            handle = model.model.layers[block].register_forward_hook(lambda *a, kept=kept: kept.append(a[2]))
            model(**kwargs)
            handle.remove()
            out = kept[0] if isinstance(kept[0], torch.Tensor) else kept[0][0]
            streams.append(torch.stack([out[r, p] for r, p in ALL if MASK[r, p]]))
        own, other = streams
        gaps.append(((own - other) ** 2).sum() / ((other - other.mean(0)) ** 2).sum())
    assert found.item() == pytest.approx(0.5 * (sum(gaps) / 2).item(), rel=1e-4)
