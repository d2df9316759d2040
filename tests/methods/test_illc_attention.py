"""ILLC on attention: whole heads left out, the output projection solved for what attention wrote, bad input."""

import pytest
import torch

from hf_compress.anatomy.anatomy import Anatomy, Block
from hf_compress.errors import UnsupportedModelError
from hf_compress.numerics.elimination import eliminate
from hf_compress.numerics.ridge import LeastSquares
from hf_compress.rewrite.builders import heads_of
from hf_compress.rewrite.record import recorded
from tests.helpers.ffns import matrix_of, noise
from tests.helpers.linears import IDS, illc
from tests.helpers.models import assert_reloads, refusing, watching
from tests.helpers.round_trip import build, logits
from tests.helpers.tiny import tiny_model


def heads(model):
    stack = Anatomy(model).stack()
    return [heads_of(Block(model, stack, index)) for index in range(len(stack))]


@pytest.mark.parametrize("settings", [{}, {"gamma": 0.5}], ids=["attention alone", "with FFNs"])
@pytest.mark.parametrize("name", ["Llama", "BERT", "ViT"])
def test_half_of_the_heads_stay(name, settings, tmp_path):
    model = build(name)
    groups, per_group = heads(model)[0].groups, heads(model)[0].per_group
    width = Anatomy(model).parts(Anatomy(model).stack(), 0).ffn.width
    illc(model, head_gamma=0.5, **settings)
    assert {(one.groups, one.per_group) for one in heads(model)} == {(groups // 2, per_group)}
    assert Anatomy(model).parts(Anatomy(model).stack(), 0).ffn.width == (width // 2 if settings else width)
    assert bool(recorded(model.config)) == (name == "BERT")  # whose heads are always as wide as fits
    assert_reloads(model, tmp_path / "out", logits)
    parts = [note.get("part") for note in model.compression_report.notes["blocks"]]
    assert parts == (["attention", None] if settings else ["attention"]) * 4


def attended(model, index):
    """What a block's output projection of attention reads and writes on the calibration data, batch by batch."""
    seen, stack = [], Anatomy(model).stack()
    output = stack.blocks[index].get_submodule(heads(model)[index].output)
    for ids in IDS.split(8):
        with torch.no_grad(), watching({"output": output}) as found:
            model(ids)
        seen.append([part.flatten(0, 1) for part in found["output"]])
    return seen


def test_heads_that_go_and_the_projection_are_those_of_the_regression_by_hand():
    original, model = build("Llama"), build("Llama")
    shape = heads(original)[0]
    size = shape.per_group * shape.width
    batches = attended(original, 0)
    x, y = (torch.cat(part).double() for part in zip(*batches, strict=True))
    inverse = torch.linalg.inv(x.T @ x + 1e-3 * (x.T @ x).diagonal().mean() * torch.eye(x.shape[1]))
    full = inverse @ x.T @ y
    costs = []
    for group in range(shape.groups):  # two heads of keys: one goes, the other stays
        rows = slice(group * size, group * size + size)
        costs.append(float((full[rows] * torch.linalg.solve(inverse[rows, rows], full[rows])).sum()))
    stays = 1 - costs.index(min(costs))
    illc(model, head_gamma=0.5)
    kept = slice(stays * shape.width, stays * shape.width + shape.width)
    old, new = (one.model.layers[0].self_attn for one in (original, model))
    assert torch.equal(new.k_proj.weight, old.k_proj.weight[kept])
    assert torch.equal(new.v_proj.weight, old.v_proj.weight[kept])
    queries = slice(stays * size, stays * size + size)
    assert torch.equal(new.q_proj.weight, old.q_proj.weight[queries])
    penalty = model.compression_report.notes["blocks"][0]["penalty"]
    h, prior = x[:, queries], matrix_of(old.o_proj).double()[queries]
    gram = h.T @ h
    change = torch.linalg.solve(gram + penalty * gram.diagonal().mean() * torch.eye(size), h.T @ y - gram @ prior)
    found, expected = matrix_of(new.o_proj).double(), prior + change
    torch.testing.assert_close(h @ found, h @ expected, rtol=1e-4, atol=1e-5)
    # Half of the directions have next to no variance: there weights are as exact as sums of float32 over the penalty.
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_blocks_of_features_are_left_out_as_by_trying_each():
    x, y = noise(200, 12).double(), noise(200, 3, seed=1).double()
    y += x @ noise(12, 3, seed=2).double()
    sums = LeastSquares(12, 3)
    sums.update(x, y)
    left = [0, 1, 2, 3]
    while len(left) > 2:
        errors = {}
        for block in left:
            rest = [3 * b + i for b in left if b != block for i in range(3)]
            weight = torch.linalg.lstsq(x[:, rest] - x[:, rest].mean(0), y - y.mean(0)).solution
            errors[block] = float(((x[:, rest] - x[:, rest].mean(0)) @ weight - (y - y.mean(0))).square().sum())
        left.remove(min(errors, key=errors.__getitem__))
    assert eliminate(sums, 2, size=3).tolist() == left
    with pytest.raises(ValueError, match="size is 5; expected a divisor"):
        eliminate(sums, 2, size=5)
    with pytest.raises(ValueError, match="expected 1 to the number of blocks, 4"):
        eliminate(sums, 5, size=3)


@pytest.mark.parametrize("compensation", ["none", "bias", "ridge"])
@pytest.mark.parametrize("reduction", ["magnitude", "variance", "random", "elimination"])
def test_every_way_to_choose_heads(reduction, compensation):
    model = illc(build("ViT"), head_gamma=0.5, reduction=reduction, compensation=compensation)
    assert {one.groups for one in heads(model)} == {heads(build("ViT"))[0].groups // 2}


def test_what_cannot_be_done_is_refused():
    model = tiny_model("gpt2")
    with refusing(model, UnsupportedModelError, r"transformer\.h\.0 cannot be told apart"):
        illc(model, head_gamma=0.5)
