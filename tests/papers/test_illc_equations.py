"""ILLC (https://arxiv.org/abs/2503.03693): its equations written slowly, neuron by neuron, against the fast ones.

A multilayer perceptron is s_0 = E x + e, a_l = act(U_l s_{l-1} + b_l), s_l = D_l a_l + c_l, and a classifier on the
last s. Neurons that are clustered become one, which reads the mean of what they read and writes the sum of what they
wrote; here that is done to matrices in float64, for a perceptron that is never a Transformers model again.
"""

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from sklearn.cluster import AgglomerativeClustering, KMeans

from hf_compress import DenseConfig, DenseForClassification
from hf_compress.api.compress import compress
from hf_compress.calibration.data import DataOptions
from hf_compress.methods.base import ridge as held_out
from hf_compress.methods.illc import ILLCConfig
from hf_compress.numerics import elimination

FEATURES, HIDDEN, WIDTH, LAYERS, BATCH = 6, 9, 20, 3, 8
ACTIVATIONS = {"relu": lambda z: z.clamp(min=0), "tanh": torch.tanh}
CLUSTERINGS = {
    "kmeans": lambda rows, count: KMeans(count, n_init=10, random_state=0).fit_predict(rows),
    "agglomerative": lambda rows, count: AgglomerativeClustering(count, linkage="ward").fit_predict(rows),
}


def dense(seed=1, **fields):
    """A perceptron with biases that are not zero. The seed is one with which k-means does not hang on rounding."""
    torch.manual_seed(seed)
    sizes = {"input_size": FEATURES, "hidden_size": HIDDEN, "intermediate_size": WIDTH, "num_hidden_layers": LAYERS}
    model = DenseForClassification(DenseConfig(**(sizes | {"num_labels": 4} | fields))).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.5)
    return model


def samples(count=96, seed=1):
    return torch.randn(count, FEATURES, generator=torch.Generator().manual_seed(seed))


def logits(model, x):
    with torch.no_grad():
        return model(x).logits


@dataclass
class Layer:
    """U (neurons, hidden), b (neurons), D (hidden, neurons), c (hidden)."""

    up: torch.Tensor
    b: torch.Tensor
    down: torch.Tensor
    c: torch.Tensor
    act: str
    residual: bool

    def activations(self, s):
        return ACTIVATIONS[self.act](s @ self.up.T + self.b)

    def output(self, s):
        return self.residual * s + self.activations(s) @ self.down.T + self.c

    def rows(self):
        """Each neuron's own weights in a row, in an order that does not depend on how they are numbered, and c."""
        rows = torch.cat([self.up, self.b[:, None], self.down.T], dim=1)
        return rows[rows[:, 0].argsort()], self.c


def numbers(linear):
    return linear.weight.detach().double(), linear.bias.detach().double()


def layers_of(model):
    kind = model.config.hidden_act, model.config.residual
    return [Layer(*numbers(block.mlp.up_proj), *numbers(block.mlp.down_proj), *kind) for block in model.layers]


def embedded(model, x):
    weight, bias = numbers(model.embedding)
    return x.double() @ weight.T + bias


def result(model, layers, x):
    """The network's output with other layers than its own."""
    s, (weight, bias) = embedded(model, x), numbers(model.classifier)
    for layer in layers:
        s = layer.output(s)
    return (s @ weight.T + bias).float()


def merging(clustering, gamma=0.4):
    """Neurons whose activations are alike become one: incoming weights and bias averaged, outgoing weights summed."""

    def reduce(layer, a, target):
        labels = CLUSTERINGS[clustering](a.T.numpy(), int(gamma * len(layer.b) + 0.5)).tolist()
        groups = [[j for j in range(len(labels)) if labels[j] == label] for label in sorted(set(labels))]
        up = torch.stack([sum(layer.up[j] for j in members) / len(members) for members in groups])
        b = torch.stack([sum(layer.b[j] for j in members) / len(members) for members in groups])
        down = torch.stack([sum(layer.down[:, j] for j in members) for members in groups], dim=1)
        return replace(layer, up=up, b=b, down=down), labels

    return reduce


def eliminating(count):
    """Refit without each neuron that is left, and leave out the one without which least is lost."""

    def lost(a, target):
        rows = torch.cat([a, torch.ones(len(a), 1).double()], 1).numpy()
        return np.square(rows @ np.linalg.lstsq(rows, target.numpy(), rcond=None)[0] - target.numpy()).sum()

    def reduce(layer, a, target):
        left = list(range(len(layer.b)))
        while len(left) > count:
            left.remove(min(left, key=lambda j: lost(a[:, [i for i in left if i != j]], target)))
        return replace(layer, up=layer.up[left], b=layer.b[left], down=layer.down[:, left]), None

    return reduce


