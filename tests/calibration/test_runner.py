"""Blocks run one at a time inside the model's own forward: the model itself, step by step, and no trace of it after."""

from collections import namedtuple

import pytest
import torch

from hf_compress.anatomy.anatomy import Anatomy, Block
from hf_compress.anatomy.undo import Undo
from hf_compress.calibration.capture import (
    StopForward,
    forward,
    hooked,
    inference,
    stream_of,
    stream_of_output,
    stream_tokens,
    watch_blocks,
    with_stream,
)
from hf_compress.calibration.data import Batch
from hf_compress.calibration.runner import BlockRunner, replaced_forwards
from hf_compress.errors import CalibrationError, UnsupportedModelError
from hf_compress.rewrite.apply import carry_out
from hf_compress.rewrite.builders import insert_bottleneck
from tests.helpers.models import leftovers
from tests.helpers.plans import linear_bottleneck
from tests.helpers.runs import same
from tests.helpers.streams import finished, recorded
from tests.helpers.tiny import tiny_base_model, tiny_inputs, tiny_model, tiny_seq2seq_model

BUILDERS = {
    **dict.fromkeys(("llama", "gpt2", "gemma3_text", "openai-gpt", "falcon"), tiny_model),
    **dict.fromkeys(("bert", "vit"), tiny_base_model),
    **dict.fromkeys(("t5", "bart"), tiny_seq2seq_model),
}
CASES = [*((name, None) for name in BUILDERS), ("t5", "encoder"), ("bart", "encoder")]
Named = namedtuple("Named", ["states", "other"])


def built(name, side=None):
    model = BUILDERS[name](name)
    inputs = tiny_inputs(model)
    inputs.pop("decoder_input_ids", None)
    if "attention_mask" in inputs:
        inputs["attention_mask"][1, 6:] = 0
    return model, Anatomy(model).stack(side), Batch(inputs, None)


def same_output(first, second):
    first, second = ({n: t for n, t in out.items() if isinstance(t, torch.Tensor)} for out in (first, second))
    return bool(first) and same(first, second)


@pytest.mark.parametrize(("name", "side"), CASES)
def test_blocks_run_one_by_one_and_recorded_are_the_model(name, side):
    model, stack, batch = built(name, side)
    before, after = {}, {}

    def watch(index, first, second):
        before[index], after[index] = first.clone(), second.clone()

    with inference(model):
        with watch_blocks(stack, watch):
            whole = forward(model, batch)
        runner = BlockRunner(model, stack, batch)
        stream = runner.start()
        for index in range(len(stack)):
            assert torch.equal(stream, before[index])
            stream = runner.run(index, stream)
            assert torch.equal(stream, after[index])
        for index, start in ((len(stack), stream), (0, before[0]), (2, before[2])):
            assert same_output(finished(runner, index, start, ()), whole)
        output, streams = recorded(BlockRunner(model, stack, batch))
    assert same_output(output, whole)
    assert list(streams) == list(range(len(stack) + 1))
    assert same(streams, {**before, len(stack): stream})
    assert leftovers(model) == []


@pytest.mark.parametrize(("name", "side"), CASES)
def test_the_forward_is_entered_once_for_all_blocks(name, side):
    model, stack, batch = built(name, side)
    entered = []
    model.register_forward_pre_hook(lambda *_: entered.append(1))
    with inference(model):
        runner = BlockRunner(model, stack, batch)
        stream = runner.start()
        for index in range(len(stack)):
            runner.run(index, stream * 1.5)
            stream = runner.run(index, stream)
        runner.run(0, stream)
    assert len(entered) == 1


def test_a_runner_that_is_given_up_leaves_its_forward():
    model, stack, batch = built("llama")
    closed, own = [], model.model.forward

    def opened(*args, **kwargs):
        try:
            return own(*args, **kwargs)
        finally:
            closed.append(1)

    model.model.forward = opened
    with inference(model):
        runner = BlockRunner(model, stack, batch)
        runner.run(0, runner.start())
        assert not closed
        del runner
        assert closed


def test_another_stream_gives_another_output():
    model, stack, batch = built("llama")
    with inference(model):
        runner = BlockRunner(model, stack, batch)
        whole, streams = recorded(runner)
        moved = runner.run(1, streams[1] * 1.5)
        assert not torch.allclose(moved, runner.run(1, streams[1]))
        assert not same_output(finished(runner, 2, moved, ()), whole)
        assert torch.equal(recorded(runner)[0].logits, whole.logits)


