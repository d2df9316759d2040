"""Ways to get by with fewer hidden units: which units are kept, or which become one."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hf_compress.calibration.processes import from_one
from hf_compress.calibration.together import Together
from hf_compress.errors import CalibrationError
from hf_compress.methods.base.ridge import for_own_outputs, mixtures
from hf_compress.methods.base.units import Reduction, Units, UnitStatistics, best
from hf_compress.methods.illc.config import ILLCConfig
from hf_compress.numerics.clustering import cluster
from hf_compress.numerics.elimination import eliminate
from hf_compress.numerics.registry import Registry

_MIXTURES = 512  # of the outputs, that units are chosen by
_ROUNDING = 1e-5  # of the largest activation: what the same sample may differ by in another place of a batch


REDUCTIONS: Registry[Callable[[ILLCConfig, Units, UnitStatistics, int], Reduction]] = Registry("reduction")
"""Name -> `f(config, units, statistics, count) -> Reduction` to `count` units."""


@REDUCTIONS.register("elimination")
def _elimination(config: ILLCConfig, units: Units, statistics: UnitStatistics, count: int) -> Reduction:
    """One unit after another goes, each time the one that the rest can stand in for best.

    Where outputs are many, so it is in random mixtures of them: with n of these the error that a unit's going costs is
    known to within sqrt(2 / n) of itself.
    """
    together = Together()
    mix = mixtures(statistics.fitted.outputs, _MIXTURES)
    own = for_own_outputs(statistics if mix is None else statistics.mix(mix), together)
    return Reduction(kept=eliminate(own, count, units.biased or config.bias, units.size, together))


@REDUCTIONS.register("average")
def _average(config: ILLCConfig, units: Units, statistics: UnitStatistics, count: int) -> Reduction:
    """Clusters of units with like activations become one unit, which reads their mean: the paper's."""
    _check_rows(units, statistics.rows, count)
    return Reduction(labels=from_one(lambda: cluster(statistics.rows.T, count, config.clustering, config.seed)))


@REDUCTIONS.register("representative")
def _representative(config: ILLCConfig, units: Units, statistics: UnitStatistics, count: int) -> Reduction:
    """Clusters of units by what they contribute; each is stood for by the member that contributes most."""
    _check_rows(units, statistics.rows, count)
    shares = (statistics.rows - statistics.rows.mean(dim=0)) * units.writes.norm(dim=1).cpu()
    labels = from_one(lambda: cluster(shares.T, count, config.clustering, config.seed))
    order = shares.var(dim=0).argsort()
    order = order[labels[order].argsort(stable=True)]  # by cluster, the largest of each the last
    return Reduction(labels, order[torch.bincount(labels).cumsum(0) - 1])


@REDUCTIONS.register("magnitude")
def _magnitude(config: ILLCConfig, units: Units, statistics: UnitStatistics, count: int) -> Reduction:
    """Keep the units whose output weights are the largest."""
    return best(units, units.writes.square().sum(dim=1), count)


@REDUCTIONS.register("variance")
def _variance(config: ILLCConfig, units: Units, statistics: UnitStatistics, count: int) -> Reduction:
    """Keep the units whose contribution varies most, Var(h_j) · |W_j|² (FLAP, arXiv 2312.11983, equation 5)."""
    variance = statistics.all.variances
    return best(units, variance * units.writes.double().square().sum(dim=1).to(variance), count)


@REDUCTIONS.register("random")
def _random(config: ILLCConfig, units: Units, statistics: UnitStatistics, count: int) -> Reduction:
    """Keep any."""
    generator = torch.Generator().manual_seed(config.seed + units.index)
    return best(units, torch.rand(len(units.writes), dtype=torch.float32, generator=generator), count)


def _check_rows(units: Units, rows: Tensor, count: int) -> None:
    """Raise where activations (tokens, width) tell no clusters of units apart."""
    if len(rows) < count:
        raise CalibrationError(
            f"{len(rows)} calibration tokens (or samples) cannot tell {count} clusters of hidden units of {units.name} "
            "apart: give more of them, or raise cluster_tokens"
        )
    if bool((rows - rows[0]).abs().max() <= _ROUNDING * rows.abs().max()):
        raise CalibrationError(
            f"no hidden unit of {units.name} varies over the calibration data: give samples that differ, or keep more "
            "units if the layers below were narrowed to a few"
        )
