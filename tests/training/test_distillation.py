"""The distance from a teacher, against loops over the places that count."""

import math

import pytest
import torch
from transformers import BertConfig, BertForTokenClassification

from hf_compress.training.distillation import Distillation
from tests.helpers.language import WORDS, tiny_llama
from tests.helpers.models import leftovers, watching
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


def seq2seq():
    return tiny_seq2seq_model("t5")


IDS = torch.randint(4, 60, (3, 6), generator=torch.Generator().manual_seed(0))
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1]])
LABELS = torch.where(MASK.bool() & (IDS % 4 > 0), IDS, -100)
TAGS = torch.where(LABELS == -100, -100, LABELS % 3)
ALL = [(row, place) for row in range(3) for place in range(6)]


CASES = {
    # a causal model counts shifted labels
    "causal": (lambda: tiny_llama(2), LABELS, [(row, at - 1) for row, at in ALL if at and LABELS[row, at] != -100]),
    "without labels": (lambda: tiny_llama(2), None, [(row, at) for row, at in ALL if MASK[row, at]]),
    "tokens": (tagger, TAGS, [(row, at) for row, at in ALL if TAGS[row, at] != -100]),
    "encoder-decoder": (seq2seq, LABELS, [(row, at) for row, at in ALL if LABELS[row, at] != -100]),
}


@pytest.mark.parametrize(("case", "temperature"), [*((case, 1.0) for case in CASES), ("causal", 2.5)])
def test_the_places_that_count(case, temperature):
    build, labels, places = CASES[case]
    rel = 1e-3 if case == "encoder-decoder" else 1e-4
    student, teacher = build(), shaken(build())
    kwargs = {"input_ids": IDS, "attention_mask": MASK} | ({} if labels is None else {"labels": labels})
    with torch.no_grad():
        output, other = student(**kwargs), teacher(**kwargs).logits
    distillation = Distillation(student, teacher, temperature=temperature)
    found, streams = distillation.losses(kwargs, output, torch.tensor(1.0))
    assert streams is None
    assert found.item() == pytest.approx(slowly(output.logits, other, places, temperature), rel=rel)


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
            with watching({block: model.model.layers[block]}) as seen:
                model(**kwargs)
            streams.append(seen[block][1][MASK.bool()])
        own, other = streams
        gaps.append(((own - other) ** 2).sum() / ((other - other.mean(0)) ** 2).sum())
    assert found.item() == pytest.approx(0.5 * (sum(gaps) / 2).item(), rel=1e-4)
