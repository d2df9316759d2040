"""Whether an engine says what Transformers says: greedy tokens, and what the likeliest of them cost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_compress.calibration.capture import inference
from hf_compress.errors import ParityError

LIKELIEST = 8  # tokens whose log-probabilities are compared at every place


@dataclass(frozen=True)
class Word:
    """A token that a model says, and how likely it holds that one and others for.

    Attributes:
        token: its number.
        likeliest: the log-probabilities, in nats, of the likeliest tokens, by their numbers; none where an engine does
            not tell.
    """

    token: int
    likeliest: dict[int, float]


class Speaker(Protocol):
    """A language model in some engine."""

    def say(self, prompt: Sequence[int], count: int) -> list[Word]:
        """So many tokens after a prompt, each the likeliest; fewer where the text ends, with or without its end."""


@dataclass(frozen=True)
class Agreement:
    """How far an engine agrees with Transformers.

    Attributes:
        prompts: that both went on with.
        tokens: after them, that were compared.
        largest_difference: of a log-probability, in nats; NaN where the engine has told none.
        ties: prompts after which the two parted where two tokens were as likely but for the tolerance.
    """

    prompts: int
    tokens: int
    largest_difference: float
    ties: int

    def __str__(self) -> str:
        tied = f", {self.ties} of {self.prompts} up to a tie" if self.ties else ""
        told = f"log-probabilities differ by up to {self.largest_difference:.2g}"
        if math.isnan(self.largest_difference):
            told = "no log-probabilities were told"
        return f"the same {self.tokens} greedy tokens after {self.prompts} prompts{tied}; {told}"


class Reference:
    """A model in Transformers.

    Attributes:
        ends: tokens that end a text.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        given = getattr(model.generation_config, "eos_token_id", None)
        self.ends = frozenset() if given is None else frozenset(given if isinstance(given, list) else [given])

    def say(self, prompt: Sequence[int], count: int) -> list[Word]:
        """Without a cache, so that nothing but the model itself speaks."""
        ids, words = torch.tensor([list(prompt)], device=self.model.device), list[Word]()
        with inference(self.model):
            while len(words) < count and not (words and words[-1].token in self.ends):
                output = self.model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
                words.append(word_of(output.logits[0, -1]))
                ids = torch.cat([ids, ids.new_tensor([[words[-1].token]])], dim=1)
        return words


def word_of(logits: Tensor) -> Word:
    """The likeliest token by logits (vocabulary)."""
    costs = logits.float().log_softmax(dim=-1)
    values, tokens = costs.topk(min(LIKELIEST, len(costs)))
    likeliest = dict(zip(tokens.tolist(), values.tolist(), strict=True))
    return Word(int(tokens[0]), likeliest)


def agreement(
    reference: Reference, engine: Speaker, prompts: Sequence[Sequence[int]], count: int, tolerance: float, name: str
) -> Agreement:
    """Have both go on with prompts, and compare them token by token.

    Args:
        count: tokens after each prompt.
        tolerance: nats by which log-probabilities may differ.
        name: of the engine, for messages.

    Raises:
        ParityError: they differ by more, or the engine says another token where the reference has no tie.
    """
    tokens, differences, ties = 0, list[float](), 0
    for number, prompt in enumerate(prompts, 1):
        said = engine.say(prompt, count)
        for place, ours in enumerate(reference.say(prompt, count)):
            theirs = said[place] if place < len(said) else _ended(ours, reference.ends)
            where = f"{name} does not say what Transformers says: token {place + 1} after prompt {number}"
            difference = _difference(ours, theirs) if theirs.likeliest else 0.0
            if not difference <= tolerance:
                raise ParityError(
                    f"{where} has a log-probability that differs by {difference:.3g}; {tolerance:g} may be"
                )
            differences += [difference] if theirs.likeliest else []
            tokens += 1
            if ours.token != theirs.token:
                gap = ours.likeliest[ours.token] - ours.likeliest.get(theirs.token, -math.inf)
                if gap > 2 * tolerance:
                    raise ParityError(f"{where} is {theirs.token}, and {ours.token} is likelier by {gap:.3g} nats")
                ties += 1
                break
    return Agreement(len(prompts), tokens, max(differences, default=math.nan), ties)


def _ended(ours: Word, ends: frozenset[int]) -> Word:
    """What an engine has said that has ended a text: the likeliest end that there is."""
    told = {token: ours.likeliest[token] for token in ends if token in ours.likeliest}
    return Word(max(told, key=told.__getitem__, default=-1), ours.likeliest)


def _difference(ours: Word, theirs: Word) -> float:
    """The largest of a log-probability, of the tokens that both tell of; infinite where those are none, or NaN."""
    differences = [
        abs(value - theirs.likeliest[token]) for token, value in ours.likeliest.items() if token in theirs.likeliest
    ]
    if not differences or any(math.isnan(value) for value in differences):
        return math.inf
    return max(differences)
