"""The preconditioner of conjugate gradients, against the matrix that it stands for, and by the steps that it spares."""

import pytest
import torch

from hf_compress.numerics import masked, preconditioner
from hf_compress.numerics.factor import damped
from hf_compress.numerics.masked import solve_masked
from hf_compress.numerics.preconditioner import Preconditioner
from tests.helpers.grams import GRAMS, low_rank, problem

UNEVEN = low_rank(256, 12, 0.1, 9, torch.linspace(-2, 2, 256).exp())


def of(gram, dtype=torch.float32):
    system = damped(gram.float())
    return system, Preconditioner.of(system.diagonal(), lambda rows: rows @ system, dtype)


def planted(inputs=256, directions=3, size=60.0):
    """A correlation matrix with a few directions that are far larger than the others, and their span."""
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(inputs, directions, generator=generator, dtype=torch.float64))[0]
    gram = torch.eye(inputs, dtype=torch.float64) + size * basis @ basis.T
    scale = gram.diagonal().rsqrt()
    return gram * scale[:, None] * scale


@pytest.mark.parametrize("name", ["low rank", "far apart", "twins"])
def test_it_is_the_inverse_of_the_diagonal_and_the_directions(name):
    """(D + D V R^-1 V^T D)_kk^-1 for the entries k that a row keeps, V = D^-1/2 U and R = c / (L - c)."""
    system, near = of(GRAMS[name])
    assert near.directions.shape[1] > 0
    _, _, kept = problem(8, 256)
    rows = torch.randn(8, 256, generator=torch.Generator().manual_seed(1)) * kept
    out = torch.empty_like(rows)
    near.of_rows(kept.float()).apply(rows, out)
    diagonal, directions = system.diagonal().double(), near.directions.double()
    stood_for = torch.diag(diagonal)
    stood_for += diagonal[:, None] * (directions / near.ratios.double()) @ directions.T * diagonal
    for row, found, mask in zip(rows.double(), out, kept, strict=True):
        expected = torch.zeros(256, dtype=torch.float64)
        expected[mask] = torch.linalg.solve(stood_for[mask][:, mask], row[mask])
        torch.testing.assert_close(found, expected.float(), rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


@pytest.mark.parametrize("name", GRAMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_positive(name, dtype):
    """Else conjugate gradients would go astray."""
    _, near = of(GRAMS[name], dtype)
    _, _, kept = problem(64, 256, share=0.5)
    rows = torch.randn(64, 256, generator=torch.Generator().manual_seed(2)) * kept
    out = torch.empty_like(rows)
    near.of_rows(kept.float()).apply(rows, out)
    assert bool((out[~kept] == 0).all())
    assert bool((torch.linalg.vecdot(rows, out) > 0).all())


def test_directions_are_the_largest():
    gram = planted()
    _, near = of(gram)
    assert near.directions.shape[1] == 3
    values, vectors = torch.linalg.eigh(damped(gram.float()).double())
    found = near.directions.double() / near.inverse.double().sqrt()[:, None]
    assert float(torch.linalg.svdvals(vectors[:, -3:].T @ found).min()) > 0.999
    rest = values[:-3].mean()
    expected = rest / (values[-3:] - rest)
    torch.testing.assert_close(near.ratios.double().sort().values, expected.sort().values, rtol=0.05, atol=0)


@pytest.mark.parametrize("gram", [torch.eye(256), GRAMS["unlike each other"], torch.ones(8, 8)])
def test_without_large_directions_it_is_the_diagonal(gram):
    system, near = of(gram)
    rows = torch.randn(4, len(gram), generator=torch.Generator().manual_seed(3))
    out = torch.empty_like(rows)
    near.of_rows(torch.ones_like(rows)).apply(rows, out)
    assert near.directions.shape[1] == 0
    torch.testing.assert_close(out, rows / system.diagonal())


@pytest.mark.parametrize(
    ("gram", "share"),
    [(UNEVEN, 0.5), (GRAMS["nearly alike, far from 0"], 0.7), (GRAMS["twins"], 0.85)],
    ids=["few directions, uneven scales", "nearly alike", "twins"],
)
def test_it_spares_steps(gram, share, monkeypatch):
    monkeypatch.setattr(masked, "multiplies_bfloat16", lambda: True)
    weight, _, kept = problem(40, 256)
    product, counts = masked._rounded_product, []

    def counted(left, half):
        counts[-1] += len(left) == len(weight)  # those that look for directions have fewer rows
        return product(left, half)

    monkeypatch.setattr(masked, "_rounded_product", counted)
    for most in (0, 64):
        monkeypatch.setattr(preconditioner, "_MOST", most)
        counts.append(0)
        solve_masked(weight, gram, kept)
    assert counts[1] < share * counts[0], counts
