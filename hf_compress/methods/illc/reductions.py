"""Ways to get by with fewer hidden units: which units are kept, or which become one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_compress.anatomy.stacks import Stack
from hf_compress.drafts import Affine, merge_units, narrow_ffn
from hf_compress.errors import CalibrationError
from hf_compress.methods.illc.units import Units, UnitStatistics
from hf_compress.numerics.clustering import cluster
from hf_compress.numerics.elimination import eliminate
from hf_compress.numerics.registry import Registry
from hf_compress.plan import Plan

if TYPE_CHECKING:
    from hf_compress.methods.illc.config import ILLCConfig


_ROUNDING = 1e-5  # of the largest activation: what the same sample may differ by in another place of a batch


@dataclass(frozen=True)
class Reduction:
    """Hidden units kept, clusters of them, or both: then each cluster is stood for by one unit of its own.

    Attributes:
        labels: cluster of each unit, (width).
        kept: units, a number for each new one, in the order of the clusters if there are any.
    """

    labels: Tensor | None = None
    kept: Tensor | None = None

    def draft(self, model: PreTrainedModel, stack: Stack, index: int, writes: Affine | None = None) -> Plan:
        """The plan that narrows the FFN of a block so, with another output projection if one is given."""
        if self.kept is not None:
            return narrow_ffn(model, stack, index, self.kept, writes)
        assert self.labels is not None
        return merge_units(model, stack, index, self.labels, writes)

    def columns(self, writes: Tensor) -> Tensor:
        """What is left of an output projection (width, hidden) if nothing is solved for: the columns of the units kept,
        or the sums over clusters."""
        if self.labels is None:
            assert self.kept is not None
            return writes[self.kept.to(writes.device)]
        labels = self.labels.to(writes.device)
        return writes.new_zeros(int(labels.max()) + 1, writes.shape[1]).index_add_(0, labels, writes)


REDUCTIONS: Registry[Callable[[ILLCConfig, Units, UnitStatistics, int], Reduction]] = Registry("reduction")
"""Name -> `f(config, units, statistics, count) -> Reduction` to `count` units."""


@REDUCTIONS.register("elimination")
def _elimination(config: ILLCConfig, units: Units, statistics: UnitStatistics, count: int) -> Reduction:
    """One unit after another goes, each time the one that the rest can stand in for best."""
    return Reduction(kept=eliminate(statistics.all, count, units.biased or config.bias))


@REDUCTIONS.register("average")
def _average(config: ILLCConfig, units: Units, statistics: UnitStatistics, count: int) -> Reduction:
    """Clusters of units with like activations become one unit, which reads their mean: the paper's."""
    _check_rows(units, statistics.rows, count)
    return Reduction(labels=cluster(statistics.rows.T, count, config.clustering, config.seed))


@REDUCTIONS.register("representative")
def _representative(config: ILLCConfig, units: Units, statistics: UnitStatistics, count: int) -> Reduction:
    """Clusters of units by what they contribute; each is stood for by the member that contributes most."""
    _check_rows(units, statistics.rows, count)
    shares = (statistics.rows - statistics.rows.mean(dim=0)) * units.writes.norm(dim=1).cpu()
    labels = cluster(shares.T, count, config.clustering, config.seed)
    order = shares.var(dim=0).argsort()
    order = order[labels[order].argsort(stable=True)]  # by cluster, the largest of each the last
    return Reduction(labels, order[torch.bincount(labels).cumsum(0) - 1])


@REDUCTIONS.register("magnitude")
def _magnitude(config: ILLCConfig, units: Units, statistics: UnitStatistics, count: int) -> Reduction:
    """Keep the units whose output weights are the largest."""
    return _best(units.writes.norm(dim=1), count)


@REDUCTIONS.register("variance")
def _variance(config: ILLCConfig, units: Units, statistics: UnitStatistics, count: int) -> Reduction:
    """Keep the units whose contribution varies most, Var(h_j) · |W_j|² (FLAP, arXiv 2312.11983, equation 5)."""
    sums = statistics.all
    variance = sums.gram.diagonal() / sums.count - (sums.x_sum / sums.count).square()
    return _best(variance * units.writes.double().square().sum(dim=1).to(variance), count)


@REDUCTIONS.register("random")
def _random(config: ILLCConfig, units: Units, statistics: UnitStatistics, count: int) -> Reduction:
    """Keep any."""
    generator = torch.Generator().manual_seed(config.seed + units.index)
    return _best(torch.rand(len(units.writes), generator=generator), count)


def _best(scores: Tensor, count: int) -> Reduction:
    return Reduction(kept=scores.topk(count).indices.sort().values.cpu())


def _check_rows(units: Units, rows: Tensor, count: int) -> None:
    """Raise where activations (tokens, width) tell no clusters of units apart."""
    if len(rows) < count:
        raise CalibrationError(
            f"{len(rows)} calibration tokens (or samples) cannot tell {count} clusters of hidden units of {units.name} "
            "apart: give more of them, or raise cluster_tokens"
        )
    if bool((rows - rows[0]).abs().max() <= _ROUNDING * rows.abs().max()):
        raise CalibrationError(
            f"no hidden unit of the FFN of {units.name} varies over the calibration data; give samples that differ"
        )
