"""Embeddings: what they keep, what they do not depend on, and what they refuse."""

import math

import numpy as np
import pytest
import torch

from hf_compress.numerics.manifold import MANIFOLDS, diffusion_map, embed, principal_components
from hf_compress.numerics.registry import Registry

estimated = pytest.mark.parametrize("manifold", ["diffusion", "pca"])


def gaussian(samples=40, features=6, seed=0):
    """Anisotropic, so that the leading eigenvalues are well apart."""
    generator = torch.Generator().manual_seed(seed)
    spread = 2.0 ** -torch.arange(features, dtype=torch.float64)
    return torch.randn(samples, features, generator=generator, dtype=torch.float64) * spread


def spearman(a, b):
    ranks = [np.argsort(np.argsort(v.numpy())) for v in (a, b)]
    return float(np.corrcoef(*ranks)[0, 1])


@estimated
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_shape_and_dtype_and_twice_the_same_is_bitwise_the_same(manifold, dtype):
    embedded = embed(gaussian().to(dtype), manifold, 3)
    assert (embedded.shape, embedded.dtype) == ((40, 3), torch.float64)
    assert torch.isfinite(embedded).all()
    assert torch.equal(embed(gaussian().to(dtype), manifold, 3), embedded)


def test_none_keeps_the_samples():
    x = gaussian().float()
    assert torch.equal(embed(x, "none", 3), x.double())


@estimated
def test_deciding_entry_is_positive_also_for_mirrored_samples(manifold):
    for x in (gaussian(), -gaussian()):
        embedded = embed(x, manifold, 4)
        largest = embedded.gather(0, embedded.abs().argmax(dim=0, keepdim=True))
        assert (largest > 0).all()


@estimated
def test_sign_of_mirror_images_does_not_hang_on_rounding(manifold):
    """The entries of largest size come in pairs of opposite sign here: the first sample must decide, every time."""
    half = gaussian(10)
    for seed in range(10):
        rotation = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(seed)).double()).Q
        first = embed(torch.cat([half, -half]) @ rotation, manifold, 1)[:, 0]
        assert first[:10][first[:10].abs().argmax()] > 0


def test_diffusion_ignores_location_rotation_and_scale():
    x = gaussian()
    rotation = torch.linalg.qr(gaussian(6, 6, seed=1) * 2.0 ** torch.arange(6)).Q
    torch.testing.assert_close(embed(7.5 * x @ rotation + 100.0, components=3), embed(x, components=3))


