"""LRP on Transformers: slow loops over what is decided, and how what is left makes up for what went."""

import pytest
import torch

from hf_compress.api.compress import compress
from hf_compress.methods.lrp import LRPConfig
from hf_compress.modules.packed import MixedPrecisionLinear
from hf_compress.modules.sparse import SparseLinear
from tests.helpers.changes import forward
from tests.helpers.linears import FLOATS, IDS, data_of, dense, linears, lrp, made, mask_of, masks, stored, weight_of
from tests.helpers.models import watching
from tests.helpers.tiny import randomise, tiny_seq2seq_model

CLASSES = torch.randint(0, 3, (40,), generator=torch.Generator().manual_seed(8))
PAPER = {"variant": "paper"}


def products(model, x, classes=None):
    """x · g of every sample and linear map by plain autograd: of a ReLU network without biases that is relevance.

    Returns what a map reads times the gradient at what it writes, (samples, outputs, inputs), by path.
    """
    with watching(linears(model)) as seen:
        found = model(input_values=x).logits
    value = found[torch.arange(len(x)), found.argmax(1) if classes is None else classes].sum()
    slopes = torch.autograd.grad(value, [wrote for _, wrote in seen.values()])
    return {
        path: torch.stack([g.T @ r for g, r in zip(slope, read, strict=True)])
        for (path, (read, _)), slope in zip(seen.items(), slopes, strict=True)
    }


def relevances(model, classes=None):
    """w · mean (x g) of every weight of a network of ReLUs without biases."""
    found = products(model, FLOATS, classes)
    return {path: each.double().mean(dim=0) * weight_of(model.get_submodule(path)) for path, each in found.items()}


# --- the paper's ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [None, CLASSES], ids=["predicted", "label"])
def test_the_paper_leaves_out_what_has_no_relevance(classes):
    """R <= 0, of the class of the label where there is one."""
    model = lrp(dense(), FLOATS if classes is None else {"input_values": FLOATS, "labels": classes}, **PAPER)
    for path, relevance in relevances(dense(), classes).items():
        sure = (relevance.abs() > 1e-7) | (relevance == 0)
        assert sure.float().mean() > 0.9
        assert torch.equal(mask_of(model.get_submodule(path))[sure], (relevance > 0)[sure])


@torch.no_grad()
def test_no_relevance_at_all_is_none():
    """Of a unit that is never active it is 0, to the last bit: it goes, alone or weight by weight."""
    weights, neurons = dense(), dense()
    for model in (weights, neurons):
        model.layers[1].mlp.up_proj.weight[3] = 0
    lrp(weights, **PAPER)
    assert not mask_of(weights.layers[1].mlp.up_proj)[3].any()
    assert not mask_of(weights.layers[1].mlp.down_proj)[:, 3].any()
    lrp(neurons, granularity="neuron", **PAPER)
    assert bool((neurons.layers[1].mlp.up_proj.weight != 0).any(dim=1).all())


@pytest.mark.parametrize("settings", [{}, {"granularity": "neuron"}, {"prune": False, "split": (8, 4)}], ids=str)
def test_the_paper_solves_for_nothing(settings):
    """What stays is what it was, but for rounding."""
    model, old = lrp(dense(intermediate_size=21), **PAPER, **settings), dense(intermediate_size=21)
    for path, module in stored(model, SparseLinear).items():
        before = weight_of(old.get_submodule(path))
        if "split" in settings:
            torch.testing.assert_close(weight_of(module), before, atol=0.15, rtol=0)
        else:
            assert torch.equal(weight_of(module), before * mask_of(module))
    if "granularity" in settings:
        for new, before in zip(model.layers, old.layers, strict=True):
            rows = before.mlp.up_proj.weight.tolist()
            kept = [rows.index(row) for row in new.mlp.up_proj.weight.tolist()]
            assert torch.equal(new.mlp.down_proj.weight, before.mlp.down_proj.weight[:, kept])


