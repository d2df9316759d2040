"""Clusters of hidden units that behave alike: scikit-learn's algorithms, with every cluster filled.

A unit is a row: its activations on the samples. Units that are alike to the last bit, dead ones among them, can leave
an algorithm with fewer clusters than were asked for. Then clusters are split until there are as many.
"""

import warnings
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.cluster import AgglomerativeClustering, KMeans, MiniBatchKMeans
from sklearn.exceptions import ConvergenceWarning
from sklearn.neighbors import kneighbors_graph
from torch import Tensor

from .registry import Registry
from .samples import as_samples, check_positive_int

Rows = NDArray[np.float64]
CLUSTERINGS: Registry[Callable[[Rows, int, int], NDArray[np.int64]]] = Registry("clustering")
"""Name -> `f(rows, count, seed) -> labels`."""

# Ward's method holds all distances between units, 0.8 GB at 14,336 of them, and takes a time that grows as fast.
AGGLOMERATIVE_LIMIT = 8192
_NEIGHBOURS = 16
_SMALL = 2**20  # numbers: k-means of so few is cheap enough to start it ten times and keep the best


def cluster(units: Tensor, count: int, algorithm: str = "kmeans", seed: int = 0) -> Tensor:
    """Put units into clusters, none of them empty.

    Args:
        units: [U, D]: a row for each unit, say its activations on D samples.
        count: clusters, 1 to U.
        algorithm: a name in `CLUSTERINGS`: "kmeans", "agglomerative" (Ward's), "minibatch_kmeans", or
            "neighbors" (Ward's among nearest neighbours), the last two for wide layers.
        seed: of the algorithms that draw at random.

    Returns:
        [U] int64 labels from 0 to count - 1, each of which is taken, numbered by the first unit that has it.

    Raises:
        ValueError: unknown algorithm, a count that does not fit, too many units for "agglomerative", NaN or infinity.
        TypeError: a count that is no whole number.
    """
    rows = as_samples(units, "units").numpy()
    check_positive_int(count, "count")
    if count > len(rows):
        raise ValueError(f"count is {count}; expected at most the number of units, {len(rows)}")
    found = CLUSTERINGS.resolve(algorithm)
    if count == len(rows):
        return torch.arange(count)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer different units than clusters: filled below
        labels = _filled(rows, np.asarray(found(rows, count, seed)), count)
    _, first, inverse = np.unique(labels, return_index=True, return_inverse=True)
    return torch.from_numpy(np.argsort(np.argsort(first))[inverse])


@CLUSTERINGS.register("kmeans")
def _kmeans(rows: Rows, count: int, seed: int) -> NDArray[np.int64]:
    restarts = 10 if rows.size <= _SMALL else 1
    return KMeans(count, n_init=restarts, random_state=seed).fit_predict(rows)


@CLUSTERINGS.register("minibatch_kmeans")
def _minibatch_kmeans(rows: Rows, count: int, seed: int) -> NDArray[np.int64]:
    return MiniBatchKMeans(count, n_init=1, init="random", random_state=seed).fit_predict(rows)


@CLUSTERINGS.register("agglomerative")
def _agglomerative(rows: Rows, count: int, seed: int) -> NDArray[np.int64]:
    if len(rows) > AGGLOMERATIVE_LIMIT:
        raise ValueError(
            f"agglomerative clustering compares every unit with every other and takes at most {AGGLOMERATIVE_LIMIT}; "
            f"got {len(rows)}: take neighbors or minibatch_kmeans"
        )
    return AgglomerativeClustering(count).fit_predict(rows)


@CLUSTERINGS.register("neighbors")
def _neighbors(rows: Rows, count: int, seed: int) -> NDArray[np.int64]:
    graph = kneighbors_graph(rows, min(_NEIGHBOURS, len(rows) - 1), include_self=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*connected components.*")  # scikit-learn then connects them itself
        return AgglomerativeClustering(count, connectivity=graph).fit_predict(rows)


def _filled(rows: Rows, labels: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """Give units clusters of their own until there are `count`: those that are farthest from their cluster's mean."""
    _, labels = np.unique(labels, return_inverse=True)
    sizes = np.bincount(labels)
    means = np.zeros((len(sizes), rows.shape[1]))
    np.add.at(means, labels, rows)
    distances = np.linalg.norm(rows - (means / sizes[:, None])[labels], axis=1)
    new = len(sizes)
    for unit in np.argsort(-distances, kind="stable"):
        if new == count:
            break
        if sizes[labels[unit]] > 1:
            sizes[labels[unit]] -= 1
            labels[unit] = new
            new += 1
    return labels
