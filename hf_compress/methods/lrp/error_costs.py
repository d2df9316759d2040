"""What a squared error of each weight costs, which bits are given by."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from hf_compress.anatomy.parts import linear_map
from hf_compress.calibration.sweep import Streams, turns
from hf_compress.methods.lrp.fisher import Energies, energies
from hf_compress.methods.lrp.linears import Subject
from hf_compress.methods.lrp.precision import ErrorCosts
from hf_compress.methods.lrp.scores import scored, some_batches
from hf_compress.methods.lrp.unexplained import unexplained
from hf_compress.modules.sparse import at_ones

# Of so many tokens that weights are solved on, one says what errors cost: bits given by half of them do as well as by
# all, within what another seed of the drawn outputs makes of it. What goes is chosen by all: with 70% of the weights
# out, half of the tokens cost 0.004 nats.
WEIGHED = 2


def error_costs(
    subject: Subject, slopes: Mapping[str, Tensor], kept: Mapping[str, Tensor]
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
    """
    config, linears = subject.config, subject.linears
    if config.allocation == "relevance" and not slopes:
        for part in scored(subject, "relevance"):
            yield part.slopes, _of_kept(kept, partial(_squared, linears, part.slopes))
        return
    if config.allocation == "fisher":
        compensated = config.rounding == "compensated" and not kept
        cost = _fisher(subject, compensated)
    elif config.allocation == "relevance":
        cost = partial(_squared, linears, slopes)
    else:
        cost = partial(_full, linears, 1.0)
    for index in turns(subject.stack, range(len(subject.stack)), "weighing errors"):
        yield subject.of_block(index), _of_kept(kept, cost)


def _squared(linears: Mapping[str, nn.Module], slopes: Mapping[str, Tensor], path: str) -> Tensor:
    return slopes[path].to(linear_map(linears[path]).device).square()


def _of_kept(kept: Mapping[str, Tensor], cost: ErrorCosts) -> ErrorCosts:
    return lambda path: at_ones(cost(path), kept[path])[None] if path in kept else cost(path)


def _fisher(subject: Subject, compensated: bool) -> ErrorCosts:
    config, linears = subject.config, subject.linears
    streams = Streams(subject.model, subject.stack, some_batches(subject.context, config.tokens, WEIGHED))
    left_over = unexplained(subject, streams) if compensated else None
    drawn = partial(energies, streams, linears, config.seed, subject.aside)
    state = subject.context.journal.tensors("energies", lambda: drawn(of_inputs=not compensated).state())
    found = Energies.of(state)
    read = found.read if left_over is None else left_over
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
