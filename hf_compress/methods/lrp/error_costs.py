"""What a squared error of each weight costs, which bits are given by."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from hf_compress.anatomy.parts import linear_map
from hf_compress.anatomy.stacks import Stack
from hf_compress.calibration.processes import spread
from hf_compress.calibration.sweep import StreamPair, advance, start_pairs, turns
from hf_compress.methods.base.context import CalibrationContext
from hf_compress.methods.lrp.config import LRPConfig
from hf_compress.methods.lrp.fisher import Energies, energies
from hf_compress.methods.lrp.grams import grams_of, in_parts, sharing
from hf_compress.methods.lrp.linears import linears_of
from hf_compress.methods.lrp.precision import ErrorCosts
from hf_compress.methods.lrp.scores import part_of_tokens, scored, some_batches
from hf_compress.modules.sparse import at_ones
from hf_compress.numerics.aside import Aside
from hf_compress.numerics.factor import Factor

WEIGHED = 2  # of so many tokens that weights are solved on, one weighs inputs against each other


def error_costs(
    config: LRPConfig,
    context: CalibrationContext,
    stack: Stack,
    linears: Mapping[str, nn.Module],
    *,
    slopes: Mapping[str, Tensor],
    kept: Mapping[str, Tensor],
    aside: Aside,
) -> Generator[tuple[Iterable[str], ErrorCosts]]:
    """What a squared error of each weight costs, (outputs, inputs), for the path of its linear map.

    In parts: some paths, and what tells the costs of those, while their weights are in memory. To be closed, as scores.

    By Fisher information, E g_i² of the output times the energy of the input, or, where the rounding is compensated,
    what of that later inputs cannot make up for. By relevance, (E |R| / |w|)²: R is w times the slope of the output
    explained, so an error e moves that by e times the slope. By error alone, and where all get the same bits, 1.

    Args:
        slopes: E |R| / |w|, where they are known from the scores.
        kept: bool, which weights stay, of pruned maps: then it is what errors of those cost, (1, kept), and their
            rounding is not compensated.
        aside: where what is known of all maps goes.
    """
    if config.allocation == "relevance" and not slopes:
        for part in scored(config, context, stack, linears, {}, "relevance"):
            yield part.slopes, _of_kept(kept, partial(_squared, linears, part.slopes))
        return
    if config.allocation == "fisher":
        compensated = config.rounding == "compensated" and not kept
        cost = _fisher(config, context, stack, linears, compensated, aside)
    elif config.allocation == "relevance":
        cost = partial(_squared, linears, slopes)
    else:
        cost = partial(_full, linears, 1.0)
    for index in turns(stack, range(len(stack)), "weighing errors"):
        yield linears_of(stack, index, linears), _of_kept(kept, cost)


def _squared(linears: Mapping[str, nn.Module], slopes: Mapping[str, Tensor], path: str) -> Tensor:
    return slopes[path].to(linear_map(linears[path]).device).square()


def _of_kept(kept: Mapping[str, Tensor], cost: ErrorCosts) -> ErrorCosts:
    return lambda path: at_ones(cost(path), kept[path])[None] if path in kept else cost(path)


def _fisher(
    config: LRPConfig,
    context: CalibrationContext,
    stack: Stack,
    linears: Mapping[str, nn.Module],
    compensated: bool,
    aside: Aside,
) -> ErrorCosts:
    batches = some_batches(context, config.tokens)
    drawn = partial(energies, context.model, stack, batches, linears, config.seed, aside, not compensated)
    found = Energies.of(context.journal.tensors("energies", lambda: drawn().state()))
    read = _unexplained(config, context, stack, linears, aside) if compensated else found.read
    used = found.rows.keys() & read.keys()

    def cost(path: str) -> Tensor:
        if path not in used:
            return _full(linears, 0.0, path)
        device = linear_map(linears[path]).device
        return torch.outer(found.of_outputs(path).to(device), read[path].to(device))

    return cost


def _full(linears: Mapping[str, nn.Module], value: float, path: str) -> Tensor:
    """A number for each weight, (outputs, inputs), that takes no memory."""
    weight = linear_map(linears[path]).T
    return torch.tensor(value, dtype=torch.float32, device=weight.device).expand(weight.shape)


def _unexplained(
    config: LRPConfig, context: CalibrationContext, stack: Stack, linears: Mapping[str, nn.Module], aside: Aside
) -> dict[str, Tensor]:
    """Of the inputs of every linear map, block by block, so that there are never more Gram matrices than a block's."""
    pairs = start_pairs(context.model, stack, context.calibration, part_of_tokens(context, config.tokens, WEIGHED))
    found: dict[str, Tensor] = {}
    for index in turns(stack, range(len(stack)), "weighing inputs"):
        name = f"unexplained inputs of block {index}"
        if context.journal.has(name):
            advance(pairs, index)
        own = linears_of(stack, index, linears)
        found |= context.journal.tensors(name, partial(_unexplained_of, stack, index, own, pairs, aside))
    return found


def _unexplained_of(
    stack: Stack, index: int, linears: Mapping[str, nn.Module], pairs: list[StreamPair], aside: Aside
) -> dict[str, Tensor]:
    """The same of the linear maps of one block; the streams are past it then."""
    found: dict[str, Tensor] = {}
    parts = list(in_parts(linears))
    for own in parts:
        grams = grams_of(stack, index, own, pairs, onwards=own is parts[-1])
        together = sharing(grams)
        factors = spread([grams[paths[0]] for paths in together], lambda gram: Factor.of(gram).unexplained)
        for paths, left in zip(together, factors, strict=True):
            found |= dict.fromkeys(paths, aside.put(left))
        del grams
    if not parts:
        advance(pairs, index)
    return found
