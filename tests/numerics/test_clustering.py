"""Clusters of units: every one filled, numbered by their first units, and the ones that anybody would see."""

import pytest
import torch

from hf_compress.numerics import clustering
from hf_compress.numerics.clustering import CLUSTERINGS, cluster

NAMES = ("kmeans", "agglomerative", "minibatch_kmeans", "neighbors")


def units(count, features=7, seed=0):
    return torch.randn(count, features, generator=torch.Generator().manual_seed(seed))


def groups(sizes=(8, 5, 1, 6), seed=0):
    """Units around centres that are much farther apart than the units of one centre, shuffled, and their groups."""
    generator = torch.Generator().manual_seed(seed)
    label = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    label = label[torch.randperm(len(label), generator=generator)]
    centres = 100 * torch.eye(len(sizes), 7)
    return centres[label] + torch.randn(len(label), 7, generator=generator), label


def as_sets(labels):
    """A partition without the names of its parts."""
    return {frozenset((labels == value).nonzero().flatten().tolist()) for value in labels.unique()}


def check_labels(labels, units, count):
    """One int64 label a unit, each used, and a new one never before those below it."""
    assert labels.dtype == torch.int64
    assert labels.shape == (units,)
    assert list(dict.fromkeys(labels.tolist())) == list(range(count))


algorithms = pytest.mark.parametrize("algorithm", NAMES)


def test_the_names_are_those_of_the_documentation():
    assert set(CLUSTERINGS) == set(NAMES)


@algorithms
@pytest.mark.parametrize("count", [1, 2, 9, 29, 30])
def test_every_label_is_used_and_numbered_by_its_first_unit(algorithm, count):
    check_labels(cluster(units(30), count, algorithm), 30, count)


@algorithms
@pytest.mark.parametrize("distinct", [1, 2, 5])
def test_as_many_clusters_as_asked_for_when_fewer_units_differ(algorithm, distinct):
    """Dead units are alike to the last bit, and an algorithm by itself leaves clusters empty then."""
    rows = units(distinct)[torch.arange(20) % distinct]
    labels = cluster(rows, 8, algorithm)
    check_labels(labels, 20, 8)
    for members in as_sets(labels):  # splitting must not mix units that do differ
        assert len({unit % distinct for unit in members}) == 1


@algorithms
def test_units_apart_are_split_first_when_clusters_are_missing(algorithm, monkeypatch):
    """Whoever is farthest from the mean of its cluster gets one of its own."""
    alone = units(12)
    alone[7] += 50
    monkeypatch.setitem(CLUSTERINGS._entries, algorithm, lambda rows, count, seed: [0] * len(rows))
    labels = cluster(alone, 2, algorithm)
    assert as_sets(labels) == {frozenset({7}), frozenset(set(range(12)) - {7})}


@algorithms
@pytest.mark.parametrize("seed", range(4))
def test_clear_groups_are_found(algorithm, seed):
    rows, expected = groups(seed=seed)
    if algorithm == "minibatch_kmeans":  # starts from units drawn at random: groups of one are often missed
        rows, expected = rows[expected < 2], expected[expected < 2]
    count = len(expected.unique())
    assert as_sets(cluster(rows, count, algorithm, seed)) == as_sets(expected)


@algorithms
def test_the_same_seed_gives_the_same_clusters(algorithm):
    rows = units(60)
    first = cluster(rows, 11, algorithm, seed=4)
    torch.manual_seed(123)  # nor does it depend on anybody else's generator
    assert torch.equal(cluster(rows, 11, algorithm, seed=4), first)


@pytest.mark.parametrize("algorithm", ["kmeans", "minibatch_kmeans"])
def test_another_seed_gives_others(algorithm):
    rows = units(60)
    assert len({tuple(cluster(rows, 11, algorithm, seed).tolist()) for seed in range(5)}) > 1


@algorithms
@pytest.mark.parametrize(
    ("rows", "labels"), [([[0.0]] * 4, [0, 1, 2, 3]), ([[0.0]], [0]), ([[0.0], [1.0]], [0, 0])], ids=len
)
def test_few_units(algorithm, rows, labels):
    """As many clusters as units; or two units, fewer than the graph of neighbours would have."""
    assert cluster(torch.tensor(rows), len(set(labels)), algorithm).tolist() == labels


@algorithms
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_units_in_any_dtype_and_none_is_changed(algorithm, dtype):
    rows = groups((6, 6))[0].to(dtype)
    before = rows.clone()
    assert torch.equal(cluster(rows, 2, algorithm), cluster(rows.float(), 2, algorithm))
    assert torch.equal(rows, before)


@algorithms
def test_refuses_a_count_that_does_not_fit(algorithm):
    with pytest.raises(ValueError, match="count is 0; expected a whole number >= 1"):
        cluster(units(5), 0, algorithm)
    with pytest.raises(ValueError, match="count is 6; expected at most the number of units, 5"):
        cluster(units(5), 6, algorithm)
    for count in (True, 2.0, "2", None):
        with pytest.raises(TypeError, match="expected a whole number >= 1"):
            cluster(units(5), count, algorithm)


def test_refuses_units_that_are_no_numbers():
    rows = units(5)
    rows[3, 2] = float("nan")
    with pytest.raises(ValueError, match="units has NaN or infinite entries in 1 of 5 samples"):
        cluster(rows, 2)
    rows[3, 2] = float("inf")
    with pytest.raises(ValueError, match="units has NaN or infinite entries"):
        cluster(rows, 5)  # where there is nothing to decide
    with pytest.raises(ValueError, match="units has shape"):
        cluster(units(5)[0], 1)
    with pytest.raises(TypeError, match="units is list"):
        cluster([[0.0], [1.0]], 1)


@pytest.mark.parametrize("count", [2, 5])  # the latter leaves nothing to decide
def test_refuses_an_unknown_algorithm(count):
    with pytest.raises(ValueError, match="unknown clustering 'ward'; expected one of 'agglomerative', 'kmeans'"):
        cluster(units(5), count, "ward")


def test_agglomerative_clustering_has_a_limit(monkeypatch):
    monkeypatch.setattr(clustering, "AGGLOMERATIVE_LIMIT", 9)
    with pytest.raises(ValueError, match=r"at most 9; got 10: take neighbors or minibatch_kmeans"):
        cluster(units(10), 3, "agglomerative")
    check_labels(cluster(units(9), 3, "agglomerative"), 9, 3)
    for algorithm in ("kmeans", "minibatch_kmeans", "neighbors"):
        check_labels(cluster(units(10), 3, algorithm), 10, 3)
