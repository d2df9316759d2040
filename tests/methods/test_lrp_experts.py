"""LRP on mixtures of experts taken apart: rows, energies and relevances against experts that run token by token."""

import copy
from collections import defaultdict
from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.integrations import use_experts_implementation

from hf_compress.anatomy.anatomy import Anatomy
from hf_compress.attribution.composites import COMPOSITES
from hf_compress.attribution.passes import check_conserved, explain, explaining
from hf_compress.attribution.scores import relevance_sums
from hf_compress.calibration.capture import forward as run_batch
from hf_compress.calibration.capture import inference
from hf_compress.calibration.objective import draws
from hf_compress.calibration.sweep import Streams, advance, start_pairs
from hf_compress.errors import UnsupportedModelError
from hf_compress.methods.base.context import CalibrationContext
from hf_compress.methods.lrp.fisher import energies
from hf_compress.methods.lrp.grams import grams_of
from hf_compress.methods.lrp.linears import linears_of
from hf_compress.methods.lrp.scores import input_norms, watch_rows
from tests.helpers.linears import IDS
from tests.helpers.mixtures import (
    BLOCKS,
    HIDDEN,
    LENGTHS,
    SPECIAL,
    WIDTH,
    alone,
    apart,
    batches_of,
    by_token,
    explained_by_token,
    is_unread,
    lopsided,
    maps_of,
    mixtral,
    padded,
    path_of,
    relevances_by_token,
    seen_by,
)
from tests.helpers.models import leftovers
from tests.helpers.tiny import randomise, tiny_model


def near(found, expected, tolerance=1e-4):
    torch.testing.assert_close(found, expected.to(found), rtol=tolerance, atol=tolerance * float(expected.abs().max()))


def test_the_oracle_is_a_mixtral():
    """It gives what Transformers gives, and its rules conserve relevance."""
    model = mixtral(dtype=torch.float64)
    for ruled in (False, True):
        slow = by_token(model, ruled)
        for inputs in alone():
            with torch.no_grad():
                torch.testing.assert_close(slow(**inputs).logits, model(**inputs).logits, rtol=1e-5, atol=1e-6)
    check_conserved(slow, next(iter(batches_of(slow, padded()))))


# --- rows -------------------------------------------------------------------------------------------------------------


def rows_by_token(model):
    """What each map of each expert reads at real tokens, text by text, (rows, inputs)."""
    slow, rows = by_token(model), defaultdict(list)
    for inputs in alone():
        with torch.no_grad():
            slow(**inputs)
        for layer, expert, token, x, _, hidden, _ in seen_by(slow):
            if int(inputs["input_ids"][0, token]) != SPECIAL:
                rows[path_of(layer, expert, "up")].append(x)
                rows[path_of(layer, expert, "down")].append(hidden)
    return {path: torch.stack(found) for path, found in rows.items()}


@pytest.mark.parametrize("side", ["right", "left"])
def test_rows_are_those_of_real_tokens(side):
    """Neither padding nor special tokens, though all are routed; each row at the expert that it was given to."""
    model = mixtral(dtype=torch.float64)
    expected = rows_by_token(model)
    assert len(expected) == 2 * 4 * BLOCKS, "every expert reads something"
    split, found, everything = apart(copy.deepcopy(model)), defaultdict(list), []
    stack, maps = Anatomy(split).stack(), maps_of(split)
    split.model.layers[0].mlp.experts.register_forward_pre_hook(lambda module, args: everything.append(len(args[0])))
    with inference(split):
        for batch in batches_of(split, padded(side)):
            with watch_rows(stack, batch, maps, lambda path, rows: found[path].append(rows)):
                run_batch(split, batch)
    assert sum(everything) == len(LENGTHS) * max(LENGTHS)
    assert found.keys() == expected.keys()
    for path, rows in expected.items():
        near(torch.cat(found[path]), rows)
    for layer in range(BLOCKS):
        count = sum(len(expected[path_of(layer, expert, "up")]) for expert in range(4))
        assert count == 2 * (sum(LENGTHS) - 2), "two choices a token; two texts begin with a special one, one is single"
    assert leftovers(split)[1:] == []


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("size", [1, 4])
def test_norms_and_gram_matrices_are_those_of_real_tokens(side, size):
    model = mixtral(dtype=torch.float64)
    expected = rows_by_token(model)
    split = apart(copy.deepcopy(model))
    data, stack, maps = batches_of(split, padded(side), size), Anatomy(split).stack(), maps_of(split)
    norms = input_norms(CalibrationContext(split, data), list(data), maps, stack)
    assert norms.keys() == maps.keys()
    with inference(split):
        pairs = start_pairs(split, stack, data, data.tokens)
        assert len(pairs) == len(data)
        for layer in range(BLOCKS):
            grams = grams_of(stack, layer, linears_of(stack, layer, maps), pairs)
            assert grams.keys() == {path for path in expected if path.startswith(f"model.layers.{layer}.")}
            for path, gram in grams.items():
                total = sum(row[:, None] * row[None, :] for row in expected[path])
                near(gram, total)
                near(norms[path], (total.diagonal() / len(expected[path])).sqrt())
            advance(pairs, layer)


