"""What errors of the stream are estimated to cost, against gradients by hand and against real losses."""

import pytest
import torch

from hf_compress.anatomy.anatomy import Anatomy
from hf_compress.calibration.capture import forward, inference
from hf_compress.calibration.data import DataOptions, prepare
from hf_compress.calibration.losses import LossSweep
from hf_compress.calibration.objective import drawn_gradient, draws
from hf_compress.calibration.sensitivity import costs_without, estimated_costs
from tests.helpers.models import leftovers
from tests.helpers.streams import finished
from tests.helpers.tiny import tiny_base_model, tiny_model

CASES = ["llama", "gpt2", "gemma3_text", "mixtral"]


def sweep_of(model, count=2, skipped=()):
    ids = torch.randint(4, 63, (count * 3, 7), generator=torch.Generator().manual_seed(2))
    data = prepare(ids, model, None, DataOptions(batch_size=3))
    stack = Anatomy(model).stack()
    sweep = LossSweep(model, stack, data)
    sweep.keep()
    sweep.go_on(0, skipped)
    return stack, sweep, data


def errors_of(sweep):
    """Another error behind each block and for each batch."""
    generator = torch.Generator().manual_seed(5)
    blocks = range(len(sweep.stack))
    return {i: [torch.randn(stream.shape, generator=generator) for stream in sweep.at(0)] for i in blocks}


@pytest.mark.parametrize("model_type", CASES)
def test_gradients_block_by_block_are_those_of_the_whole_model(model_type):
    model = tiny_model(model_type)
    with inference(model):
        stack, sweep, data = sweep_of(model)
        errors = errors_of(sweep)
        costs = estimated_costs(sweep, [0, 2], errors.__getitem__, seed=3)
    expected = dict.fromkeys([0, 2], 0.0)
    for number, batch in enumerate(data):
        streams = {}
        handles = []
        for index in expected:

            def keep(module, args, output, index=index, streams=streams):
                streams[index] = output[0] if isinstance(output, tuple) else output
                streams[index].retain_grad()

            handles.append(stack.blocks[index].register_forward_hook(keep))
        output = forward(model, batch)
        output.logits.backward(drawn_gradient(model, output, batch, draws(3, number)))
        for handle in handles:
            handle.remove()
        for index, stream in streams.items():
            rows = (stream.grad * errors[index][number]).sum(dim=-1)[batch.real]
            expected[index] += rows.square().sum().item() / 2
    tokens = sum(int(batch.real.sum()) for batch in data)
    assert costs == pytest.approx({index: total / tokens for index, total in expected.items()}, rel=1e-4)
    assert leftovers(model) == []


def test_blocks_left_out_are_passed_by():
    model = tiny_model("llama")
    with inference(model):
        _, sweep, _ = sweep_of(model, skipped=(2,))
        errors = errors_of(sweep)
        costs = estimated_costs(sweep, [0], errors.__getitem__)
    del model.model.layers[2]
    model.config.num_hidden_layers = 3
    with inference(model):
        _, others, _ = sweep_of(model)
        assert estimated_costs(others, [0], errors.__getitem__) == pytest.approx(costs, rel=1e-5)


def test_a_model_that_no_gradient_comes_through_is_judged_by_the_error_alone():
    model = tiny_model("llama")
    block = model.model.layers[2]
    own = block.forward
    block.forward = lambda *args, **kwargs: own(*args, **kwargs).detach()
    with inference(model):
        _, sweep, _ = sweep_of(model)
        errors = errors_of(sweep)
        costs = estimated_costs(sweep, [1], errors.__getitem__)
    mean = torch.cat([error.flatten() for error in errors[1]]).square().mean().item()
    assert costs[1] == pytest.approx(mean, rel=1e-5)


@pytest.mark.parametrize("build", [lambda: tiny_model("llama"), lambda: tiny_base_model("bert")])
def test_a_block_that_does_nothing_costs_nothing(build):
    model = build()
    stack = Anatomy(model).stack()
    ids = torch.randint(8, 63, (6, 7), generator=torch.Generator().manual_seed(2))
    block = stack.blocks[1]
    block.forward = lambda hidden_states, *args, **kwargs: hidden_states
    costs = costs_without(model, stack, prepare(ids, model, None, DataOptions(batch_size=3)))
    assert costs[1] == 0
    assert all(cost > 0 for index, cost in costs.items() if index != 1)


def test_small_errors_cost_what_is_estimated():
    """In the mean over many draws, the estimate is the divergence from the model as it was."""
    model = tiny_model("llama")
    with inference(model):
        _, sweep, _ = sweep_of(model, count=1)
        (runner,), (stream,) = sweep.runners, sweep.at(2)
        error = 0.02 * torch.randn(stream.shape, generator=torch.Generator().manual_seed(1))
        error[:, :-1] = 0  # at one token of each sample, so that no two errors meet
        draws = [estimated_costs(sweep, [1], lambda index: [error], seed)[1] for seed in range(400)]
        plain = finished(runner, 2, stream).logits.log_softmax(-1)
        moved = finished(runner, 2, stream + error).logits.log_softmax(-1)
        said = (plain.exp() * (plain - moved)).sum(-1)
        counted = drawn_gradient(model, finished(runner, 2, stream), runner.batch, torch.Generator())
        said = said[counted.abs().sum(-1) > 0].sum().item() / int(runner.batch.real.sum())
    mean = sum(draws) / len(draws)
    deviation = torch.tensor(draws).std().item() / len(draws) ** 0.5
    assert mean == pytest.approx(said, abs=4 * deviation + 0.05 * said)
