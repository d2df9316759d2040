"""Least squares over the weights kept, against a solution of each row's own system."""

import pytest
import torch

from hf_compress.numerics import masked
from hf_compress.numerics.masked import solve_masked
from tests.helpers.grams import GRAMS, problem


def by_rows(weight, gram, kept):
    """(G + λI)_kk v = ((G + λI) w)_k for each row on its own."""
    system = gram + 0.01 * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
    found = torch.zeros_like(weight, dtype=torch.float64)
    for row, (own, mask) in enumerate(zip(weight.double(), kept, strict=True)):
        found[row, mask] = torch.linalg.solve(system[mask][:, mask], (system @ own)[mask])
    return found.float()


def error(weight, found, gram):
    """tr (V − W) (G + λI) (V − W)ᵀ."""
    gap = (found - weight).double()
    return float((gap @ (gram + 0.01 * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)) * gap).sum())


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("rows", [6, 40])
def test_it_is_the_solution_of_every_row(rows, share, seed, monkeypatch):
    """In float32, where nothing stops it early; else its error is within 1% of the least."""
    weight, gram, kept = problem(rows=rows, share=share, seed=seed)
    best = by_rows(weight, gram, kept)
    found = solve_masked(weight, gram, kept)
    assert bool((found[~kept] == 0).all())
    assert error(weight, found, gram) <= 1.01 * error(weight, best, gram)
    monkeypatch.setattr(masked, "_CLOSE", 0)
    monkeypatch.setattr(masked, "multiplies_bfloat16", lambda: False)
    torch.testing.assert_close(solve_masked(weight, gram, kept), best, rtol=5e-3, atol=5e-3)


ALIKE = ("nearly alike", "nearly alike, far from 0")  # plain float32 ends 1.2% above the least there, too


@pytest.mark.parametrize("name", GRAMS)
@pytest.mark.parametrize("share", [0.3, 0.5, 0.7])
@pytest.mark.parametrize("products", ["float32", "bfloat16", "of no use"])
def test_the_error_is_near_the_least(share, name, products, monkeypatch):
    """Where the processor has no products of bfloat16, where it has, and where they lead nowhere."""
    monkeypatch.setattr(masked, "multiplies_bfloat16", lambda: products != "float32")
    if products == "of no use":
        monkeypatch.setattr(masked, "_rounded_product", lambda left, half: torch.zeros_like(left))
    gram = GRAMS[name]
    weight, _, kept = problem(24, 256, share=share)
    best = error(weight, by_rows(weight, gram, kept), gram)
    assert error(weight, solve_masked(weight, gram, kept), gram) <= (1.02 if name in ALIKE else 1.01) * best


def test_rows_are_solved_in_parts(monkeypatch):
    """Which are as well solved as all at once; of a weight in half precision, and a gram in single."""
    gram = GRAMS["low rank"].float()
    weight, _, kept = problem(24, 256)
    before = weight.clone()
    monkeypatch.setattr(masked, "_CHUNK", 5 * 256)
    monkeypatch.setattr(masked, "_LEAST", 1)
    found = solve_masked(weight, gram, kept)
    assert error(weight, found, gram) <= 1.01 * error(weight, by_rows(weight, gram, kept), gram)
    assert torch.equal(weight, before)
    half = solve_masked(weight.bfloat16(), gram, kept)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, solve_masked(weight.bfloat16().float(), gram, kept), rtol=0, atol=0)


def test_the_unit_of_the_inputs_does_not_matter():
    weight, gram, kept = problem()
    torch.testing.assert_close(solve_masked(weight, 1e8 * gram, kept), solve_masked(weight, gram, kept))


def test_where_nothing_goes_nothing_changes():
    weight, gram, kept = problem()
    assert torch.equal(solve_masked(weight, gram, torch.ones_like(kept)), weight)
    torch.testing.assert_close(solve_masked(weight, 0 * gram, kept), weight * kept)


def test_what_does_not_fit():
    weight, gram, kept = problem()
    with pytest.raises(ValueError, match=r"a weight \(5, 12\) needs a gram \(12, 12\)"):
        solve_masked(weight, gram[:3], kept)
    with pytest.raises(ValueError, match="kept of its shape"):
        solve_masked(weight, gram, kept[:, :3])
    gram[0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaN or infinity"):
        solve_masked(weight, gram, kept)
