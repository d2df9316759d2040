"""How many bits each group of weights gets, under one budget."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from functools import partial

import torch
from torch import Tensor

from hf_compress.calibration.memory import working_memory
from hf_compress.calibration.processes import from_one, spread
from hf_compress.methods.lrp.config import LRPConfig
from hf_compress.methods.lrp.linears import Weights
from hf_compress.modules.packed import fill_rows, filled
from hf_compress.numerics.aside import Aside
from hf_compress.numerics.budget import spend_bits, spread_bits
from hf_compress.numerics.rounding import Grids, limits

ErrorCosts = Callable[[str], Tensor]  # asked map by map, so that no two are in memory at once
CostParts = Iterable[tuple[Iterable[str], ErrorCosts]]  # of some maps, whose weights are in memory meanwhile

_STEP_BITS = 16
_CLASS_BITS = 8  # a byte that says how many bits a group has
_ZERO_BITS = 8
_CHUNK = 2**17  # weights whose errors are looked at together, so that they stay in the cache


def overhead(config: LRPConfig) -> float:
    """Bits a weight that go to what a group stores besides its weights."""
    return stored_bits(config, 0) / config.group_size


def stored_bits(config: LRPConfig, bits: int) -> int:
    """Bits that a group takes whose weights have so many, with all that is stored."""
    zero = 0 if config.is_symmetric(bits) else _ZERO_BITS
    return bits * config.group_size + _STEP_BITS + _CLASS_BITS + zero


def bits_of_groups(
    config: LRPConfig,
    choices: tuple[int, ...],
    weights: Weights,
    costs: CostParts,
    budget: float,
    aside: Aside,
) -> dict[str, Tensor]:
    """Numbers of bits of all groups, (outputs, groups of a row) uint8, by the path of the linear map; put aside.

    Args:
        choices: numbers of bits that there are, rising.
        weights: of the linear maps.
        costs: paths, and what a squared error of each weight costs, of the weight's shape, by path.
        budget: bits a weight that may be spent on the weights themselves, as many as the fewest at least.
        aside: where all that there is of each group goes.
    """
    shapes = {path: _groups_in(config, *weights.shape(path)) for path in weights}
    counts = [math.prod(shape) for shape in shapes.values()]
    if config.allocation == "uniform":
        found = spread_bits(sum(counts), choices, budget, aside)
    else:
        errors = working_memory().aside().empty((sum(counts), len(choices)), torch.float32)
        own = dict(zip(weights, errors.split(counts), strict=True))
        for path, values in all_errors(config, choices, weights, costs):
            own[path].copy_(values)
        found = from_one(lambda: spend_bits(errors, list(choices), budget, aside))
    parts = zip(shapes.items(), found.split(counts), strict=True)
    return {path: part.view(shape) for (path, shape), part in parts}


def all_errors(
    config: LRPConfig, choices: tuple[int, ...], weights: Weights, costs: CostParts
) -> Iterator[tuple[str, Tensor]]:
    """`errors_of_groups` of linear maps, with their paths, one map at a time."""
    for paths, cost in costs:
        own = list(paths)
        yield from zip(own, spread(own, partial(_errors_of, config, choices, weights, cost)), strict=True)


def _errors_of(config: LRPConfig, choices: tuple[int, ...], weights: Weights, cost: ErrorCosts, path: str) -> Tensor:
    return errors_of_groups(config, choices, weights[path], cost(path))


def _groups_in(config: LRPConfig, outputs: int, inputs: int) -> tuple[int, int]:
    """Outputs, and groups of a row."""
    return outputs, filled(inputs, config.group_size) // config.group_size


def _groups(config: LRPConfig, weight: Tensor) -> Tensor:
    """The weights of each group, (groups, group_size); rows filled up with zeros."""
    return fill_rows(weight, config.group_size).reshape(-1, config.group_size)


def errors_of_groups(config: LRPConfig, choices: tuple[int, ...], weight: Tensor, cost: Tensor) -> Tensor:
    """What rounding to nearest costs each group at each choice, (groups, choices) float32."""
    groups, worths = _groups(config, weight), _groups(config, cost)
    errors = torch.empty(len(groups), len(choices), dtype=torch.float32, device=groups.device)
    size = max(1, _CHUNK // config.group_size)
    for own, worth, out in zip(groups.split(size), worths.split(size), errors.split(size), strict=True):
        reach = limits(own)
        for column, bits in enumerate(choices):
            grids = Grids.between(*reach, torch.full_like(reach[0], bits, dtype=torch.int32), config.is_symmetric(bits))
            gaps = grids.nearest(own).sub_(own).square_()
            torch.linalg.vecdot(gaps, worth, out=out[:, column])
    return errors
