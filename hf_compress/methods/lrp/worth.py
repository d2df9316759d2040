"""What a squared error of each weight costs, which bits are given by."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from hf_compress.anatomy.stacks import Stack
from hf_compress.calibration.walks import start_walks
from hf_compress.methods.lrp.fisher import energies
from hf_compress.methods.lrp.grams import advance, grams_of
from hf_compress.methods.lrp.scores import score, some_batches, weights_of
from hf_compress.numerics.rounding import unexplained
from hf_compress.workbench import Workbench

if TYPE_CHECKING:
    from hf_compress.methods.lrp.config import LRPConfig


def worth_of_errors(
    config: LRPConfig,
    bench: Workbench,
    stack: Stack,
    linears: Mapping[str, nn.Module],
    slopes: Mapping[str, Tensor],
    compensated: bool,
) -> dict[str, Tensor]:
    """What a squared error of each weight costs, (outputs, inputs), by the path of the linear map.

    By Fisher information, E g_i² of the output times the energy of the input, or, where the rounding is compensated,
    what of that later inputs cannot make up for. By relevance, (E |R| / |w|)²: R is w times the slope of the output
    explained, so an error e moves that by e times the slope. By error alone, 1.

    Args:
        slopes: E |R| / |w|, where they are known from the scores.
        compensated: whether the rounding is.
    """
    if config.allocation == "fisher":
        found = energies(bench.model, stack, some_batches(bench, config.tokens), linears, config.seed)
        read = _unexplained(config, bench, stack, linears) if compensated else found.read
        used = found.rows.keys() & read.keys()
        return {
            path: found.of_outputs(path)[:, None] * read[path] if path in used else torch.zeros_like(weight)
            for path, weight in weights_of(linears).items()
        }
    if config.allocation == "relevance":
        slopes = slopes or score(config, bench, linears, {}, "relevance").slopes
        return {path: slope.square() for path, slope in slopes.items()}
    return {path: torch.ones_like(weight) for path, weight in weights_of(linears).items()}


def _unexplained(
    config: LRPConfig, bench: Workbench, stack: Stack, linears: Mapping[str, nn.Module]
) -> dict[str, Tensor]:
    """Of the inputs of every linear map, block by block, so that there are never more Gram matrices than a block's."""
    walks = start_walks(bench.model, stack, bench.calibration, config.tokens)
    found: dict[str, Tensor] = {}
    for index in range(len(stack)):
        own = {path: module for path, module in linears.items() if path.startswith(f"{stack.path}.{index}.")}
        found |= {path: unexplained(gram) for path, gram in grams_of(stack, index, own, walks).items()}
        advance(walks, index)
    return found
