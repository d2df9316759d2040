import math
import time
from functools import partial

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from hf_compress.evaluation.running_memory import peak_growth
from hf_compress.evaluation.speed import (
    Speed,
    SpeedRatio,
    median,
    median_ratio,
    speed_ratio,
    speeds_in_turn,
    tokens_per_second,
)


def test_throughput_says_how_it_was_measured(model):
    model.train()
    measured = tokens_per_second(model, length=1000, batch_size=2, repeats=3)
    assert model.training
    assert (measured.length, measured.batch_size, measured.repeats) == (48, 2, 3)  # cut to the model's 48 positions
    assert measured.tokens_per_second > 0
    assert measured.standard_error >= 0
    assert math.isnan(tokens_per_second(model, repeats=1).standard_error)


@pytest.fixture
def clocked_llama(make_llama, monkeypatch):
    """Makes models for which time goes on by one second with each block that runs, and not otherwise."""
    seconds = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: seconds[0])

    def tick(*_):
        seconds[0] += 1

    def make(layers):
        made = make_llama(layers=layers)
        for block in made.model.layers:
            block.register_forward_hook(tick)
        return made

    return make


def test_fewer_blocks_are_faster(clocked_llama):
    ratio = speed_ratio(clocked_llama(layers=1), clocked_llama(layers=12), length=48, repeats=5)
    assert ratio == SpeedRatio(value=12, standard_error=0, pairs=5)


@pytest.mark.parametrize("argument", ["length", "batch_size", "repeats"])
def test_numbers_below_one_are_refused(model, argument):
    for measure in (tokens_per_second, partial(speed_ratio, model)):
        with pytest.raises(ValueError, match=f"{argument} must be a whole number of at least 1; got 0"):
            measure(model, **{argument: 0})


def test_several_tokens_may_end_a_text(model):
    model.config.eos_token_id = [2, 3]
    assert tokens_per_second(model, length=8, repeats=1).tokens_per_second > 0


def test_models_generate_in_turn(clocked_llama, monkeypatch):
    small, large = clocked_llama(layers=1), clocked_llama(layers=12)
    turns = []
    for name, model in {"small": small, "large": large}.items():
        real = model.generate
        monkeypatch.setattr(model, "generate", lambda *a, n=name, r=real, **k: turns.append(n) or r(*a, **k))
    ours, theirs = speeds_in_turn([small, large], prompt=40, new_tokens=8, rounds=3)
    assert turns == ["small", "large"] * 5  # to warm up, for the memory, and three rounds
    assert (ours.prompt, ours.new_tokens) == (40, 8)
    assert (theirs.first_token, ours.first_token) == ((12,) * 3, (1,) * 3)  # a pass over the prompt
    assert theirs.per_second == pytest.approx([1 / 12] * 3)
    assert ours.per_second == pytest.approx([1] * 3)
    assert small.training is False


def test_prompt_and_new_tokens_fit_the_positions(model):
    (speed,) = speeds_in_turn([model], rounds=1)
    assert (speed.prompt, speed.new_tokens) == (24, 24)  # of 48 positions
    assert math.isnan(median(speed.first_token)[1])
    assert speed.to_dict()["first_token_median"] == speed.first_token[0]


def test_what_does_not_generate_only_reads(model):
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    classifier = BertForSequenceClassification(BertConfig(vocab_size=64, max_position_embeddings=32, **sizes))
    for speed in speeds_in_turn([model, classifier], rounds=2):
        assert (speed.prompt, speed.new_tokens, speed.per_second) == (32, 0, ())
        assert len(speed.first_token) == 2
        assert speed.to_dict()["per_second_median"] is None


def test_a_median_and_its_error():
    value, error = median([1.0, 2.0, 6.0])
    assert value == 2
    assert error == pytest.approx(math.sqrt(math.pi / 2) * math.sqrt(7) / math.sqrt(3))  # s² = (4 + 1 + 9) / 2
    assert median_ratio([2.0, 9.0, 8.0], [1.0, 3.0, 1.0])[0] == 3


def test_the_peak_is_seen_though_it_is_gone_at_the_end():
    with peak_growth(torch.device("cpu")) as growth:
        torch.ones(68 * 2**18).sum()  # 68 MiB, for a little may be handed back meanwhile that others had
        time.sleep(0.05)
    assert growth.bytes is None or 2**26 <= growth.bytes < 2**27
    with peak_growth(torch.device("meta")) as growth:
        pass
    assert growth.bytes is None


def test_memory_counts_the_weights(model):
    (speed,) = speeds_in_turn([model], rounds=1)
    assert isinstance(speed, Speed)
    assert speed.memory is None or speed.memory >= sum(p.nbytes for p in model.parameters())
