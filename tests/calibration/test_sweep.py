"""Batches on their way up a stack: the model itself, block after block, in memory or in files."""

import gc
import os

import pytest
import torch

from hf_compress.anatomy.anatomy import Anatomy
from hf_compress.calibration.capture import forward, inference, watch_blocks
from hf_compress.calibration.data import DataOptions, prepare
from hf_compress.calibration.memory import WorkingMemory, working_within
from hf_compress.calibration.sweep import Sweep, start_pairs
from hf_compress.errors import WorkdirError
from tests.helpers.disk import mapped_bytes
from tests.helpers.models import leftovers
from tests.helpers.tiny import tiny_model, tiny_seq2seq_model


def data_of(model, samples=7, size=2):
    ids = torch.randint(8, 63, (samples, 6), generator=torch.Generator().manual_seed(4))
    return prepare(ids, model, None, DataOptions(batch_size=size))


def streams_of(model, stack, data):
    """(number, block) -> the stream before and after, from plain forward passes."""
    found = {}
    with inference(model):
        for number, batch in enumerate(data):

            def keep(index, before, after, number=number):
                found[number, index] = before.clone(), after.clone()

            with watch_blocks(stack, keep):
                forward(model, batch)
    return found


@pytest.mark.parametrize("build", [lambda: tiny_model("llama"), lambda: tiny_seq2seq_model("t5")])
@pytest.mark.parametrize("budget", [2**30, 1, 20_000])
def test_all_batches_go_past_a_block_and_then_past_the_next(build, budget):
    model = build()
    stack, data = Anatomy(model).stack(), data_of(model)
    expected = streams_of(model, stack, data)
    order = []
    with inference(model), working_within(WorkingMemory(budget)):
        sweep = Sweep(model, stack, data)
        for index in sweep.blocks("test"):
            for passed in sweep.past(index):
                order.append((passed.number, index))
                before, after = expected[passed.number, index]
                assert torch.equal(passed.before, before)
                assert torch.equal(passed.after, after)
    assert order == [(number, index) for index in range(len(stack)) for number in range(len(data))]
    assert leftovers(model) == []


def test_blocks_that_nobody_looks_at_are_passed_by():
    model = tiny_model("llama")
    stack, data = Anatomy(model).stack(), data_of(model)
    expected = streams_of(model, stack, data)
    ran = []
    for index, block in enumerate(stack.blocks):
        block.mlp.register_forward_hook(lambda *_, index=index: ran.append(index))
    with inference(model):
        sweep = Sweep(model, stack, data)
        for index in sweep.blocks("test", end=3):
            if index == 2:
                for passed in sweep.past(index):
                    assert torch.equal(passed.after, expected[passed.number, 2][1])
    assert ran == [index for index in range(3) for _ in data]


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="tells what is mapped on Linux alone")
def test_streams_beyond_the_budget_lie_in_files_that_go_with_them(tmp_path):
    memory, kept, before = WorkingMemory(streams=3 * 2 * 40_000, folder=tmp_path), [], mapped_bytes()
    for number in range(5):
        stream = torch.full((10, 1000), float(number))
        assert memory.keep(number, stream) is stream
        kept.append(stream)
    assert mapped_bytes() >= before + 3 * 40_000, "two of five fit"
    assert [float(stream.mean()) for stream in kept] == [0, 1, 2, 3, 4]
    assert list(tmp_path.iterdir()) == [], "the files have no names"
    del kept, stream
    gc.collect()
    assert mapped_bytes() <= before


def test_a_folder_that_cannot_be_written_to_is_told_of(tmp_path):
    with pytest.raises(WorkdirError, match="missing has no room"):
        WorkingMemory(0, folder=tmp_path / "missing").keep(0, torch.ones(3))


def test_pairs_are_one_until_a_block_changes():
    model = tiny_model("llama")
    stack, data = Anatomy(model).stack(), data_of(model)
    expected = streams_of(model, stack, data)
    with inference(model):
        pairs = start_pairs(model, stack, data, tokens=1000)
        for pair in pairs:
            pair.take_both(0)
            assert pair.compressed is pair.original
            assert torch.equal(pair.original, expected[pair.number, 0][1])
            before = pair.take_original(1)
            assert torch.equal(before, expected[pair.number, 0][1])
            stack.blocks[1].mlp.down_proj.weight.zero_()
            pair.take_compressed(1)
            assert not torch.equal(pair.compressed, pair.original)
            break