def test_the_papers_neurons_are_those_with_relevance():
    model, old = lrp(dense(), granularity="neuron", **PAPER), dense()
    found = relevances(old)
    for index in range(3):
        expected = old.layers[index].mlp.up_proj.weight[found[f"layers.{index}.mlp.down_proj"].sum(dim=0) > 1e-9]
        assert torch.equal(model.layers[index].mlp.up_proj.weight, expected)


def test_the_papers_halves_are_those_about_the_median():
    model = lrp(dense(), prune=False, split=(8, 4), **PAPER)
    for path, relevance in relevances(dense()).items():
        median = relevance.flatten().sort().values[(relevance.numel() - 1) // 2]
        sure = (relevance - median).abs() > 1e-7
        assert torch.equal(mask_of(model.get_submodule(path))[sure], (relevance > median)[sure])


# --- scores -----------------------------------------------------------------------------------------------------------


def best(scores, count):
    """A mask of the `count` largest of a flat list."""
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:count]
    return [i in set(order) for i in range(len(scores))]


def rows_of(scores, share):
    return torch.tensor([best(row, int(len(row) * share + 0.5)) for row in scores.tolist()])


@pytest.mark.parametrize("temper", [0.0, 0.25, 1.0])
def test_tempered_relevance(temper):
    """|w| · (E |x g|)^temper, the largest of each row."""
    model, old = lrp(dense(), sparsity=0.5, temper=temper, scope="row"), dense()
    for path, found in products(old, FLOATS).items():
        scores = weight_of(old.get_submodule(path)).abs() * found.abs().mean(dim=0) ** temper
        assert torch.equal(mask_of(model.get_submodule(path)), rows_of(scores, 0.5))


def norms(model, data, real):
    """Root of the mean square of what each map reads at real tokens."""
    with watching(linears(model)) as seen:
        forward(model, data)
    return {path: read[real].square().mean(dim=0).sqrt() for path, (read, _) in seen.items()}


@pytest.mark.parametrize("score", ["wanda", "magnitude"])
@pytest.mark.parametrize("name", ["Llama", "GPT-2"])
def test_wanda_and_magnitude_are_their_definitions(name, score):
    """|w| · |x| of real tokens against others of the row; and |w| alone. Padding does not count."""
    mask = (torch.arange(12) < torch.arange(32)[:, None] % 9 + 4).long()
    data = {"input_ids": IDS, "attention_mask": mask}
    model, old = lrp(made(name), data, sparsity=0.25, score=score, scope="row"), made(name)
    for path, norm in norms(old, data, mask.bool()).items():
        scores = weight_of(old.get_submodule(path)).abs() * (norm if score == "wanda" else 1)
        same = mask_of(model.get_submodule(path)) == rows_of(scores, 0.75)
        assert same.float().mean() > 0.999  # of equals, any


def test_padding_of_a_decoder_that_reads_one_place_later():
    """T5's reads a start token, then the text but for its last word: those are its real tokens."""
    real = torch.arange(12) < torch.arange(32)[:, None] % 5 + 3
    model, old, path = tiny_seq2seq_model("t5"), tiny_seq2seq_model("t5"), "decoder.block.0.layer.0.SelfAttention.q"
    data, weight = {"input_ids": IDS + 4, "attention_mask": real.long()}, old.get_submodule(path).weight.detach()
    started = torch.cat([torch.full((32, 1), old.config.decoder_start_token_id), data["input_ids"][:, :-1]], dim=1)
    with watching({path: old.get_submodule(path)}) as seen:
        forward(old, data | {"decoder_input_ids": started})
    shifted = torch.cat([torch.zeros(32, 1, dtype=torch.bool), real[:, :-1]], dim=1)
    norm = seen[path][0][shifted].square().mean(dim=0).sqrt()
    lrp(model, data, sparsity=0.5, score="wanda", scope="row", stack="decoder.block")
    assert torch.equal(mask_of(model.get_submodule(path)), rows_of(weight.abs() * norm, 0.5))