def test_diffusion_follows_the_order_of_the_samples():
    x, order = gaussian(), torch.randperm(40, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(embed(x[order], components=3), embed(x, components=3)[order])


def test_diffusion_recovers_the_parameter_of_a_curve_where_pca_cannot():
    angle = torch.linspace(0, 1.7 * torch.pi, 80, dtype=torch.float64)
    spiral = torch.stack([(1 + angle) * angle.cos(), (1 + angle) * angle.sin()], dim=1)
    unrolled = abs(spearman(diffusion_map(spiral, 1, bandwidth=0.6)[:, 0], angle))
    flat = abs(spearman(principal_components(spiral, 1)[:, 0], angle))
    assert unrolled > 0.999
    assert flat < 0.9


def test_alpha_one_removes_the_sampling_density():
    """On a segment the first coordinate is cos(pi u) whatever the density (Laplace-Beltrami), at alpha 1 only."""
    quantile = torch.linspace(0, 1, 300, dtype=torch.float64)
    position = -torch.log(1 - quantile * (1 - math.exp(-4))) / 4  # density falls as exp(-4 u)
    expected = (torch.cos(torch.pi * position) + 1) / 2

    def deviation(alpha):
        first = diffusion_map(position[:, None], 1, bandwidth=0.05, alpha=alpha)[:, 0]
        return float(((first - first[-1]) / (first[0] - first[-1]) - expected).abs().max())

    assert deviation(1.0) < 0.02
    assert deviation(0.0) > 0.3


def test_time_damps_the_fine_structure():
    once, thrice = (diffusion_map(gaussian(), 4, time=time) for time in (1.0, 3.0))
    eigenvalues = (thrice / once).mean(dim=0).sqrt()
    torch.testing.assert_close(thrice, once * eigenvalues**2)
    assert (eigenvalues.diff() < 0).all()
    assert eigenvalues[0] < 1


def test_outlier_does_not_bring_the_trivial_eigenvector_back():
    """An isolated sample doubles the eigenvalue 1; the second eigenvector must still be orthogonal to the constant."""
    x = torch.cat([gaussian(), torch.full((1, 6), 1e3, dtype=torch.float64)])
    first = embed(x, components=2)[:, 0]
    assert first.abs().argmax() == 40
    assert first[:40].max() < 0  # constant on the rest, on the other side of 0
    torch.testing.assert_close(first[:40], first[:1].expand(40))


def test_bandwidth_comes_from_samples_that_differ():
    """More than half of the distances are 0 here: their plain median would be, too."""
    x = torch.randn(36, 300, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x[:30] = x[0]  # wide, so that the Gram form leaves rounding in place of their distance, 0
    distances = np.array([float((a - b).norm()) for i, a in enumerate(x) for b in x[:i]])
    median = float(np.median(distances[distances > 0]))
    assert np.median(distances) == 0.0
    torch.testing.assert_close(embed(x, components=2), embed(x, components=2, bandwidth=median))


def test_pca_is_the_singular_value_decomposition():
    x = gaussian()
    u, s, _ = np.linalg.svd((x - x.mean(dim=0)).numpy(), full_matrices=False)
    np.testing.assert_allclose(embed(x, "pca", 3).abs().numpy(), np.abs(u[:, :3] * s[:3]), atol=1e-9)


@estimated
def test_needs_two_samples_more_than_components(manifold):
    assert embed(gaussian(6), manifold, 4).shape == (6, 4)
    with pytest.raises(ValueError, match=r"5 samples cannot carry 4 components; expected at least 6 samples"):
        embed(gaussian(5), manifold, 4)


@pytest.mark.parametrize("manifold", ["diffusion", "pca", "none"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_refuses_entries_that_are_not_finite(manifold, value):
    x = gaussian()
    x[3, 1] = x[7, 0] = value
    with pytest.raises(ValueError, match=r"NaN or infinite entries in 2 of 40 samples \(first: sample 3\)"):
        embed(x, manifold, 2)


@estimated
def test_refuses_samples_that_are_identical_or_differ_by_rounding(manifold):
    with pytest.raises(ValueError, match="all 10 samples are identical"):
        embed(torch.full((10, 3), 0.1), manifold, 2)
    x = 5.0 + 1e-13 * gaussian()
    assert not (x == x[0]).all()
    with pytest.raises(ValueError, match="all 40 samples are identical up to rounding"):
        embed(x, manifold, 2)
    assert embed(5.0 + 1e-6 * gaussian(), manifold, 2).shape == (40, 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bandwidth": 0.0}, r"bandwidth is 0.0; expected a finite number > 0"),
        ({"bandwidth": float("nan")}, r"bandwidth is nan"),
        ({"bandwidth": 1e-6}, r"bandwidth is 1e-06, so small that no two samples are neighbours \(the median"),
        ({"time": -1.0}, r"time is -1.0; expected a finite alpha and a finite time >= 0"),
        ({"alpha": float("inf")}, r"alpha is inf"),
        ({"manifold": "pca", "bandwidth": 1.0}, "bandwidth"),
    ],
)
def test_refuses_options_out_of_range_or_of_another_manifold(options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        embed(gaussian(), **{"manifold": "diffusion", "components": 2} | options)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ((gaussian(), "umap"), ValueError, r"unknown manifold 'umap'; expected one of 'diffusion', 'none', 'pca'"),
        ((gaussian(), "pca", 0), ValueError, "components is 0; expected a whole number >= 1"),
        ((gaussian(), "diffusion", 2.0), TypeError, r"components is 2\.0"),
        ((gaussian(), "pca", 7), ValueError, "components is 7 but x has 6 features"),
        ((gaussian()[:, 0],), ValueError, r"x has shape \[40\]; expected a non-empty \[N, D\]"),
        ((np.zeros((9, 9)),), TypeError, r"x is ndarray; expected a real torch.Tensor"),
    ],
)
def test_refuses_wrong_arguments(given, error, message):
    with pytest.raises(error, match=message):
        embed(*given)


def test_registry_refuses_a_name_twice_and_keeps_the_first():
    registry = Registry("number")
    registry.register("one")(1)
    with pytest.raises(ValueError, match="number 'one' is already registered as 1"):
        registry.register("one")(2)
    assert dict(registry) == {"one": 1}
    with pytest.raises(ValueError, match="manifold 'pca' is already registered"):
        MANIFOLDS.register("pca")(principal_components)
