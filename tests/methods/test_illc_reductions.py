"""Which units stay, by what is left over without the others: by mixtures of the outputs where these are many."""

from statistics import mean
from types import SimpleNamespace

import torch

from hf_compress.methods.base.units import UnitStatistics
from hf_compress.methods.illc.config import ILLCConfig
from hf_compress.methods.illc.reductions import REDUCTIONS
from hf_compress.numerics.elimination import eliminate
from tests.helpers.regression import statistics

ROWS, UNITS, KEPT = 300, 64, 40


def units_and_outputs(outputs, seed):
    """Units that explain each other in part, and outputs of which some are much larger than others."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(ROWS, UNITS, generator=generator) @ torch.randn(UNITS, UNITS, generator=generator) + 1
    weight = torch.randn(UNITS, outputs, generator=generator) * torch.linspace(-0.7, 0, UNITS).exp()[:, None]
    y = x @ weight + torch.randn(ROWS, outputs, generator=generator)
    return x, y * torch.linspace(-2, 1, outputs).exp()


def left_over(x, y, kept):
    """The squared error of least squares on some units."""
    columns = torch.cat([x[:, kept], torch.ones(ROWS, 1)], dim=1).double()
    return float((columns @ torch.linalg.lstsq(columns, y.double()).solution - y).square().sum())


def chosen(x, y):
    """What is kept as ILLC chooses, and as by all outputs."""
    half = slice(ROWS // 2), slice(ROWS // 2, ROWS)
    sums = UnitStatistics(*(statistics(x[rows], y[rows]) for rows in half), x[:1])
    units = SimpleNamespace(biased=True, size=1)
    reduction = REDUCTIONS["elimination"](ILLCConfig(ratio=0.5), units, sums, KEPT)
    return reduction.kept, eliminate(sums, KEPT)


def test_mixtures_of_many_outputs_choose_as_well_as_all_of_them():
    """Other units, with which now less and now more is left over."""
    found, any_others = [], []
    for seed in range(6):
        x, y = units_and_outputs(1500, seed)
        by_mixtures, by_all = chosen(x, y)
        least = left_over(x, y, by_all)
        assert not torch.equal(by_mixtures, by_all)
        found.append(left_over(x, y, by_mixtures) / least)
        some = torch.randperm(UNITS, generator=torch.Generator().manual_seed(seed))[:KEPT]
        any_others.append(left_over(x, y, some) / least)
    assert mean(found) < 1.02
    assert min(any_others) > 1.5


def test_of_fewer_outputs_all_are_asked():
    found, best = chosen(*units_and_outputs(1000, 0))
    assert torch.equal(found, best)