def solved(layer, s, target, pi):
    """D and c solved anew: every fourth batch is held out to choose the penalty by, and then all are taken."""
    a, held = layer.activations(s), torch.tensor([sample // BATCH % 4 == 3 for sample in range(len(s))])

    def error(penalty):
        down, c = ridge(a[~held], target[~held], pi[~held], penalty, layer.down)
        return (pi[held] * (a[held] @ down.T + c - target[held]).square().sum(1)).sum()

    down, c = ridge(a, target, pi, min(held_out.PENALTIES, key=error), layer.down)
    return replace(layer, down=down, c=c)


def ridge(a, target, pi, penalty, start):
    """Least squares by numpy, with a row for each entry of D - D_0; the bias costs nothing."""
    mean = (pi[:, None] * a).sum(0) / pi.sum()
    price = (penalty * (pi[:, None] * (a - mean).square()).sum(0).mean()).sqrt()
    ones, root = torch.ones(len(a), 1).double(), pi.sqrt()[:, None]
    rows = torch.cat([root * torch.cat([a, ones], 1), price * torch.eye(a.shape[1] + 1).double()[:-1]])
    solution = np.linalg.lstsq(rows.numpy(), torch.cat([root * target, price * start.T]).numpy(), rcond=None)[0]
    return torch.from_numpy(solution[:-1]).T, torch.from_numpy(solution[-1])


def by_hand(model, x, reduce, iterative=True, pi=None, target=None):
    """The compressed layers and their clusters; solved for anew where there is a target, "stream" or "ffn"."""
    original = compressed = embedded(model, x)
    layers, clusters, pi = [], [], torch.ones(len(x)).double() if pi is None else pi
    for layer in layers_of(model):
        seen = compressed if iterative else original
        aim = layer.output(original) - layer.residual * (seen if target == "stream" else original)
        new, labels = reduce(layer, layer.activations(seen) * pi.sqrt()[:, None], aim)
        layers.append(new if target is None else solved(new, seen, aim, pi))
        original, compressed = layer.output(original), layers[-1].output(compressed)
        clusters.append(labels)
    return layers, clusters


def partition(labels):
    return {frozenset(j for j, other in enumerate(labels) if other == label) for label in labels}


def run(model, x, **settings):
    config = ILLCConfig(**({"gamma": 0.4, "variant": "paper"} | settings))
    return compress(model, config, x, options=DataOptions(batch_size=BATCH))


def clusters_of(model):
    return [partition(block["clusters"]) for block in model.compression_report.notes["blocks"]]


def assert_same(model, layers, x, tolerance=1e-4):
    """The same weights, however the neurons are numbered, and the same function."""
    torch.testing.assert_close(logits(model, x), result(model, layers, x), rtol=tolerance, atol=tolerance)
    for got, layer in zip(layers_of(model), layers, strict=True):
        torch.testing.assert_close(got.rows(), layer.rows(), rtol=tolerance, atol=tolerance)


def with_copies(residual=False, scales=False):
    """Seven groups of neurons that differ in what they write only, or in scale too, which ReLU lets through."""
    model, s = dense(residual=residual), embedded(dense(), samples()).float()
    group = torch.repeat_interleave(torch.arange(7), torch.tensor([3, 1, 2, 5, 2, 4, 3]))[torch.randperm(20)]
    factor = 0.5 + torch.rand(20) if scales else torch.ones(20)
    with torch.no_grad():
        for block in model.layers:  # each neuron is on for some samples, and off for others
            up = block.mlp.up_proj
            z = s @ up.weight[group].T
            up.weight.copy_(up.weight[group] * (factor / z.std(0))[:, None])
            up.bias.copy_((0.5 - z.mean(0) / z.std(0)) * factor)
            s = block(s)
    return model, group.tolist()


@pytest.mark.parametrize("iterative", [True, False])
@pytest.mark.parametrize("clustering", [*CLUSTERINGS, "neighbors"])
def test_copies_of_a_neuron_become_one_without_loss(clustering, iterative):
    """Any clustering has to see them, and then nothing is lost, on samples of any kind."""
    (model, group), other = with_copies(), 10 * samples(seed=7)
    expected = logits(model, other)
    run(model, samples(), gamma=7 / 20, clustering=clustering, iterative=iterative)
    assert clusters_of(model) == [partition(group)] * LAYERS
    torch.testing.assert_close(logits(model, other), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("clustering", CLUSTERINGS)
def test_merging_is_that_of_the_paper(clustering, act):
    """Each layer on the activations of the compressed layers below; SpArX (iterative=False) on the original ones."""
    x, found = samples(), {}
    for iterative in (True, False):
        model = dense(0, hidden_act=act)
        layers, clusters = by_hand(model, x, merging(clustering), iterative)
        assert (result(model, layers, x) - logits(model, x)).abs().max() > 0.1  # so much is lost
        run(model, x, clustering=clustering, iterative=iterative)
        found[iterative] = clusters_of(model)
        assert found[iterative] == [partition(labels) for labels in clusters]
        assert_same(model, layers, x)
    assert [one == other for one, other in zip(*found.values(), strict=True)] == [True, False, False]


@pytest.mark.parametrize(
    ("gamma", "width", "kept"), [(0.5, 5, 3), (0.5, 7, 4), (0.3, 5, 2), (0.29, 5, 1), (0.01, 20, 1), (1.0, 20, 20)]
)
def test_gamma_is_the_share_that_stays(gamma, width, kept):
    """Halves are rounded up, and one neuron always stays."""
    model, x = dense(intermediate_size=width, hidden_act="tanh"), samples()
    before = logits(model, x)
    run(model, x, gamma=gamma)
    assert model.config.intermediate_size == [kept] * LAYERS
    assert torch.equal(logits(model, x), before) == (kept == width)


@pytest.mark.parametrize("width", [None, 1.0])
@pytest.mark.parametrize("clustering", CLUSTERINGS)
@pytest.mark.parametrize("compensation", ["none", "ridge"])
def test_near_an_example_samples_count_by_how_near_they_are(compensation, clustering, width):
    """By pi, for the clusters and for the ridge."""
    model, x = dense(), samples()
    example, target = tuple(x[5].tolist()), "stream" if compensation == "ridge" else None
    pi = torch.exp(-((x.double() - x[5].double()) ** 2).sum(1) / (width or 0.75 * FEATURES**0.5) ** 2)
    layers, clusters = by_hand(model, x, merging(clustering), pi=pi, target=target)
    assert partition(clusters[0]) != partition(by_hand(model, x, merging(clustering))[1][0])
    run(model, x, clustering=clustering, compensation=compensation, example=example, kernel_width=width)
    assert clusters_of(model) == [partition(labels) for labels in clusters]
    assert_same(model, layers, x, 1e-3)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize(("iterative", "target"), [(True, "stream"), (True, "ffn"), (False, "stream")])
@pytest.mark.parametrize("clustering", CLUSTERINGS)
def test_outgoing_weights_are_solved_for_by_ridge_regression(clustering, iterative, target, residual):
    """Towards the original stream, or what the original FFN wrote; the same where there is no residual path."""
    model, x = dense(residual=residual), samples()
    layers, _ = by_hand(model, x, merging(clustering), iterative, target=target)
    run(model, x, compensation="ridge", clustering=clustering, iterative=iterative, target=target)
    assert_same(model, layers, x, 1e-3)


def test_penalties_are_not_always_the_same():
    """Else the test above would not see that they are chosen."""
    models = [run(dense(seed), samples(32), compensation="ridge") for seed in range(3)]
    assert len({block["penalty"] for model in models for block in model.compression_report.notes["blocks"]}) > 1


@pytest.mark.parametrize("residual", [False, True])
def test_less_is_lost_when_it_is_made_up_for(residual):
    """On the calibration data: merging alone, against merging with the ridge, and the default with neurons kept."""
    x, lost = samples(), []
    for settings in ({}, {"compensation": "ridge"}, {"variant": "compensated"}):
        model = dense(residual=residual)
        before = logits(model, x)
        run(model, x, **settings)
        lost.append(float((logits(model, x) - before).square().mean()))
    assert lost[0] > 2 * max(lost[1:])


@pytest.mark.parametrize("residual", [False, True])
def test_neurons_are_left_out_by_what_the_rest_cannot_make_up_for(residual, monkeypatch):
    """The default: brute force tells which neurons stay, and the ridge above solves for what they write."""
    monkeypatch.setattr(elimination, "_PENALTY", 1e-10)  # for plain refits to be an oracle
    model, x = dense(residual=residual, hidden_act="tanh"), samples()
    layers, _ = by_hand(model, x, eliminating(8), target="stream")
    run(model, x, variant="compensated")
    assert_same(model, layers, x, 1e-3)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize(("penalties", "tolerance"), [(held_out.PENALTIES, 1e-2), ((1e-12,), 1e-4)])
def test_multiples_of_a_neuron_are_done_without(penalties, tolerance, residual, monkeypatch):
    """One of each group is enough. What is lost is the ridge's: nothing where that is next to none."""
    monkeypatch.setattr(held_out, "PENALTIES", penalties)
    (model, group), x = with_copies(residual, scales=True), samples()
    original, expected = layers_of(model), logits(model, x)
    run(model, x, gamma=7 / 20, variant="compensated")
    for before, after in zip(original, layers_of(model), strict=True):
        kept = [next(j for j in range(WIDTH) if torch.equal(before.up[j], row)) for row in after.up]
        assert sorted(group[j] for j in kept) == list(range(7))
    torch.testing.assert_close(logits(model, x), expected, rtol=0, atol=tolerance * float(expected.std()))