def test_a_block_that_adds_to_its_stream_in_place_leaves_the_one_it_was_given():
    model, stack, batch = built("llama")
    block = stack.blocks[0]
    own = block.forward
    block.forward = lambda hidden, *args, **kwargs: own(hidden.add_(1.0), *args, **kwargs)
    with inference(model):
        runner = BlockRunner(model, stack, batch)
        stream = runner.start()
        before = stream.clone()
        first, second = runner.run(0, stream), runner.run(0, stream)
    assert torch.equal(stream, before)
    assert torch.equal(first, second)


HOOKS = {
    "before": lambda block: block.register_forward_pre_hook(lambda _, args: (args[0] * 1.5, *args[1:])),
    "before, in place": lambda block: block.register_forward_pre_hook(lambda _, args: (args[0].add_(0.5), None)[1]),
    "behind": lambda block: block.register_forward_hook(lambda _, args, output: output * 1.5),
    "behind, in place": lambda block: block.register_forward_hook(lambda _, args, output: (output.mul_(1.5), None)[1]),
}


@pytest.mark.parametrize("kind", HOOKS)
def test_hooks_that_change_the_stream_act_once(kind):
    """As those that steer a model do."""
    model, stack, batch = built("llama")
    with inference(model):
        without = forward(model, batch)
        with hooked(HOOKS[kind](block) for block in stack.blocks):
            whole = forward(model, batch)
            output, streams = recorded(BlockRunner(model, stack, batch))
            assert same_output(output, whole)
            runner, last = BlockRunner(model, stack, batch), streams[len(stack)].clone()
            assert same_output(finished(runner, 0, streams[0], ()), whole)
            assert same_output(runner.finish(streams[len(stack)]), whole)
            assert torch.equal(streams[len(stack)], last)
        assert same_output(forward(model, batch), without)
    assert not same_output(whole, without)


def test_one_block_may_be_there_twice():
    model, _, batch = built("llama")
    model.model.layers[2] = model.model.layers[1]
    stack = Anatomy(model).stack()
    with inference(model):
        output, _ = recorded(BlockRunner(model, stack, batch))
        assert same_output(output, forward(model, batch))


def test_only_the_wanted_block_runs():
    model, stack, batch = built("llama")
    ran = []
    for index, block in enumerate(stack.blocks):
        block.mlp.register_forward_hook(lambda *_, index=index: ran.append(index))
    with inference(model):
        runner = BlockRunner(model, stack, batch)
        _, streams = recorded(runner)
        ran.clear()
        runner.run(2, streams[2])
        assert ran == [2]
        ran.clear()
        runner.start()
        assert ran == []
        finished(runner, 1, streams[1], (2,))
        assert ran == [1, 3]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_hooks_and_forwards_come_off_on_every_way_out(error):
    model, stack, batch = built("llama")
    training = model.train().training

    def fail(*_, **__):
        raise error("in a block")

    handle = stack.blocks[2].mlp.act_fn.register_forward_hook(fail)
    runner = BlockRunner(model, stack, batch)
    streams = dict.fromkeys(range(4), torch.zeros(2, 8, model.config.hidden_size))

    def watched():
        with watch_blocks(stack, lambda *_: None):
            forward(model, batch)

    for attempt in (
        lambda: recorded(runner),
        lambda: [runner.run(index, streams[index]) for index in range(3)],
        lambda: finished(runner, 2, streams[2], ()),
        watched,
    ):
        with pytest.raises(error, match="in a block"), inference(model):
            attempt()
        assert model.training == training
    handle.remove()
    assert leftovers(model) == []


def test_a_watcher_may_end_the_pass():
    model, stack, batch = built("llama")
    seen = []

    def stop(index, *_):
        seen.append(index)
        if index == 1:
            raise StopForward

    with inference(model), watch_blocks(stack, stop):
        assert forward(model, batch) is None
    assert seen == [0, 1]
    assert leftovers(model) == []


def test_a_forward_that_somebody_else_set_comes_back():
    _, stack, _ = built("llama")
    own = stack.blocks[1].forward
    other = lambda *args, **kwargs: own(*args, **kwargs)  # noqa: E731 (as Accelerate does)
    stack.blocks[1].forward = other
    with replaced_forwards(stack, {1: lambda own, args, kwargs: own(*args, **kwargs)}):
        assert stack.blocks[1].forward is not other
    assert stack.blocks[1].forward is other