def test_maps_that_read_nothing_have_norms_of_0():
    split = apart(lopsided())
    data = batches_of(split, padded())
    norms = input_norms(CalibrationContext(split, data), list(data), maps_of(split), Anatomy(split).stack())
    for path, norm in norms.items():
        assert bool(norm.any()) != is_unread(path)
        assert len(norm) == (HIDDEN if path.endswith("up") else WIDTH)


# --- energies ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("seed", [0, 5])
def test_energies_are_those_of_single_texts_with_the_same_draws(side, seed):
    """Each text alone, token by token; the words are drawn from the batch's logits, in their order."""
    model = mixtral(dtype=torch.float64)
    split, slow = apart(copy.deepcopy(model)), by_token(model)
    data = batches_of(split, padded(side))
    found = energies(Streams(split, Anatomy(split).stack(), data), maps_of(split), seed)
    read, gradients, rows = defaultdict(float), defaultdict(float), defaultdict(int)
    texts = iter(alone())
    for number, batch in enumerate(data):
        with torch.no_grad():
            logits = model(input_ids=batch.inputs["input_ids"], attention_mask=batch.inputs["attention_mask"]).logits
        sums = logits.float().flatten(0, 1).softmax(-1).cumsum(-1)
        drawn = (sums > torch.rand(len(sums), 1, generator=draws(seed, number)) * sums[:, -1:]).int().argmax(-1)
        drawn = drawn.view(logits.shape[:2])
        for sample in range(batch.samples):
            inputs, there = next(texts), batch.inputs["attention_mask"][sample].bool()
            words, real = drawn[sample][there], batch.real[sample][there]
            logs = slow(**inputs).logits[0].log_softmax(dim=-1)
            sum(logs[t, words[t]] for t in range(len(words)) if real[t]).backward()
            for layer, expert, token, x, up, hidden, down in seen_by(slow):
                for name, given, wrote in (("up", x, up), ("down", hidden, down)):
                    path = path_of(layer, expert, name)
                    gradients[path] += wrote.grad.square()
                    if real[token]:
                        read[path] += given.detach().square()
                        rows[path] += 1
    assert found.read.keys() == found.gradients.keys() == read.keys() == maps_of(split).keys()
    assert found.rows == rows
    for path, total in gradients.items():
        assert float(total.max()) > 0
        near(found.read[path], read[path])
        near(found.gradients[path], total, 1e-3)
        near(found.of_outputs(path), total / rows[path], 1e-3)


def test_experts_that_read_nothing_have_no_energies():
    split = apart(lopsided())
    found = energies(Streams(split, Anatomy(split).stack(), batches_of(split, padded())), maps_of(split), 0)
    read = {path for path in maps_of(split) if not is_unread(path)}
    assert found.read.keys() == found.gradients.keys() == found.rows.keys() == read


# --- relevances -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "side", "size"),
    [
        (torch.float32, "right", 3),
        (torch.float64, "right", 3),
        (torch.float64, "left", 3),
        (torch.float64, "right", 6),
        (torch.float64, "right", 1),
        (torch.float64, "ragged", 4),  # and then two
    ],
    ids=str,
)
def test_relevances_of_weights_are_those_of_single_texts(dtype, side, size):
    """|R| is taken of a text, after its tokens are summed."""
    model = mixtral(dtype=dtype)
    signed, absolute, by_tokens = relevances_by_token(model, alone())
    split = apart(copy.deepcopy(model))
    data = [inputs["input_ids"][0].tolist() for inputs in alone()] if side == "ragged" else padded(side)
    found = relevance_sums(split, batches_of(split, data, size), maps_of(split))
    assert found.samples == len(LENGTHS)
    assert found.signed.keys() == found.absolute.keys() == signed.keys() == maps_of(split).keys()
    for path, total in signed.items():
        assert found.signed[path].dtype == found.absolute[path].dtype == torch.float32
        near(found.signed[path], total, 1e-3)
        near(found.absolute[path], absolute[path], 1e-3)
        gap = float((by_tokens[path] - absolute[path]).max())
        assert gap > 0.01 * float(absolute[path].max()), "tokens make a difference"
        assert bool((absolute[path] >= total.abs() - 1e-12).all())


def test_relevances_of_experts_that_read_nothing_are_0():
    split = apart(lopsided())
    found = relevance_sums(split, batches_of(split, padded()), maps_of(split))
    for path, module in maps_of(split).items():
        for sums in (found.signed, found.absolute):
            assert sums[path].shape == module.weight.shape
            assert bool(sums[path].any()) != is_unread(path)