@pytest.mark.parametrize(
    ("granularity", "scope"),
    [("weight", "row"), ("weight", "layer"), ("weight", "model"), ("row", "row"), ("row", "model")],
)
def test_scopes(granularity, scope):
    """Weights are compared within a row, a layer, or the whole stack; rows, by sums of scores, in a layer or in all."""
    found = masks(lrp(dense(), granularity=granularity, sparsity=0.4, score="magnitude", scope=scope))
    pairs = [(weight_of(module).abs(), found[path]) for path, module in linears(dense()).items()]
    if granularity == "row":
        pairs = [(size.sum(dim=1), mask.any(dim=1)) for size, mask in pairs]
    elif scope == "row":
        pairs = [rows for pair in pairs for rows in zip(*pair, strict=True)]
    if scope == "model":
        pairs = [[torch.cat([part.flatten() for part in parts]) for parts in zip(*pairs, strict=True)]]
    for size, mask in pairs:
        assert mask.flatten().tolist() == best(size.flatten().tolist(), int(size.numel() * 0.6 + 0.5))


def test_n_of_m_are_the_best_of_their_group():
    model = lrp(dense(), granularity="n:m", pattern=(1, 4), score="magnitude")
    for path, module in linears(dense()).items():
        groups = weight_of(module).abs().reshape(-1, 4)
        assert torch.equal(mask_of(model.get_submodule(path)).reshape(-1, 4), rows_of(groups, 0.25))


@pytest.mark.parametrize("score", ["relevance", "magnitude", "wanda"])
def test_neurons_are_those_with_the_best_scores(score):
    """E |R| of the unit; the length of what it writes; that times how much it is active."""
    model, old = lrp(dense(), granularity="neuron", sparsity=0.5, score=score), dense()
    found, measured = products(old, FLOATS), norms(old, {"input_values": FLOATS}, torch.ones(40, 1).bool())
    for index in range(3):
        name = f"layers.{index}.mlp.down_proj"
        weight = weight_of(old.get_submodule(name))
        scores = (found[name] * weight).sum(dim=1).abs().mean(dim=0)
        if score != "relevance":
            scores = weight.norm(dim=0) * (measured[name] if score == "wanda" else 1)
        kept = torch.tensor(best(scores.tolist(), 10))
        assert torch.equal(model.layers[index].mlp.up_proj.weight, old.layers[index].mlp.up_proj.weight[kept])


def test_neurons_of_the_whole_model():
    """Widths then differ, and add up to the share."""
    model, old = lrp(dense(), granularity="neuron", sparsity=0.5, score="magnitude", scope="model"), dense()
    norms_of = torch.stack([layer.mlp.down_proj.weight.detach().norm(dim=0) for layer in old.layers])
    kept = torch.tensor(best(norms_of.flatten().tolist(), 30)).view(3, 20)
    assert model.config.intermediate_size == kept.sum(dim=1).tolist()
    assert len(set(model.config.intermediate_size)) > 1


def test_what_needs_no_data_works_without():
    model, old = made("Llama"), made("Llama")
    compress(model, LRPConfig(sparsity=0.5, score="magnitude", scope="row", compensation="none"))
    path = "model.layers.0.mlp.up_proj"
    assert torch.equal(mask_of(model.get_submodule(path)), rows_of(old.get_submodule(path).weight.abs(), 0.5))
    model = compress(made("Llama"), LRPConfig(bits=4, group_size=32, allocation="error", rounding="nearest"))
    assert stored(model, MixedPrecisionLinear)


# --- bits by cost ----------------------------------------------------------------------------------------------------


def with_dead_units():
    """The first 8 of 16 hidden units of each block never do anything."""
    model = dense(hidden_size=16, intermediate_size=16, residual=True, use_bias=True)
    with torch.no_grad():
        for layer in model.layers:
            layer.mlp.up_proj.bias[:8] = -1e3
    return model


