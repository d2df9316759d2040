"""Faithfulness: the formulas by hand, sample by sample, as functions, as metrics of `evaluate`, and of two networks."""

import copy
import math

import pytest
import torch

from hf_compress.api.compress import compress
from hf_compress.errors import UnsupportedModelError
from hf_compress.evaluation.faithfulness import (
    activations,
    faithfulness,
    input_output_unfaithfulness,
    similarity,
    structural_unfaithfulness,
)
from hf_compress.evaluation.metrics import InputOutputUnfaithfulness, StructuralUnfaithfulness
from hf_compress.methods.illc import ILLCConfig
from tests.helpers.ffns import noise
from tests.helpers.relevance import dense
from tests.helpers.tiny import tiny_model

SAMPLES = 7


def network():
    return dense(input_size=4, hidden_size=6, intermediate_size=[8, 5], num_hidden_layers=2, num_labels=3)


def by_hand(model, x):
    """Activations of both hidden layers and the probabilities of one sample, neuron by neuron."""
    stream = model.embedding.weight @ x + model.embedding.bias
    layers = []
    for block in model.layers:
        hidden = (block.mlp.up_proj.weight @ stream + block.mlp.up_proj.bias).clamp(min=0)
        layers.append(hidden)
        stream = block.mlp.down_proj.weight @ hidden + block.mlp.down_proj.bias
    logits = model.classifier.weight @ stream + model.classifier.bias
    return [*layers, logits.exp() / logits.exp().sum()]


def test_activations_are_those_of_every_hidden_layer_and_the_probabilities():
    model, data = network(), noise(SAMPLES, 4)
    got = activations(model, data)
    with torch.no_grad():
        for number, x in enumerate(data):
            for layer, expected in zip(got, by_hand(model, x), strict=True):
                assert torch.allclose(layer[number].float(), expected, atol=1e-6)
    assert [layer.shape for layer in got] == [(SAMPLES, 8), (SAMPLES, 5), (SAMPLES, 3)]


@pytest.mark.parametrize("local", [False, True])
def test_both_measures_are_the_papers_sums(local):
    new, old = [noise(SAMPLES, n, seed=n) for n in (3, 2, 4)], [noise(SAMPLES, n, seed=10 + n) for n in (3, 2, 4)]
    weights = noise(SAMPLES, seed=5).abs() if local else None
    pi = weights.tolist() if local else [1.0] * SAMPLES
    io = structure = 0.0
    for x in range(SAMPLES):
        gaps = [float(a) - float(b) for i in range(3) for a, b in zip(new[i][x], old[i][x], strict=True)]
        io += pi[x] * sum(gap**2 for gap in gaps[3 + 2 :])
        structure += pi[x] * sum(map(abs, gaps))
    assert input_output_unfaithfulness(new[2], old[2], weights) == pytest.approx(io / sum(pi))
    assert structural_unfaithfulness(new, old, weights) == pytest.approx(structure / (3 + 2 + 4) / sum(pi))


@pytest.mark.parametrize("example", [None, (0.5, -1.0, 0.0, 2.0)])
def test_two_networks_are_compared_cluster_by_cluster(example):
    original, data = network(), noise(SAMPLES, 4)
    config = ILLCConfig(gamma=0.5, variant="paper")
    smaller = compress(copy.deepcopy(original), config, noise(40, 4, seed=2))
    clusters = [block["clusters"] for block in smaller.compression_report.notes["blocks"]]
    found = faithfulness(original, smaller, clusters, data, example)
    pi = [1.0] * SAMPLES
    if example is not None:
        pi = [math.exp(-sum((float(a) - b) ** 2 for a, b in zip(x, example, strict=True)) / 1.5**2) for x in data]
    io = structure = 0.0
    layers = [0.0, 0.0]
    with torch.no_grad():
        for weight, x in zip(pi, data, strict=True):
            before, after = by_hand(original, x), by_hand(smaller, x)
            gaps = []
            for layer, labels in enumerate(clusters):
                for cluster, activation in enumerate(after[layer].tolist()):
                    members = [before[layer][unit].item() for unit, label in enumerate(labels) if label == cluster]
                    gaps.append(abs(sum(members) / len(members) - activation))
                    layers[layer] += weight * gaps[-1] / (max(labels) + 1) / sum(pi)
            gaps += (after[-1] - before[-1]).abs().tolist()
            structure += weight * sum(gaps) / len(gaps) / sum(pi)
            io += weight * float((after[-1] - before[-1]).square().sum()) / sum(pi)
    assert found.input_output == pytest.approx(io, rel=1e-4)
    assert found.structural == pytest.approx(structure, rel=1e-4)
    assert found.layers == pytest.approx(tuple(layers), rel=1e-4)


def test_a_network_is_faithful_to_itself():
    model = network()
    found = faithfulness(model, model, [list(range(8)), list(range(5))], noise(SAMPLES, 4))
    assert (found.input_output, found.structural, found.layers) == (0, 0, (0, 0))


def test_similarity_falls_off_with_the_distance():
    example = torch.zeros(4)
    samples = torch.tensor([[0.0, 0, 0, 0], [1.0, 0, 0, 0], [0, 2.0, 0, 0]])
    assert similarity(samples, example, 2.0).tolist() == pytest.approx([1, math.exp(-1 / 4), math.exp(-1)])
    assert similarity(samples, example)[1].item() == pytest.approx(math.exp(-1 / 1.5**2))


def test_metrics_of_evaluate_say_the_same():
    new, old = noise(SAMPLES, 5, seed=1).double(), noise(SAMPLES, 5, seed=2).double()
    weights = noise(SAMPLES, seed=5).abs().double()
    metric = InputOutputUnfaithfulness()
    for start in (0, 4):
        part = slice(start, start + 4)
        metric.add_batch(predictions=new[part].tolist(), references=old[part].tolist())
    expected = input_output_unfaithfulness(new, old)
    assert metric.compute()["input_output_unfaithfulness"] == pytest.approx(expected)
    given = {"predictions": new.tolist(), "references": old.tolist(), "weights": weights.tolist()}
    expected = structural_unfaithfulness([new], [old], weights)
    assert StructuralUnfaithfulness().compute(**given)["structural_unfaithfulness"] == pytest.approx(expected)


def test_refuses_what_cannot_be_compared():
    model, data = network(), noise(SAMPLES, 4)
    with pytest.raises(ValueError, match=r"compressed and original must be \(samples, values\)"):
        input_output_unfaithfulness(noise(3, 2), noise(3, 4))
    for weights in (torch.ones(2), -torch.ones(3), torch.zeros(3)):
        with pytest.raises(ValueError, match="weights must be 3 numbers"):
            input_output_unfaithfulness(noise(3, 2), noise(3, 2), weights)
    with pytest.raises(ValueError, match="clusters must name one for each of 8 hidden units"):
        faithfulness(model, model, [[0, 0], [0, 0]], data)
    with pytest.raises(ValueError, match=r"the example must be one sample of \[4\] numbers"):
        faithfulness(model, model, [list(range(8)), list(range(5))], data, example=(1.0, 2.0))
    with pytest.raises(UnsupportedModelError, match="one position"):
        activations(tiny_model("llama"), torch.randint(4, 90, (4, 6)))
