"""Leaving blocks out: every criterion against brute force on a tiny model."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F

from hf_compress.methods.base.context import CalibrationContext
from hf_compress.methods.base.registry import plan_for
from hf_compress.methods.drop_blocks import DropBlocksConfig
from hf_compress.plan.edits import RemoveBlocks
from hf_compress.plan.plan import Plan
from hf_compress.rewrite.apply import apply
from tests.helpers.models import watching

LAYERS = "model.layers"


def removed(model, config, calibration=None):
    plan = plan_for(config, CalibrationContext(model, calibration))
    (edit,) = plan.edits
    assert type(edit) is RemoveBlocks
    assert plan.tensors == {}
    assert plan.notes["criterion"] == config.criterion
    return list(edit.blocks), plan.notes


def streams(model, calibration):
    """Per real token, its stream before the first block and after every block, from unpadded samples."""
    tokens = []
    for batch in calibration:
        for row, mask, real in zip(batch.inputs["input_ids"], batch.inputs["attention_mask"], batch.real, strict=True):
            with torch.no_grad(), watching(dict(enumerate(model.model.layers))) as seen:
                model(row[mask.bool()].long()[None])
            depths = [seen[0][0], *(wrote for _, wrote in seen.values())]
            tokens += [[stream[0, position].double() for stream in depths] for position in real.nonzero().flatten()]
    return tokens


def loss_without(model, blocks, calibration):
    smaller = copy.deepcopy(model)
    if blocks:
        apply(Plan((RemoveBlocks(LAYERS, tuple(blocks)),)), smaller)
    loss = count = 0.0
    for batch in calibration:
        inputs = {name: value.long() for name, value in batch.inputs.items()}
        with torch.no_grad():
            logits = smaller(**inputs).logits
        each = F.cross_entropy(logits[:, :-1].transpose(1, 2), inputs["input_ids"][:, 1:], reduction="none")
        loss += each[batch.real[:, 1:]].sum().item()
        count += batch.real[:, 1:].sum().item()
    return loss / count


@pytest.mark.parametrize("count", [1, 3])
def test_last(model, count):
    assert removed(model, DropBlocksConfig(num_blocks=count, criterion="last"))[0] == list(range(5 - count, 5))


@pytest.mark.parametrize("count", [1, 2, 3])
def test_block_influence(model, calibration, count):
    tokens = streams(model, calibration)
    influence = [
        sum(1 - F.cosine_similarity(token[i], token[i + 1], dim=0).item() for token in tokens) / len(tokens)
        for i in range(5)
    ]
    blocks, notes = removed(model, DropBlocksConfig(num_blocks=count), calibration)
    assert notes["block_influence"] == pytest.approx(influence, abs=1e-6)
    assert blocks == sorted(sorted(range(5), key=lambda i: influence[i])[:count])


@pytest.mark.parametrize("count", [1, 2, 4])
def test_angular(model, calibration, count):
    tokens = streams(model, calibration)
    angles = [
        sum(math.acos(F.cosine_similarity(token[i], token[i + count], dim=0).item()) / math.pi for token in tokens)
        / len(tokens)
        for i in range(5 - count + 1)
    ]
    blocks, notes = removed(model, DropBlocksConfig(num_blocks=count, criterion="angular"), calibration)
    assert notes["angular_distance"] == pytest.approx(angles, abs=1e-5)
    start = angles.index(min(angles))
    assert blocks == list(range(start, start + count))


@pytest.mark.parametrize("count", [1, 2, 3])
def test_perplexity_is_greedy(model, calibration, count):
    blocks: list[int] = []
    history = []
    for _ in range(count):
        losses = {i: loss_without(model, [*blocks, i], calibration) for i in range(5) if i not in blocks}
        best = min(losses, key=lambda i: losses[i])
        blocks.append(best)
        history.append((best, losses[best]))
    found, notes = removed(model, DropBlocksConfig(num_blocks=count, criterion="perplexity"), calibration)
    assert found == sorted(blocks)
    assert [step["removed"] for step in notes["greedy"]] == [step for step, _ in history]
    assert [step["loss"] for step in notes["greedy"]] == pytest.approx([loss for _, loss in history], rel=1e-5)


def test_random_is_by_seed(model):
    found = {
        seed: tuple(removed(model, DropBlocksConfig(num_blocks=2, criterion="random", seed=seed))[0])
        for seed in range(30)
    }
    assert all(len(set(blocks)) == 2 and set(blocks) <= set(range(5)) for blocks in found.values())
    assert {block for blocks in found.values() for block in blocks} == set(range(5))
    torch.manual_seed(123)
    assert tuple(removed(model, DropBlocksConfig(num_blocks=2, criterion="random", seed=4))[0]) == found[4]


def test_the_ratio_is_of_the_blocks(model):
    assert removed(model, DropBlocksConfig(ratio=0.5, criterion="last"))[0] == [2, 3, 4]
    assert removed(model, DropBlocksConfig(ratio=0.1, criterion="last"))[0] == [4]


def test_the_time_of_choosing_is_kept(model, calibration):
    context = CalibrationContext(model, calibration)
    plan_for(DropBlocksConfig(num_blocks=1), context)
    assert list(context.seconds) == ["choose by block_influence"]
