"""Least squares over the weights kept, against a solution of each row's own system."""

import pytest
import torch

from hf_compress.numerics.masked import solve_masked


def problem(outputs=5, inputs=12, rows=40, share=0.5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(inputs, inputs, generator=generator)
    x = torch.randn(rows, inputs, generator=generator) @ mix
    weight = torch.randn(outputs, inputs, generator=generator)
    kept = torch.rand(outputs, inputs, generator=generator) < share
    kept[:, 0] = True
    return weight, (x.T @ x).double(), kept


def by_rows(weight, gram, kept):
    """(G + λI)_kk v = ((G + λI) w)_k for each row on its own."""
    system = gram + 0.01 * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
    found = torch.zeros_like(weight, dtype=torch.float64)
    for row, (own, mask) in enumerate(zip(weight.double(), kept, strict=True)):
        found[row, mask] = torch.linalg.solve(system[mask][:, mask], (system @ own)[mask])
    return found.float()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("rows", [6, 40])
def test_it_is_the_solution_of_every_row(rows, share, seed):
    weight, gram, kept = problem(rows=rows, share=share, seed=seed)
    found = solve_masked(weight, gram, kept)
    assert bool((found[~kept] == 0).all())
    torch.testing.assert_close(found, by_rows(weight, gram, kept), rtol=5e-3, atol=5e-3)


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
