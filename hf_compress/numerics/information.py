"""Mutual information of matched samples from nearest neighbours, and the similarity that MKA makes of it.

Sources: A. Kraskov, H. Stoegbauer and P. Grassberger, "Estimating mutual information", Physical Review E 69, 066138
(2004) [KSG]; MKA (arXiv 2406.16330), the normalised pairwise information between layers.

Metric: the maximum norm, within a block and across the two blocks of a pair. Every block is first centred and divided
by one number, the root mean square of its samples' max-norm distance to their mean, so that the balls of the joint
space do not depend on units. One number per block, not one per dimension: the relative sizes of the dimensions are
information (lambda^t in a diffusion map, variance in PCA), and whitening would blow up the directions that are noise.

Ties: distances closer than `ROUNDING` are equal and ones below it (in the units above) are 0, so that y = 3x is the
same as y = x although its distances differ in the last bit. When the k-th joint distance eps is tied, the lowest rank
at which it occurs takes the place of k in KSG's equation (8). When it is 0 (k or more copies of a sample) the copies
are counted instead, the sample included: the plug-in value for discrete variables. Without ties this is equation (8)
to the letter.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from scipy.spatial import cKDTree
from scipy.spatial.distance import cdist
from scipy.special import digamma
from torch import Tensor

from .samples import as_matched_samples, as_samples, check_positive_int, is_constant

ROUNDING = 1e-10

# Distances of a few rows are taken for all blocks at a time: 32k of them per block stay in the cache, and memory grows
# with L N instead of L N^2.
_SLAB = 2**15


def entropy(x: Tensor, neighbors: int = 3) -> float:
    """Differential entropy in nats, Kozachenko-Leonenko: -psi(k) + psi(N) + (D/N) sum_i log eps_i.

    eps_i is twice the max-norm distance to the k-th neighbour, in units of x (x is *not* rescaled here: differential
    entropy depends on units, may be negative, and grows by D log c when x becomes c x).

    Args:
        x: [N, D] samples, any real dtype.
        neighbors: k.

    Returns:
        Nats; -inf when some sample has k or more exact copies, as for any distribution with atoms.

    Raises:
        ValueError: N <= k + 1, NaN or infinite entries.

    Source: KSG equation (20), with log c_D = 0 for the maximum norm.
    """
    samples = as_samples(x)
    _check_neighbors(neighbors, len(samples))
    points = samples.numpy()
    distances, _ = cKDTree(points).query(points, k=[neighbors + 1], p=math.inf)  # the sample itself comes first
    if (distances == 0).any():
        return -math.inf
    mean_log = float(np.log(2 * distances).mean())
    return float(digamma(len(points)) - digamma(neighbors)) + points.shape[1] * mean_log


def mutual_information(x: Tensor, y: Tensor, neighbors: int = 3) -> float:
    """Mutual information in nats, KSG algorithm 1: psi(k) - <psi(n_x + 1) + psi(n_y + 1)> + psi(N).

    n_x(i), n_y(i) count the samples strictly nearer to sample i than its k-th joint neighbour, in x and in y alone.
    Never above psi(N) - psi(k) without ties, which I(x; x) attains; may be slightly below 0 for independent x and y.

    Args:
        x: [N, D], any real dtype.
        y: [N, E], the same N samples.
        neighbors: k; more of them lower the variance and raise the bias.

    Raises:
        ValueError: N <= k + 1, numbers of samples that differ, NaN or infinite entries.

    Source: KSG equation (8); rescaling and ties as in the module's docstring.
    """
    return float(mutual_information_matrix([x, y], neighbors)[0, 1])


def normalized_information(x: Tensor, y: Tensor, neighbors: int = 3) -> float:
    """S(x; y) in [0, 1]: entry [0, 1] of `information_matrix([x, y])`; see there."""
    return float(information_matrix([x, y], neighbors)[0, 1])


def mutual_information_matrix(embeddings: Sequence[Tensor], neighbors: int = 3) -> Tensor:
    """`mutual_information` of every pair, the blocks with themselves included, sharing the distances of each block.

    Args:
        embeddings: L tensors [N, D_l] of the same N samples.
        neighbors: k.

    Returns:
        [L, L] float64, symmetric, in nats. Work grows as L^2 N^2, memory as L N.

    Raises:
        ValueError: N <= k + 1, numbers of samples that differ, NaN or infinite entries.
    """
    blocks = [_rescaled(x) for x in as_matched_samples(embeddings)]
    size = len(blocks[0])
    _check_neighbors(neighbors, size)
    psi = digamma(np.arange(size + 1))  # psi[n] for the counts 1..N; psi[0] is never used
    total = np.zeros((len(blocks), len(blocks)))
    step = max(1, _SLAB // size)
    for start in range(0, size, step):
        rows = np.arange(start, min(start + step, size))
        slabs = [_distances_from(rows, points) for points in blocks]
        for i, x in enumerate(slabs):
            for j in range(i, len(slabs)):
                total[i, j] += _local_information(x, slabs[j], neighbors, psi)
    total = np.triu(total) + np.triu(total, k=1).T
    return torch.from_numpy(total / size + psi[size])


def information_matrix(embeddings: Sequence[Tensor], neighbors: int = 3) -> Tensor:
    """Similarity S_lm = max(I(l; m), 0) / sqrt(I(l; l) I(m; m)) of every pair of blocks, in [0, 1].

    MKA writes S_lm = I(l; m) / sqrt(H_l H_m). For discrete variables H_l = I(l; l). For the continuous embeddings
    here the differential entropy is no such thing: it depends on the units, can be 0 or negative, and I(l; l) is
    infinite, so that the quotient is neither bounded nor 1 on the diagonal. What the paper's equation means is kept by
    taking H_l as I(l; l) *at the resolution of the estimator*: KSG's own value for (l; l). Without ties that is
    psi(N) - psi(k), about log(N/k): the entropy of x cut into N/k cells of equal probability, the finest that k
    neighbours resolve. Then S is I in units of the largest value that KSG can return for these N and k. So it is
    exactly 1 for l = m, symmetric, free of units, and rises with I. With ties H_l falls, to the entropy of the distinct
    values when there are few of them. Because of H, values of S are only comparable at equal N and k.

    A constant block has H = 0: S is 0 with any other block and 1 with itself or another constant.

    Args:
        embeddings: L tensors [N, D_l] of the same N samples, e.g. from `manifold.embed`.
        neighbors: k.

    Returns:
        [L, L] float64, symmetric, in [0, 1], diagonal exactly 1.

    Raises:
        ValueError: N <= k + 1, numbers of samples that differ, NaN or infinite entries.

    Source: MKA (arXiv 2406.16330), the similarity of layers; the reading of H is ours, as said above.
    """
    information = mutual_information_matrix(embeddings, neighbors)
    own = information.diagonal().clone()
    own[own < ROUNDING] = 0.0  # of a constant: the mean of N equal terms is off by rounding
    scale = torch.outer(own, own).sqrt()
    both_constant = torch.outer(own == 0, own == 0)
    ratio = torch.where(scale > 0, information / scale.clamp(min=ROUNDING), both_constant.double())
    return ratio.clamp(0.0, 1.0).fill_diagonal_(1.0)


def _check_neighbors(neighbors: int, size: int) -> None:
    check_positive_int(neighbors, "neighbors")
    if size <= neighbors + 1:
        raise ValueError(
            f"{size} samples are too few for {neighbors} neighbors; expected at least {neighbors + 2} (neighbors + 2): "
            "give more calibration samples or ask for fewer neighbors"
        )


def _rescaled(x: Tensor) -> np.ndarray:
    """Centred, and divided by the root mean square of the samples' max-norm distance to the mean."""
    if is_constant(x):  # what is left of it after centring is rounding, not to be blown up to unit size
        return np.zeros(x.shape)
    x = x / x.abs().amax()  # squares of very small or very large entries would under- or overflow
    centred = x - x.mean(dim=0)
    return (centred / centred.abs().amax(dim=1).square().mean().sqrt()).numpy()


def _distances_from(rows: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Max-norm distances [len(rows), N] from those samples to all; infinite to themselves, 0 below rounding."""
    distances = cdist(points[rows], points, "chebyshev")
    distances[distances < ROUNDING] = 0.0
    distances[np.arange(len(rows)), rows] = np.inf
    return distances


def _local_information(x: np.ndarray, y: np.ndarray, neighbors: int, psi: np.ndarray) -> float:
    """Sum over the rows of psi(k_i) - (psi(n_x + 1) + psi(n_y + 1)); x, y: distances [R, N] from `_distances_from`."""
    joint = np.maximum(x, y)
    eps = np.partition(joint, neighbors - 1, axis=1)[:, neighbors - 1]
    # "Strictly inside" with a margin for rounding; where eps is 0, the copies are inside.
    inside = np.where(eps > 0, eps * (1 - ROUNDING), np.finfo(np.float64).tiny)[:, None]
    n_joint, n_x, n_y = (np.count_nonzero(distances < inside, axis=1) for distances in (joint, x, y))
    return float((psi[n_joint + 1] - (psi[n_x + 1] + psi[n_y + 1])).sum())