def test_a_later_batch_does_not_see_the_routes_of_an_earlier_one():
    """An expert that reads tokens in one batch alone; batches add up all the same, in either order."""
    split = apart(mixtral(dtype=torch.float64))
    whole = relevance_sums(split, batches_of(split, padded(), 6), maps_of(split))
    for order in (slice(None), torch.arange(5, -1, -1)):
        data = {name: values[order] for name, values in padded().items()}
        found = relevance_sums(split, batches_of(split, data, 1), maps_of(split))
        for path, total in whole.absolute.items():
            near(found.absolute[path], total, 1e-3)
            near(found.signed[path], whole.signed[path], 1e-3)


def test_relevances_of_hidden_units():
    """What an expert's last map reads, times the gradient there; sizes are those of single tokens."""
    model = mixtral(dtype=torch.float64)
    slow, signed, absolute = by_token(model, rules=True), defaultdict(float), defaultdict(float)
    for kept in explained_by_token(slow, alone()):
        for layer, expert, _, _, _, hidden, down in kept:
            table = slow.model.layers[layer].mlp.experts.second[expert].detach()
            units = hidden.detach() * (table.T @ down.grad)
            signed[path_of(layer, expert, "down")] += units
            absolute[path_of(layer, expert, "down")] += units.abs()
    split = apart(copy.deepcopy(model))
    writers = {path: module for path, module in maps_of(split).items() if path.endswith("down")}
    found = relevance_sums(split, batches_of(split, padded()), {}, writers)
    assert found.signed_units.keys() == signed.keys()
    for path, total in signed.items():
        near(found.signed_units[path], total, 1e-3)
        near(found.absolute_units[path], absolute[path], 1e-3)


# --- conservation -----------------------------------------------------------------------------------------------------


@use_experts_implementation(has_gate=False)
class Ungated(nn.Module):
    """Experts without a gate, as Nemotron's."""

    def __init__(self, config):
        super().__init__()
        self.up_proj = nn.Parameter(torch.empty(4, WIDTH, HIDDEN))
        self.down_proj = nn.Parameter(torch.empty(4, HIDDEN, WIDTH))
        self.num_experts, self.act_fn = 4, ACT2FN["gelu"]


@use_experts_implementation(is_transposed=True, has_bias=True)
class Biased(nn.Module):
    """Gated experts with biases, transposed."""

    def __init__(self, config):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(4, HIDDEN, 2 * WIDTH))
        self.gate_up_proj_bias = nn.Parameter(torch.empty(4, 2 * WIDTH))
        self.down_proj = nn.Parameter(torch.empty(4, WIDTH, HIDDEN))
        self.down_proj_bias = nn.Parameter(torch.empty(4, HIDDEN))
        self.num_experts, self.act_fn = 4, ACT2FN["silu"]


def with_experts(kind):
    """A Mixtral in whose mixtures other experts stand."""
    model = mixtral()
    for layer in model.model.layers:
        layer.mlp.experts = kind(model.config)
    randomise(model, 3)
    return model.eval()


CONSERVED = {
    "mixtral": mixtral,
    "no gate": lambda: with_experts(Ungated),
    "biases": lambda: with_experts(Biased),
    **{name: (lambda name=name: tiny_model(name)) for name in ("qwen3_moe", "olmoe", "aria_text", "ernie4_5_moe")},
}


@pytest.mark.parametrize("attention", ["attnlrp", "cp"])
@pytest.mark.parametrize("name", CONSERVED)
def test_relevance_is_what_it_was_before_the_split(name, attention):
    model = CONSERVED[name]()
    split = apart(copy.deepcopy(model))
    (batch,) = batches_of(split, IDS[:4], 4)
    check_conserved(split, batch)
    if name != "biases":  # those of all experts in one tensor are not counted
        check_conserved(model, batch)
    found = []
    for one in (model, split):
        with explaining(one, attention) as sources:
            found.append(explain(one, batch, sources, "predicted"))
    (explained, before, _), (again, after, _) = found
    torch.testing.assert_close(again, explained, rtol=1e-4, atol=1e-4)
    assert after.keys() == before.keys()
    for source, values in before.items():
        assert float(values.abs().max()) > 0
        near(after[source], values, 1e-3)


@pytest.mark.parametrize("part", ["factor", "routing"])
def test_conservation_is_lost_without_the_rules_of_experts(part):
    """Or the test above could not tell."""
    split = apart(mixtral())
    (batch,) = batches_of(split, IDS[:4], 4)
    with pytest.raises(UnsupportedModelError, match="relevance is lost or made up"):
        check_conserved(split, batch, replace(COMPOSITES["attnlrp"], **{part: None}))


def test_relevance_conserves_every_layer_of_weights():
    """What an expert's down weights carry is what comes to its hidden units; up and gate share it half and half."""
    model = mixtral(dtype=torch.float64)
    split = apart(copy.deepcopy(model))
    found = relevance_sums(split, batches_of(split, padded()), maps_of(split))
    for layer in range(BLOCKS):
        for expert in range(4):
            up, down = (found.signed[path_of(layer, expert, name)].double() for name in ("up", "down"))
            gates, ups = up[:WIDTH].sum(), up[WIDTH:].sum()
            near(gates, ups, 1e-4)
            near(gates + ups, down.sum(), 1e-4)
