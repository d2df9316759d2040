"""Gram matrices such as activations have, and worse ones, and weights of which some are kept."""

import torch


def problem(outputs=5, inputs=12, rows=40, share=0.5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(inputs, inputs, generator=generator)
    x = torch.randn(rows, inputs, generator=generator) @ mix
    weight = torch.randn(outputs, inputs, generator=generator)
    kept = torch.rand(outputs, inputs, generator=generator) < share
    kept[:, 0] = True
    return weight, (x.T @ x).double(), kept


def low_rank(inputs, rank, noise, seed, scales=None):
    """Σ x xᵀ of what `rank` sources and some noise make up, as activations are."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(3 * inputs, rank, generator=generator) @ torch.randn(rank, inputs, generator=generator)
    rows = rows / rank**0.5 + noise * torch.randn(3 * inputs, inputs, generator=generator)
    rows = rows if scales is None else rows * scales
    return rows.T.double() @ rows.double()


def spread_out(inputs):
    """Scales of inputs as far apart as those of language models: one of them a thousand times the others."""
    scales = torch.linspace(-2, 2, inputs).exp()
    scales[3] = 1000
    return scales


GRAMS = {
    "low rank": low_rank(256, 32, 0.3, 0),
    "lower noise": low_rank(256, 64, 0.1, 1),
    "hardly any noise": low_rank(256, 48, 0.03, 2),
    "far apart": low_rank(256, 48, 0.3, 3, spread_out(256)),
    "some always 0": low_rank(256, 48, 0.3, 4, (torch.arange(256) % 5 > 0).float()),
    "twins": low_rank(128, 48, 0.3, 5).repeat(2, 2),
    "unlike each other": low_rank(256, 1, 0.0, 6) * torch.eye(256),
    "nearly alike": low_rank(256, 1, 0.01, 7, torch.rand(256, generator=torch.Generator().manual_seed(7)) + 0.5),
    "nearly alike, far from 0": low_rank(256, 1, 0.0, 8).abs() + low_rank(256, 48, 0.02, 8) / 100,
}
