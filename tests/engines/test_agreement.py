"""What counts as the same: tokens, log-probabilities, ties and the ends of texts."""

import math

import pytest
import torch

from hf_compress.engines.agreement import Reference, Word, agreement, word_of
from hf_compress.errors import ParityError

PROMPTS = [[5, 6, 7], [9, 3]]


class Scripted:
    """Says what it was given, whatever the prompt; as a reference, too."""

    def __init__(self, *words, ends=()):
        self.words, self.ends = list(words), frozenset(ends)

    def say(self, prompt, count):
        return self.words[:count]


def word(token, **likeliest):
    return Word(token, {int(name[1:]): value for name, value in likeliest.items()})


def compared(ours, theirs, tolerance=0.01):
    return agreement(ours, theirs, PROMPTS, 4, tolerance, "the engine")


def test_what_is_said_alike_agrees():
    ours = Scripted(word(1, t1=-0.5, t2=-1.0), word(2, t2=-0.25))
    theirs = Scripted(word(1, t1=-0.504, t3=-2.0), word(2, t2=-0.25))
    found = compared(ours, theirs)
    assert (found.prompts, found.tokens, found.ties) == (2, 4, 0)
    assert found.largest_difference == pytest.approx(0.004)
    assert "the same 4 greedy tokens after 2 prompts; log-probabilities differ by up to 0.004" in str(found)


@pytest.mark.parametrize(
    ("theirs", "told"),
    [
        (word(1, t1=-0.6, t2=-1.0), "differs by 0.1; 0.01 may be"),
        (word(1, t1=math.nan), "differs by inf"),
        (word(1, t9=-0.5), "differs by inf"),
        (word(2, t1=-0.5, t2=-1.0), "is 2, and 1 is likelier by 0.5 nats"),
        (word(9, t1=-0.5), "is 9, and 1 is likelier by inf nats"),
    ],
)
def test_what_differs_is_told_by_its_place(theirs, told):
    ours = Scripted(word(3, t3=-0.1), word(1, t1=-0.5, t2=-1.0))
    with pytest.raises(ParityError, match=f"^the engine does not say .*: token 2 after prompt 1 .*{told}"):
        compared(ours, Scripted(word(3, t3=-0.1), theirs))


def test_an_engine_may_tell_tokens_alone():
    ours = Scripted(word(1, t1=-0.5, t2=-1.0), word(2, t2=-0.25))
    assert compared(ours, Scripted(word(1), word(2, t2=-0.255))).largest_difference == pytest.approx(0.005)
    found = compared(ours, Scripted(word(1), word(2)))
    assert "the same 4 greedy tokens after 2 prompts; no log-probabilities were told" in str(found)
    with pytest.raises(ParityError, match=r"token 1 after prompt 1 is 2, and 1 is likelier by 0\.5 nats"):
        compared(ours, Scripted(word(2)))


def test_a_tie_ends_the_comparison_of_a_prompt():
    ours = Scripted(word(1, t1=-0.5, t2=-0.51), word(7, t7=0.0))
    theirs = Scripted(word(2, t1=-0.505, t2=-0.505), word(8, t8=0.0))
    found = compared(ours, theirs)
    assert (found.tokens, found.ties) == (2, 2)
    assert "2 of 2 up to a tie" in str(found)


def test_an_engine_may_leave_out_the_end_of_a_text():
    ours = Scripted(word(1, t1=-0.5), word(0, t0=-0.1), ends=[0])
    assert compared(ours, Scripted(word(1, t1=-0.5))).tokens == 4
    assert compared(ours, Scripted(word(1, t1=-0.5), word(0, t0=-0.1))).tokens == 4
    with pytest.raises(ParityError, match="token 1 after prompt 1 is 0, and 1 is likelier by 2 nats"):
        compared(Scripted(word(1, t1=-0.5, t0=-2.5), ends=[0]), Scripted())


def test_the_reference_is_the_model_without_a_cache(model):
    """Token by token, as one forward pass over what it has said tells."""
    model.generation_config.eos_token_id = None
    said = Reference(model).say([5, 6, 7], 4)
    text = torch.tensor([[5, 6, 7, *(one.token for one in said)]])
    with torch.no_grad():
        costs = model(text).logits[0, 2:-1].log_softmax(-1)
    assert [one.token for one in said] == costs.argmax(-1).tolist()
    for one, row in zip(said, costs, strict=True):
        assert len(one.likeliest) == 8
        assert one.likeliest == {token: pytest.approx(float(row[token]), abs=1e-5) for token in one.likeliest}


def test_the_reference_stops_at_an_end(model):
    first = Reference(model).say([5, 6, 7], 1)[0].token
    model.generation_config.eos_token_id = [first, 60]
    reference = Reference(model)
    assert reference.ends == {first, 60}
    assert [one.token for one in reference.say([5, 6, 7], 4)] == [first]


def test_a_word_of_few():
    assert word_of(torch.tensor([0.0, 1.0])).token == 1
