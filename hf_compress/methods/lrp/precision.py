"""How many bits each group of weights gets, under one budget."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from hf_compress.methods.lrp.config import LRPConfig
from hf_compress.modules.packed import fill_rows
from hf_compress.numerics.budget import spend_bits, spread_bits
from hf_compress.numerics.rounding import Grids

ErrorCosts = Callable[[str], Tensor]  # asked map by map, so that no two are in memory at once

_STEP_BITS = 16
_CLASS_BITS = 8  # a byte that says how many bits a group has
_ZERO_BITS = 8


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
    weights: Mapping[str, Tensor],
    cost: ErrorCosts,
    budget: float,
) -> dict[str, Tensor]:
    """Numbers of bits of all groups, (outputs, groups of a row), by the path of the linear map.

    Args:
        choices: numbers of bits that there are, rising.
        weights: (outputs, inputs) float32.
        cost: what a squared error of each weight costs, of the weight's shape, by path.
        budget: bits a weight that may be spent on the weights themselves, as many as the fewest at least.
    """
    counts = [len(_groups(config, weight)) for weight in weights.values()]
    if config.allocation == "uniform":
        found = spread_bits(sum(counts), choices, budget)
    else:
        errors = [errors_of_groups(config, choices, weight, cost(path)).cpu() for path, weight in weights.items()]
        found = spend_bits(torch.cat(errors), list(choices), budget)
    parts = zip(weights.items(), found.split(counts), strict=True)
    return {path: part.to(weight.device).view(len(weight), -1) for (path, weight), part in parts}


def _groups(config: LRPConfig, weight: Tensor) -> Tensor:
    """The weights of each group, (groups, group_size); rows filled up with zeros."""
    return fill_rows(weight, config.group_size).reshape(-1, config.group_size)


def errors_of_groups(config: LRPConfig, choices: tuple[int, ...], weight: Tensor, cost: Tensor) -> Tensor:
    """What rounding to nearest costs each group at each choice, (groups, choices) float64."""
    groups, worths = _groups(config, weight), _groups(config, cost)
    errors = []
    for bits in choices:
        grids = Grids.of(groups, groups.new_full((len(groups),), bits, dtype=torch.int32), config.is_symmetric(bits))
        errors.append((worths * (grids.value(grids.round(groups)) - groups).square()).sum(dim=1).double())
    return torch.stack(errors, dim=1)
