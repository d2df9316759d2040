"""Low-dimensional embeddings of one block's samples: diffusion maps, PCA, or none, behind `embed`.

Source: MKA (arXiv 2406.16330), manifold learning for knowledge extraction; R. R. Coifman and S. Lafon, "Diffusion
maps", Applied and Computational Harmonic Analysis 21 (2006), sections 2 (diffusion distance) and 3 (the alpha family).
"""

import math
from collections.abc import Callable

import numpy as np
import torch
from scipy.linalg import eigh
from torch import Tensor

from .registry import Registry
from .samples import as_samples, check_positive_int, is_constant

MANIFOLDS: Registry[Callable[..., Tensor]] = Registry("manifold")
"""Name -> `f(x, components, **options) -> Tensor [N, k]`."""

# Relative size below which a squared distance taken from a Gram matrix is rounding, not geometry.
_ROUNDING = 1e-13


def embed(x: Tensor, manifold: str = "diffusion", components: int = 8, **options: float | None) -> Tensor:
    """Embed samples in a low-dimensional space.

    Args:
        x: [N, D] samples of one block, any real dtype.
        manifold: a name in `MANIFOLDS`: "diffusion", "pca" or "none".
        components: k, the dimensions to keep; "none" keeps all D.
        options: passed on, e.g. `bandwidth`, `alpha` and `time` of `diffusion_map`.

    Returns:
        [N, k] float64 on the CPU ([N, D] for "none").

    Raises:
        ValueError: unknown manifold, or what the chosen one raises.
        TypeError: an option that the chosen manifold does not have.
    """
    return MANIFOLDS.resolve(manifold)(x, components, **options)


@MANIFOLDS.register("diffusion")
def diffusion_map(
    x: Tensor, components: int, *, bandwidth: float | None = None, alpha: float = 1.0, time: float = 1.0
) -> Tensor:
    """Diffusion-map coordinates Psi_t(x_i) = (lambda_1^t psi_1(i), ..., lambda_k^t psi_k(i)).

    With the kernel W_ij = exp(-||x_i - x_j||^2 / (2 sigma^2)) and its density q = W 1, the alpha-normalised kernel
    W_ij / (q_i q_j)^alpha is divided by its row sums d to give the Markov matrix P; lambda and psi are the right
    eigenpairs of P without the trivial one (lambda_0 = 1, psi_0 constant). The psi have unit norm under the stationary
    distribution pi = d / sum(d), so that Euclidean distances between *all* coordinates are diffusion distances:
    sum_z (P^t(x, z) - P^t(y, z))^2 / pi(z). They do not depend on the location, rotation or (bandwidth None) scale of
    x.

    Args:
        x: [N, D] samples, any real dtype.
        components: k >= 1.
        bandwidth: sigma, in units of x; None: the median distance between samples that differ.
        alpha: density normalisation; 1 removes the sampling density (Laplace-Beltrami), 0 is the plain graph Laplacian.
        time: t >= 0, in diffusion steps; larger leaves less of the fine structure.

    Returns:
        [N, k] float64, columns by falling lambda, each with its entry of largest size positive.

    Raises:
        ValueError: fewer than k + 2 samples, NaN or infinite entries, all samples identical, a bandwidth that is not
            positive or so small that no two samples are neighbours, alpha or time out of range.

    Source: Coifman and Lafon (2006), section 3, with eps = 2 sigma^2; MKA (arXiv 2406.16330), the diffusion kernel.
    """
    x = _checked(x, components)
    if not math.isfinite(alpha) or not math.isfinite(time) or time < 0:
        raise ValueError(f"alpha is {alpha} and time is {time}; expected a finite alpha and a finite time >= 0")
    squared = _squared_distances(x)
    kernel = np.exp(-squared / (2 * _checked_bandwidth(bandwidth, squared) ** 2))
    density = kernel.sum(axis=1)
    kernel /= np.outer(density, density) ** alpha
    degree = kernel.sum(axis=1)

    # P = D^-1 W has the eigenvalues of the symmetric D^-1/2 W D^-1/2, and its eigenvectors up to D^-1/2. The trivial
    # pair is known, so it is moved from 1 to -1 instead of being picked out of the result: a far outlier makes a second
    # eigenvalue of 1, and the solver would then return an arbitrary mixture of the two.
    root = np.sqrt(degree)
    trivial = root / np.linalg.norm(root)
    symmetric = kernel / np.outer(root, root) - 2 * np.outer(trivial, trivial)
    values, vectors = _leading_eigenpairs(symmetric, components)
    coordinates = _oriented(vectors / trivial[:, None]) * np.clip(values, 0.0, 1.0) ** time
    return torch.from_numpy(coordinates)