def test_every_module_gets_its_own_mode_back():
    model, stack, _ = built("llama")
    model.train()
    stack.blocks[1].eval()
    modes = [module.training for module in model.modules()]
    with inference(model):
        assert not any(module.training for module in model.modules())
        assert not torch.is_grad_enabled()
    assert [module.training for module in model.modules()] == modes
    with pytest.raises(KeyboardInterrupt), inference(model):
        raise KeyboardInterrupt
    assert [module.training for module in model.modules()] == modes
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_activations_that_are_not_finite_name_their_block(value):
    model, stack, batch = built("llama")
    with torch.no_grad():
        stack.blocks[2].mlp.down_proj.weight[0, 0] = value
    runner = BlockRunner(model, stack, batch)
    with inference(model):
        stream = runner.run(1, runner.run(0, runner.start()))
        for attempt in (lambda: recorded(runner), lambda: runner.run(2, stream)):
            with pytest.raises(CalibrationError, match=r"block model\.layers\.2 gives NaN or infinite"):
                attempt()
    assert leftovers(model) == []


def test_a_stream_that_changes_its_shape_names_its_block():
    model = tiny_base_model("swin")
    stack = Anatomy(model).stack()
    with inference(model), pytest.raises(UnsupportedModelError, match=r"block encoder\.layers\.0 turns a stream of"):
        recorded(BlockRunner(model, stack, Batch(tiny_inputs(model), None)))


def test_the_stream_in_what_a_block_takes_and_returns():
    stream, other = torch.ones(1, 2, 3), torch.zeros(1, 2, 3)
    assert stream_of((stream, other), {}) is stream
    assert stream_of((), {"attention_mask": other, "hidden_states": stream}) is stream
    assert stream_of((), {"position": torch.zeros(1, dtype=torch.long), "x": stream}) is stream
    for output in (stream, (stream, other), [stream], Named(stream, other)):
        assert stream_of_output(output) is stream
        replaced = with_stream(output, other)
        assert type(replaced) is type(output)
        assert stream_of_output(replaced) is other
    for wrong in ((3,), ("x", stream)):
        for find in (stream_of_output, lambda output: stream_of(output, {})):
            with pytest.raises(TypeError, match="a block"):
                find(wrong)


def test_a_decoder_s_start_token_does_not_count():
    """forward() gives a decoder [start, first, ..., last but one]."""
    model = tiny_seq2seq_model("t5")
    real = torch.tensor([[True, True, False, True]])
    batch = Batch({"input_ids": torch.tensor([[9, 10, 11, 12]])}, real)
    stream = torch.zeros(1, 4, 8)
    anatomy = Anatomy(model)
    assert stream_tokens(anatomy.stack("encoder"), batch, stream).tolist() == [[True, True, False, True]]
    assert stream_tokens(anatomy.stack("decoder"), batch, stream).tolist() == [[False, True, True, False]]
    opt = tiny_model("opt")  # whose only stack lies under a module called decoder
    assert stream_tokens(Anatomy(opt).stack(), batch, stream).tolist() == real.tolist()


@pytest.mark.parametrize("build", [lambda: tiny_model("granitemoe"), lambda: tiny_seq2seq_model("switch_transformers")])
def test_a_forward_that_names_no_cache_has_none(build):
    """A block that ran again would else read the tokens of its first time, too."""
    model = build()
    stack = Anatomy(model).stacks[-1]
    with inference(model):
        runner = BlockRunner(model, stack, Batch(tiny_inputs(model), None))
        stream = runner.start()
        assert torch.equal(runner.run(0, stream), runner.run(0, stream))


def test_a_bottleneck_is_part_of_its_block():
    model = tiny_model("llama")
    stack, inputs = Anatomy(model).stack(), tiny_inputs(model)
    directions = torch.linalg.qr(torch.randn(64, 16)).Q
    for index in (1, 3):
        bottleneck = linear_bottleneck(directions, directions.T)
        carry_out(insert_bottleneck(Block(model, stack, index), bottleneck), model, Undo())
    runner = BlockRunner(model, stack, Batch(inputs, None))
    with inference(model):
        whole, streams = recorded(runner)
        assert torch.equal(runner.run(1, streams[1]), streams[2])
        assert torch.equal(finished(runner, 4, runner.run(3, streams[3]), ()).logits, whole.logits)
        without = finished(runner, 0, streams[0], skipped=(1,)).logits
    own = list(model.model.layers)
    model.model.layers = torch.nn.ModuleList(own[:1] + own[2:])
    with torch.no_grad():
        assert torch.equal(model(**inputs, use_cache=False).logits, without)
