"""MKA (https://arxiv.org/abs/2406.16330): its equations written slowly, in loops, against the fast ones.

Where the paper leaves a quantity to an estimator, the estimator's own paper is followed: Coifman and Lafon (2006) for
the diffusion map, Kraskov et al. (2004, KSG) for mutual information, its equation (20) for entropy.
"""

import math

import numpy as np
import pytest
import torch
from scipy.special import digamma
from torch import Tensor

from hf_compress.numerics.information import entropy, information_matrix, mutual_information
from hf_compress.numerics.manifold import diffusion_map, embed
from hf_compress.numerics.similarity import similarity_matrix

Matrix = list[list[float]]


def states(samples: int = 30, features: int = 3, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(samples, features, generator=generator, dtype=torch.float64) * torch.tensor([2.0, 1.0, 0.5])


def residual_stream(blocks: int = 4) -> list[Tensor]:
    stream = [states()]
    for i in range(1, blocks):
        stream.append(stream[-1] + 0.4 * states(seed=i))
    return stream


# --- the diffusion map ----------------------------------------------------------------------------------------------


def euclidean(a: Tensor, b: Tensor) -> float:
    return math.sqrt(sum((float(p) - float(q)) ** 2 for p, q in zip(a, b, strict=True)))


def median_distance(x: Tensor) -> float:
    distances = sorted(euclidean(x[i], x[j]) for i in range(len(x)) for j in range(i))
    middle = len(distances) // 2
    return distances[middle] if len(distances) % 2 else (distances[middle - 1] + distances[middle]) / 2


def markov_matrix(x: Tensor, bandwidth: float, alpha: float) -> tuple[Matrix, list[float]]:
    """The random pair on the samples and its stationary distribution."""
    n = len(x)
    kernel = [[math.exp(-(euclidean(x[i], x[j]) ** 2) / (2 * bandwidth**2)) for j in range(n)] for i in range(n)]
    density = [sum(row) for row in kernel]
    kernel = [[kernel[i][j] / (density[i] ** alpha * density[j] ** alpha) for j in range(n)] for i in range(n)]
    degree = [sum(row) for row in kernel]
    return [[kernel[i][j] / degree[i] for j in range(n)] for i in range(n)], [d / sum(degree) for d in degree]


@pytest.mark.parametrize(("bandwidth", "alpha", "time"), [(None, 1.0, 1.0), (1.2, 0.0, 1.0), (0.8, 0.5, 3.0)])
def test_diffusion_map(bandwidth: float | None, alpha: float, time: float) -> None:
    x, components = states(), 3
    markov, stationary = markov_matrix(x, bandwidth or median_distance(x), alpha)
    values, vectors = np.linalg.eig(np.array(markov))  # of the matrix itself, which is not symmetric
    order = np.argsort(-values.real)
    assert values.real[order[0]] == pytest.approx(1.0)
    fast = diffusion_map(x, components, bandwidth=bandwidth, alpha=alpha, time=time)
    for column in range(components):
        index = order[column + 1]  # the first is trivial
        psi = vectors[:, index].real
        psi = psi / math.sqrt(sum(stationary[i] * psi[i] ** 2 for i in range(len(x))))
        psi = psi if psi[np.abs(psi).argmax()] > 0 else -psi
        np.testing.assert_allclose(fast[:, column].numpy(), values.real[index] ** time * psi, atol=1e-8)


def test_distances_between_coordinates_are_diffusion_distances() -> None:
    """Coifman and Lafon: sum_z (p_t(x, z) - p_t(y, z))^2 / pi(z), no eigenvector involved."""
    x, time = states(), 2
    markov, stationary = markov_matrix(x, median_distance(x), 1.0)
    pair = np.linalg.matrix_power(np.array(markov), time)
    coordinates = diffusion_map(x, len(x) - 2, time=time)
    for i, j in [(0, 1), (3, 17), (29, 8)]:
        expected = sum((pair[i, z] - pair[j, z]) ** 2 / stationary[z] for z in range(len(x)))
        assert euclidean(coordinates[i], coordinates[j]) ** 2 == pytest.approx(expected, rel=1e-8)


# --- information ----------------------------------------------------------------------------------------------------


def max_norm(a: Tensor, b: Tensor) -> float:
    return max(abs(float(p) - float(q)) for p, q in zip(a, b, strict=True))


def in_common_units(x: Tensor) -> Tensor:
    """Divided by the root mean square of the max-norm distance to the mean: the one thing added to KSG."""
    mean = x.mean(dim=0)
    return x / math.sqrt(sum(max_norm(row, mean) ** 2 for row in x) / len(x))


def distance_table(x: Tensor) -> Matrix:
    return [[max_norm(a, b) for b in x] for a in x]


def ksg(x: Tensor, y: Tensor, k: int) -> float:
    """KSG equation (8)."""
    n = len(x)
    dx, dy = distance_table(in_common_units(x)), distance_table(in_common_units(y))
    average = 0.0
    for i in range(n):
        others = [j for j in range(n) if j != i]
        epsilon = sorted(max(dx[i][j], dy[i][j]) for j in others)[k - 1]
        n_x = sum(dx[i][j] < epsilon for j in others)
        n_y = sum(dy[i][j] < epsilon for j in others)
        average += (digamma(n_x + 1) + digamma(n_y + 1)) / n
    return float(digamma(k) - average + digamma(n))


def kozachenko_leonenko(x: Tensor, k: int) -> float:
    """KSG equation (20); the unit ball of the maximum norm has log c_d = 0 for diameters."""
    n, d = x.shape
    table = distance_table(x)
    logs = 0.0
    for i in range(n):
        logs += math.log(2 * sorted(table[i][j] for j in range(n) if j != i)[k - 1])
    return float(-digamma(k) + digamma(n) + d * logs / n)


@pytest.mark.parametrize("k", [1, 3, 6])
def test_mutual_information(k: int) -> None:
    stream = residual_stream()
    for y in (stream[1], stream[3], states(seed=9)[:, :2] * 50):
        assert mutual_information(stream[0], y, k) == pytest.approx(ksg(stream[0], y, k), abs=1e-12)


@pytest.mark.parametrize("k", [1, 3, 6])
def test_entropy(k: int) -> None:
    assert entropy(states(), k) == pytest.approx(kozachenko_leonenko(states(), k), abs=1e-12)


@pytest.mark.parametrize("k", [3, 5])
def test_similarity_of_layers(k: int) -> None:
    """S_lm = I(l; m) / sqrt(H_l H_m), with H_l = I(l; l) of the same estimator."""
    layers = [embed(x, "diffusion", 2) for x in residual_stream()]
    fast = similarity_matrix(layers, "information", neighbors=k)
    for i, x in enumerate(layers):
        for j, y in enumerate(layers):
            # (x; x) by the closed value: rounding must not decide which neighbours are strictly nearer.
            own = float(digamma(len(x)) - digamma(k))
            expected = 1.0 if i == j else min(1.0, max(0.0, ksg(x, y, k)) / math.sqrt(own * own))
            assert float(fast[i, j]) == pytest.approx(expected, abs=1e-12)
    assert torch.equal(fast, information_matrix(layers, k))


def test_literal_quotient_of_differential_entropies_is_no_similarity() -> None:
    """Why H is not the differential entropy: the quotient depends on units and loses its root when H < 0."""
    x, y = residual_stream(2)
    literal = ksg(x, y, 3) / math.sqrt(kozachenko_leonenko(x, 3) * kozachenko_leonenko(y, 3))
    rescaled = ksg(x, y, 3) / math.sqrt(kozachenko_leonenko(10 * x, 3) * kozachenko_leonenko(10 * y, 3))
    assert rescaled < 0.7 * literal
    assert kozachenko_leonenko(x / 10, 3) < 0
    assert float(information_matrix([x, y])[0, 1]) == float(information_matrix([8 * x, y / 8])[0, 1])


# --- the controls ---------------------------------------------------------------------------------------------------


def unbiased_hsic(x: Tensor, y: Tensor) -> float:
    """Song et al. (2012): with zeroed diagonals, [tr KL + 1'K1 1'L1 / ((n-1)(n-2)) - 2 1'KL1 / (n-2)] / (n (n-3))."""
    n = len(x)
    k = [[0.0 if i == j else float(x[i] @ x[j]) for j in range(n)] for i in range(n)]
    m = [[0.0 if i == j else float(y[i] @ y[j]) for j in range(n)] for i in range(n)]
    trace = sum(k[i][j] * m[j][i] for i in range(n) for j in range(n))
    sums = sum(map(sum, k)) * sum(map(sum, m))
    cross = sum(k[i][j] * m[j][l] for i in range(n) for j in range(n) for l in range(n))  # noqa: E741
    return (trace + sums / ((n - 1) * (n - 2)) - 2 * cross / (n - 2)) / (n * (n - 3))


def test_cka() -> None:
    stream = [x[:12] + 1.0 for x in residual_stream(3)]
    fast = similarity_matrix(stream, "cka")
    for i, x in enumerate(stream):
        for j, y in enumerate(stream):
            expected = unbiased_hsic(x, y) / math.sqrt(unbiased_hsic(x, x) * unbiased_hsic(y, y))
            assert float(fast[i, j]) == pytest.approx(min(1.0, max(0.0, expected)), abs=1e-10)


def test_cosine_and_angular() -> None:
    stream = residual_stream(3)
    for i, x in enumerate(stream):
        for j, y in enumerate(stream):
            cosines = [
                float(a @ b) / (euclidean(a, torch.zeros(3)) * euclidean(b, torch.zeros(3)))
                for a, b in zip(x, y, strict=True)
            ]
            angles = [1 - math.acos(max(-1.0, min(1.0, c))) / math.pi for c in cosines]
            assert float(similarity_matrix(stream, "cosine")[i, j]) == pytest.approx(sum(cosines) / len(x))
            assert float(similarity_matrix(stream, "angular")[i, j]) == pytest.approx(sum(angles) / len(x), abs=1e-7)
