"""Losses of a model without some blocks, against models from which the blocks were really taken."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F

from hf_compress.anatomy.anatomy import Anatomy
from hf_compress.calibration.capture import forward, inference
from hf_compress.calibration.data import Batch, DataOptions, prepare
from hf_compress.calibration.losses import LossSweep, losses_without
from hf_compress.calibration.objective import batch_loss, first_tensor, mean_loss, speaks
from hf_compress.plan.edits import RemoveBlocks
from hf_compress.plan.plan import Plan
from hf_compress.rewrite.apply import apply
from tests.helpers.models import leftovers
from tests.helpers.tiny import tiny_base_model, tiny_inputs, tiny_model, tiny_seq2seq_model


def slow_loss(model, calibration):
    """Cross-entropy of every real token after the first position of its text, in a loop."""
    total, count = 0.0, 0
    with torch.no_grad():
        for batch in calibration:
            inputs = {name: value.long() for name, value in batch.inputs.items()}
            logs = F.log_softmax(model(**inputs).logits.double(), dim=-1)
            for row, (tokens, real) in enumerate(zip(inputs["input_ids"], batch.real, strict=True)):
                for position in range(1, len(tokens)):
                    if real[position]:
                        total -= logs[row, position - 1, tokens[position]].item()
                        count += 1
    return total / count


def without(model, stack, blocks):
    smaller = copy.deepcopy(model)
    apply(Plan((RemoveBlocks(stack.path, tuple(blocks)),)), smaller)
    return smaller


@pytest.mark.parametrize("skipped", [(), (3,), (1, 4)])
def test_losses_are_those_of_models_without_the_blocks(model, stack, calibration, skipped):
    candidates = [index for index in range(len(stack)) if index not in skipped]
    losses = losses_without(model, stack, calibration, candidates, skipped)
    assert list(losses) == candidates
    expected = {i: slow_loss(without(model, stack, (*skipped, i)), calibration) for i in candidates}
    assert losses == pytest.approx(expected, rel=1e-5)
    assert len({round(loss, 4) for loss in losses.values()}) == len(losses), "or the test could not tell them apart"
    assert leftovers(model) == []


def test_a_changed_block_runs_from_its_own_stream_on(model, stack, calibration):
    """With another block left out; the model is as it was kept, but for the change."""
    with inference(model):
        sweep = LossSweep(model, stack, calibration)
        sweep.keep()
        plain = sweep.loss()
        sweep.go_on(1, [3])
        skipped = sweep.loss()
        changed = sweep.loss_after(1, [2 * stream for stream in sweep.run(1)])
    assert plain == pytest.approx(slow_loss(model, calibration), rel=1e-5)
    smaller = without(model, stack, [3])
    assert skipped == pytest.approx(slow_loss(smaller, calibration), rel=1e-5)
    smaller.get_submodule(stack.path)[1].register_forward_hook(lambda _, args, output: 2 * output)
    assert changed == pytest.approx(slow_loss(smaller, calibration), rel=1e-5)
    assert len({round(loss, 4) for loss in (plain, skipped, changed)}) == 3


@pytest.mark.parametrize("model_type", ["gpt2", "gemma3_text"])
def test_other_families(model_type, ids):
    model = tiny_model(model_type)
    stack = Anatomy(model).stack()
    calibration = prepare(ids, model, None, DataOptions(batch_size=6))
    losses = losses_without(model, stack, calibration, [0, 2, 3], skipped=[1])
    expected = {i: slow_loss(without(model, stack, (1, i)), calibration) for i in (0, 2, 3)}
    assert losses == pytest.approx(expected, rel=1e-5)


def test_losses_of_a_model_that_writes_no_text():
    """The squared distance from the whole model's output, as a share of that output's size."""
    model = tiny_base_model("vit")
    stack = Anatomy(model).stack()
    batches = [Batch(tiny_inputs(model), None), Batch({"pixel_values": -tiny_inputs(model)["pixel_values"]}, None)]
    losses = losses_without(model, stack, batches, [0, 2])
    for index, loss in losses.items():
        smaller = without(model, stack, [index])
        with inference(model), inference(smaller):
            whole, less = (torch.stack([forward(m, b)[0] for b in batches]).double() for m in (model, smaller))
        expected = (whole - less).square().sum() / whole.square().sum()
        assert loss == pytest.approx(expected.item(), rel=1e-5)


def test_an_encoder_is_compared_on_real_tokens_alone(ids):
    model, real = tiny_base_model("bert"), torch.arange(8).expand(12, 8) < 5
    batch = Batch({"input_ids": ids}, real)
    with inference(model):
        whole = forward(model, batch)
        reference = first_tensor(whole)
        assert not speaks(model, batch)
        whole.last_hidden_state = whole.last_hidden_state.clone()
        whole.last_hidden_state[:, 5:] += 100
        assert batch_loss(model, whole, batch, reference) == (0.0, pytest.approx(reference[real].square().sum().item()))
        whole.last_hidden_state[0, 0, 0] += 2
        assert batch_loss(model, whole, batch, reference)[0] == pytest.approx(4.0)


def test_an_encoder_decoder_repeats_its_input(ids):
    model = tiny_seq2seq_model("t5")
    start = model.config.decoder_start_token_id
    real = torch.ones_like(ids, dtype=torch.bool)
    real[2, 3:] = False
    batch = Batch({"input_ids": ids}, real)
    with inference(model):
        output = forward(model, batch)
        decoder = torch.cat([torch.full((len(ids), 1), start), ids[:, :-1]], dim=1)
        logits = model(input_ids=ids, decoder_input_ids=decoder, use_cache=False).logits
    assert torch.equal(output.logits, logits)
    assert speaks(model, batch)
    loss, weight = batch_loss(model, output, batch, None)
    logs = F.log_softmax(logits.double(), dim=-1)
    expected = -sum(logs[i, j, ids[i, j]].item() for i, j in real.nonzero().tolist())
    assert (loss, weight) == (pytest.approx(expected, rel=1e-5), real.sum())


def test_the_first_token_of_a_text_has_no_loss(model, ids):
    with inference(model):
        batch = Batch({"input_ids": ids[:3]}, torch.ones(3, 8, dtype=torch.bool))
        assert batch_loss(model, forward(model, batch), batch, None)[1] == 3 * 7


@pytest.mark.parametrize(("total", "weight", "mean"), [(math.nan, 3.0, math.inf), (6.0, 3.0, 2.0), (0.0, 0.0, 0.0)])
def test_a_loss_that_is_no_number_is_never_the_best(total, weight, mean):
    assert mean_loss(total, weight) == mean