@pytest.mark.parametrize("allocation", ["fisher", "relevance", "error", "uniform"])
def test_more_bits_for_what_is_worth_more(allocation):
    """By what outputs feel, dead units' weights get the fewest there are; by error alone they are like any other."""
    model = lrp(with_dead_units(), bits=7.75, group_size=8, symmetric=True, allocation=allocation)  # 3 for steps
    dead, alive = [], []
    for layer in model.layers:
        up, down = layer.mlp.up_proj.bits.view(16, 2), layer.mlp.down_proj.bits.view(16, 2)
        dead += [*up[:8].flatten().tolist(), *down[:, 0].tolist()]
        alive += [*up[8:].flatten().tolist(), *down[:, 1].tolist()]
    if allocation in ("fisher", "relevance"):
        assert set(dead) == {2}
        assert sum(alive) / len(alive) > 7
    elif allocation == "error":
        assert abs(sum(alive) / len(alive) - sum(dead) / len(dead)) < 0.75
        assert len(set(alive)) > 1
    else:
        assert set(dead) | set(alive) == {4, 5}


def test_groups_with_larger_errors_get_more_bits():
    model = dense(hidden_size=16, intermediate_size=32, num_hidden_layers=1)
    with torch.no_grad():
        model.layers[0].mlp.up_proj.weight[:8] *= 20
    lrp(model, bits=8, group_size=8, symmetric=True, allocation="error")
    bits = model.layers[0].mlp.up_proj.bits.view(32, 2).float()
    assert float(bits[:8].mean()) > float(bits[8:].mean()) + 1


@pytest.mark.parametrize("bits", [4.0, 5.0])
def test_uniform_bits_are_all_the_same(bits):
    model = lrp(made("Llama"), bits=bits + 0.75, group_size=32, symmetric=True, allocation="uniform")
    assert {int(b) for m in stored(model, MixedPrecisionLinear).values() for b in m.bits} == {int(bits)}


# --- what is left makes up for what went ------------------------------------------------------------------------------


def lively(name):
    """Weights so large that blocks matter beside the stream, as in a trained model."""
    model = made(name)
    randomise(model, seed=3)
    return model


def off(name, **settings):
    """How far the outputs are from the original's."""
    model = lively(name)
    data = {model.main_input_name: data_of(model)}
    before = forward(model, data)
    return float((forward(lrp(model, **settings), data) - before).square().mean())


@pytest.mark.parametrize("name", ["Llama", "GPT-2", "Dense"])
@pytest.mark.parametrize(
    "settings",
    [
        {"sparsity": 0.3, "score": "magnitude"},
        {"sparsity": 0.3},
        {"granularity": "n:m", "pattern": (3, 4)},
        {"granularity": "neuron", "sparsity": 0.3},
    ],
    ids=str,
)
def test_compensation_brings_outputs_nearer(name, settings):
    assert off(name, **settings) < off(name, compensation="none", **settings)


@pytest.mark.parametrize("name", ["Llama", "GPT-2", "Dense"])
@pytest.mark.parametrize("allocation", ["fisher", "relevance", "uniform"])
def test_so_does_compensated_rounding(name, allocation):
    settings = {"bits": 4, "group_size": 32, "allocation": allocation}
    assert off(name, **settings) < 0.8 * off(name, rounding="nearest", **settings)


@pytest.mark.parametrize("name", ["Llama", "GPT-2"])
def test_without_compensation_the_rest_is_as_it_was(name):
    model, old = lrp(made(name), sparsity=0.5, compensation="none"), made(name)
    for path, module in stored(model, SparseLinear).items():
        assert torch.equal(weight_of(module), weight_of(old.get_submodule(path)) * mask_of(module))
    model = lrp(made(name), bits=8.7, group_size=32, rounding="nearest")
    for path, module in stored(model, MixedPrecisionLinear).items():
        steps = module.steps.view(torch.bfloat16).float().view(module.out_features, -1)
        gaps = (weight_of(module) - weight_of(old.get_submodule(path))).abs().view(module.out_features, -1, 32)
        assert bool((gaps.amax(dim=2) <= 0.501 * steps).all())