@MANIFOLDS.register("pca")
def principal_components(x: Tensor, components: int) -> Tensor:
    """Principal component scores: the linear control of `diffusion_map`.

    Args:
        x: [N, D] samples, any real dtype.
        components: k, 1 <= k <= min(N - 2, D).

    Returns:
        [N, k] float64 in units of x, columns by falling variance, each with its entry of largest size positive.

    Raises:
        ValueError: fewer than k + 2 samples, fewer than k features, NaN or infinite entries, all samples identical.
    """
    x = _checked(x, components)
    if x.shape[1] < components:
        raise ValueError(f"components is {components} but x has {x.shape[1]} features; ask for at most that many")
    centred = (x - x.mean(dim=0)).numpy()
    # From the N x N Gram matrix: N is hundreds, D is the model's width.
    values, vectors = _leading_eigenpairs(centred @ centred.T, components)
    return torch.from_numpy(_oriented(vectors) * np.sqrt(np.clip(values, 0.0, None)))


@MANIFOLDS.register("none")
def identity_map(x: Tensor, components: int) -> Tensor:
    """The samples themselves in float64, [N, D]; `components` is ignored. Raises as `as_samples`."""
    return as_samples(x)


def _checked(x: Tensor, components: int) -> Tensor:
    """Checks shared by the embeddings that estimate `components` directions from the samples."""
    check_positive_int(components, "components")
    x = as_samples(x)
    if len(x) < components + 2:
        raise ValueError(
            f"{len(x)} samples cannot carry {components} components; expected at least {components + 2} samples "
            "(components + 2): give more calibration samples or ask for fewer components"
        )
    if is_constant(x):
        raise ValueError(
            f"all {len(x)} samples are identical up to rounding, so their distances (and the bandwidth) are 0; "
            "expected samples that differ: check that the calibration texts differ and that the block is not constant"
        )
    return x


def _squared_distances(x: Tensor) -> np.ndarray:
    """Squared Euclidean distances [N, N] of x [N, D]; exactly 0 where they are below rounding."""
    # Centred first: residual streams have a large common offset that would eat the precision of the Gram form.
    centred = (x - x.mean(dim=0)).numpy()
    norms = np.einsum("nd,nd->n", centred, centred)
    size = norms[:, None] + norms[None, :]
    squared = size - 2 * (centred @ centred.T)
    squared[squared <= _ROUNDING * size] = 0.0
    np.fill_diagonal(squared, 0.0)
    return squared


def _checked_bandwidth(bandwidth: float | None, squared: np.ndarray) -> float:
    """sigma: the one given, when some two samples are neighbours at it, else the median distance."""
    distances = np.sqrt(squared[np.triu_indices(len(squared), k=1)])
    median = float(np.median(distances[distances > 0]))
    if bandwidth is None:
        return median
    if not math.isfinite(bandwidth) or bandwidth <= 0:
        raise ValueError(f"bandwidth is {bandwidth}; expected a finite number > 0, or None for the median distance")
    if math.exp(-0.5 * (float(distances.min()) / bandwidth) ** 2) < np.finfo(np.float64).eps:
        raise ValueError(
            f"bandwidth is {bandwidth:g}, so small that no two samples are neighbours (the median distance is "
            f"{median:g}); expected one of that order: give a larger one, or None for the median"
        )
    return bandwidth


def _leading_eigenpairs(symmetric: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The `count` largest eigenvalues, falling, and their unit eigenvectors as columns."""
    size = len(symmetric)
    values, vectors = eigh(symmetric, subset_by_index=[size - count, size - 1])
    return values[::-1].copy(), vectors[:, ::-1].copy()


def _oriented(vectors: np.ndarray) -> np.ndarray:
    """Flip columns so that the entry of largest size is positive; of several equally large, the first decides."""
    sizes = np.abs(vectors)
    deciding = (sizes >= sizes.max(axis=0) * (1 - 1e-9)).argmax(axis=0)
    return vectors * np.where(vectors[deciding, np.arange(vectors.shape[1])] < 0, -1.0, 1.0)
