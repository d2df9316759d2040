"""Mutual information against Gaussians of known information, and the bounds and invariances of the similarity."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import digamma

from hf_compress.numerics import information
from hf_compress.numerics.information import entropy, information_matrix, mutual_information, normalized_information


def normal(samples, features=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(samples, features, generator=generator, dtype=torch.float64)


def correlated(rho, samples=800, seed=0, features=1):
    """x, y standard normal, each feature of y correlated by rho with that of x."""
    x, noise = normal(samples, features, 2 * seed), normal(samples, features, 2 * seed + 1)
    return x, rho * x + math.sqrt(1 - rho**2) * noise


@pytest.mark.parametrize(
    ("rho", "features", "tolerance"),
    [*((rho, 1, 0.025) for rho in (0.0, 0.3, 0.6, 0.9, -0.9)), (0.7, 2, 0.06)],
)
def test_gaussian_information_adds_up_over_features(rho, features, tolerance):
    estimates = [mutual_information(*correlated(rho, seed=seed, features=features)) for seed in range(6)]
    assert sum(estimates) / 6 == pytest.approx(-0.5 * features * math.log(1 - rho**2), abs=tolerance)


@pytest.mark.parametrize("features", [1, 2])
def test_gaussian_and_uniform_entropy(features):
    estimates = [entropy(3.0 * normal(800, features, seed)) for seed in range(20)]
    expected = features * (0.5 * math.log(2 * math.pi * math.e) + math.log(3.0))
    assert sum(estimates) / 20 == pytest.approx(expected, abs=0.05)
    generator = torch.Generator().manual_seed(0)
    cube = [entropy(torch.rand(800, features, generator=generator)) for _ in range(6)]
    assert sum(cube) / 6 == pytest.approx(0.0, abs=0.05 * features)


def test_entropy_depends_on_units_as_it_must():
    x = normal(200, 3)
    assert entropy(10 * x) - entropy(x) == pytest.approx(3 * math.log(10), abs=1e-9)
    assert entropy(1e-3 * x) < 0  # why the similarity cannot divide by it


def test_entropy_of_copies_is_minus_infinity():
    x = normal(50)
    assert entropy(torch.cat([x, x[:1].repeat(2, 1)]), neighbors=3) > -math.inf  # 3 in all: the third neighbour differs
    assert entropy(torch.cat([x, x[:1].repeat(3, 1)]), neighbors=3) == -math.inf


@pytest.mark.parametrize("neighbors", [1, 3, 10])
def test_self_information_is_the_resolution_of_the_estimator(neighbors):
    x = normal(100, 4)
    assert mutual_information(x, x, neighbors) == pytest.approx(digamma(100) - digamma(neighbors), abs=1e-12)


def test_information_of_discrete_variables():
    """Copies only: the plug-in value. Independent bits share nothing, equal bits share log 2."""
    bits = torch.arange(400).reshape(400, 1)
    first, second = (bits % 2).float(), (bits // 2 % 2).float()
    assert mutual_information(first, second) == pytest.approx(0.0, abs=0.02)
    assert mutual_information(first, 1 - first) == pytest.approx(math.log(2), abs=0.01)
    assert normalized_information(first, 1 - first) == 1.0
    assert normalized_information(first, second) == pytest.approx(0.0, abs=0.02)


def test_information_of_a_bit_about_a_continuous_variable():
    """y is uniform on one of two separate intervals, which the bit tells: log 2 nats."""
    bit = (torch.arange(600) % 2).double()[:, None]
    y = bit * 2 + torch.rand(600, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert mutual_information(bit, y) == pytest.approx(math.log(2), abs=0.02)


def test_similarity_rises_with_information():
    values = [normalized_information(*correlated(rho)) for rho in (0.0, 0.3, 0.6, 0.8, 0.9, 0.99, 0.9999, 1.0)]
    assert all(low < high for low, high in itertools.pairwise(values))
    assert values[0] < 0.02
    assert values[-1] == 1.0


@pytest.mark.parametrize("factor", [3.0, -0.1, 1e-20, 1e20, 1e-200, 1e200])
def test_information_is_free_of_units(factor):
    x, y = correlated(0.8, samples=150, features=3)
    assert mutual_information(factor * x, y) == pytest.approx(mutual_information(x, y), abs=1e-12)
    assert normalized_information(factor * x, x) == 1.0  # although rounding makes the distances differ


def test_information_ignores_location_and_the_order_of_samples():
    x, y = correlated(0.8, samples=150, features=2)
    order = torch.randperm(150, generator=torch.Generator().manual_seed(1))
    expected = mutual_information(x, y)
    assert mutual_information(x + 1000.0, y - 5.0) == pytest.approx(expected, abs=1e-12)
    assert mutual_information(x[order], y[order]) == pytest.approx(expected, abs=1e-12)
    assert mutual_information(x, y[order]) < expected - 0.5


def test_copies_up_to_rounding_are_copies():
    bit = (torch.arange(200) % 2).double()[:, None]
    jittered = bit + 1e-14 * normal(200)
    assert mutual_information(jittered, bit + 1e-14 * normal(200, 1, 1)) == mutual_information(bit, bit)


@pytest.mark.parametrize("jitter", [0.0, 1e-13])
def test_constant_block_shares_nothing(jitter):
    constant = 0.1 + jitter * normal(30, 2, 1)
    matrix = information_matrix([constant, normal(30), constant * 3])
    assert torch.equal(matrix, torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 0.0], [1.0, 0.0, 1.0]], dtype=torch.float64))


def test_matrix_is_what_the_pairs_say():
    # Two slabs of rows and blocks of different width.
    blocks = [normal(300, 2), normal(300, 2) + 0.2 * normal(300, 2, 1), normal(300, 5, 2)]
    matrices = information.mutual_information_matrix(blocks, 4), information_matrix(blocks, 4)
    for matrix, pair in zip(matrices, (mutual_information, normalized_information), strict=True):
        assert (matrix.shape, matrix.dtype) == ((3, 3), torch.float64)
        for i, j in itertools.product(range(3), range(3)):
            assert float(matrix[i, j]) == pytest.approx(pair(blocks[i], blocks[j], 4), abs=1e-12)
    assert matrices[1][0, 1] > matrices[1][0, 2] + 0.3


@st.composite
def matched_blocks(draw):
    """Three blocks of the same samples on a coarse grid: ties and copies everywhere, or floats, now and then."""
    size = draw(st.integers(6, 20))
    blocks = []
    for _ in range(3):
        width = draw(st.integers(1, 3))
        entries = draw(st.sampled_from([st.integers(0, 3).map(float), st.floats(-1e3, 1e3, width=32)]))
        values = draw(st.lists(entries, min_size=size * width, max_size=size * width))
        blocks.append(torch.tensor(values, dtype=torch.float64).reshape(size, width))
    return blocks


@settings(max_examples=150, deadline=None, derandomize=True)
@given(blocks=matched_blocks(), neighbors=st.integers(1, 4))
def test_similarity_is_bounded_symmetric_and_one_on_the_diagonal(blocks, neighbors):
    matrix = information_matrix(blocks, neighbors)
    assert torch.equal(matrix, matrix.T)
    assert torch.equal(matrix.diagonal(), torch.ones(3, dtype=torch.float64))
    assert ((matrix >= 0) & (matrix <= 1)).all()  # NaN fails this, too
    assert torch.equal(matrix, information_matrix(blocks, neighbors))
    for x in blocks:
        assert normalized_information(x, x, neighbors) == 1.0


@settings(max_examples=60, deadline=None, derandomize=True)
@given(blocks=matched_blocks(), neighbors=st.integers(1, 4), factor=st.floats(0.01, 100), seed=st.integers(0, 9))
def test_similarity_ignores_units_and_order_with_ties(blocks, neighbors, factor, seed):
    order = torch.randperm(len(blocks[0]), generator=torch.Generator().manual_seed(seed))
    changed = [factor * blocks[0][order], blocks[1][order], -blocks[2][order]]
    expected = information_matrix(blocks, neighbors)
    torch.testing.assert_close(information_matrix(changed, neighbors), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("function", [mutual_information, normalized_information])
def test_refuses_too_few_samples_and_bad_neighbors(function):
    assert math.isfinite(function(normal(5), normal(5, seed=1), 3))
    with pytest.raises(ValueError, match=r"4 samples are too few for 3 neighbors; expected at least 5"):
        function(normal(4), normal(4), 3)
    with pytest.raises(ValueError, match="neighbors is 0; expected a whole number >= 1"):
        function(normal(9), normal(9), 0)
    with pytest.raises(ValueError, match="block 1 has 8 samples and block 0 has 9"):
        function(normal(9), normal(8))
    with pytest.raises(ValueError, match=r"block 1 has NaN or infinite entries in 9 of 9 samples"):
        function(normal(9), normal(9) * math.nan)


def test_entropy_and_matrix_refuse_too_little():
    with pytest.raises(ValueError, match=r"4 samples are too few for 3 neighbors; expected at least 5"):
        entropy(normal(4))
    with pytest.raises(ValueError, match="no blocks were given"):
        information_matrix([])
