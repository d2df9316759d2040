"""What weights, hidden units and heads are cost: by relevance, and by the scores that it is held against."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hf_compress.anatomy.dispatch import computing_device, is_offloaded
from hf_compress.anatomy.parts import linear_map
from hf_compress.anatomy.stacks import Stack
from hf_compress.attribution.scores import RelevanceSums, relevance_sums, relevance_sums_by_blocks
from hf_compress.calibration.capture import (
    hooked,
    inference,
    real_tokens,
    stream_tokens,
    tokens_of,
    watch_encoded,
)
from hf_compress.calibration.data import Batch
from hf_compress.calibration.descent import NOT_BY_BLOCKS
from hf_compress.calibration.objective import speaks
from hf_compress.calibration.processes import summed_by_name
from hf_compress.calibration.routing import Route, watch_routes
from hf_compress.calibration.sweep import Sweep, turns
from hf_compress.methods.base.context import CalibrationContext
from hf_compress.methods.lrp.linears import Subject, Weights, linears_of

_FEW = 4096  # tokens that are taken whole


@dataclass
class Scores:
    """Scores of linear maps' weights, (outputs, inputs) float32, and of what some of them read, (inputs).

    Attributes:
        weights, units: by the path of the linear map.
        slopes: E |R| / |w| of the weights, where the scores are made of them and bits are given by them.
    """

    weights: dict[str, Tensor] = field(default_factory=dict)
    units: dict[str, Tensor] = field(default_factory=dict)
    slopes: dict[str, Tensor] = field(default_factory=dict)


def some_batches(context: CalibrationContext, tokens: int, part: int = 1) -> Sequence[Batch]:
    """Batches of about `part_of_tokens` tokens (or samples), spread over the calibration data."""
    data = context.calibration
    return data.about(part_of_tokens(context, tokens, part), data.tokens or data.samples, rounded=round)


def part_of_tokens(context: CalibrationContext, tokens: int, part: int) -> int:
    """One in so many of those tokens (or samples) that there are of `tokens`; where they are few, all."""
    data = context.calibration
    taken = min(tokens, data.tokens or data.samples)
    return max(taken // part, min(taken, _FEW))


def scored(subject: Subject, name: str, writers: Mapping[str, nn.Module] | None = None) -> Generator[Scores]:
    """The scores called `name` of the weights of linear maps, and of what `writers` read, in parts.

    The weights that a part is of are in memory while it is given. That is a block, or, of a model that does not run
    block by block, all. To be closed: meanwhile the rules of relevance may be on the model.

    Of a linear map that they tell nothing of, such as that of an expert which no token was given to, they are the
    weights' sizes; but 0 where weights are compared across maps.
    """
    for found in _scored(subject, name, writers or {}):
        if subject.config.scope != "model":
            for path, values in found.weights.items():
                if not bool(values.any()):
                    found.weights[path] = Weights(subject.linears)[path].abs()
        yield found


def _scored(subject: Subject, name: str, writers: Mapping[str, nn.Module]) -> Iterator[Scores]:
    if name in ("relevance", "signed"):
        yield from _by_relevance(subject, writers, signed=name == "signed")
        return
    config, stack = subject.config, subject.stack
    norms: dict[str, Tensor] = {}
    if name == "wanda":
        batches = some_batches(subject.context, config.tokens)
        norms = input_norms(subject.context, batches, {**subject.linears, **writers}, stack)
    generator = torch.Generator().manual_seed(config.seed)
    for index in turns(stack, range(len(stack)), "scoring"):
        own = subject.of_block(index)
        ends = linears_of(stack, index, writers)
        if name == "random":
            yield _random(generator, Weights(own), ends)
            continue
        sizes = {path: linear_map(module).detach().float().norm(dim=1) for path, module in ends.items()}
        if norms:
            sizes = {path: size * norms[path] for path, size in sizes.items()}
        yield Scores(units=sizes)
        for path, weight in Weights(own).items():
            yield Scores({path: weight.abs().mul_(norms[path]) if norms else weight.abs()})


def _by_relevance(subject: Subject, writers: Mapping[str, nn.Module], signed: bool) -> Iterator[Scores]:
    config, linears = subject.config, subject.linears
    needed = config.quantizes and config.allocation == "relevance"
    for sums in relevances(subject, writers, signed):
        count = max(1, sums.samples)
        if signed:
            yield Scores(_over(sums.signed, count), _over(sums.signed_units, count))
            continue
        tempered: dict[str, Tensor] = {}
        slopes: dict[str, Tensor] = {}
        for path in [path for path in linears if path in sums.absolute]:  # in place where nothing else needs it
            size, slope = Weights(linears)[path].abs(), sums.absolute.pop(path)
            slope.div_(size.clamp(min=torch.finfo(torch.float32).tiny)).div_(count)
            if needed:
                slopes[path] = slope
            tempered[path] = (slope**config.temper if needed else slope.pow_(config.temper)).mul_(size)
        yield Scores(tempered, _over(sums.absolute_units, count), slopes)


def relevances(subject: Subject, writers: Mapping[str, nn.Module], signed: bool) -> Iterator[RelevanceSums]:
    """Sums of relevances, or of their sizes, as the config says what is explained; of one block at a time."""
    config, model, stack, linears = subject.config, subject.model, subject.stack, subject.linears
    batches = some_batches(subject.context, config.tokens)
    target: Any = config.target
    if target == "auto":
        known = any(batch.labels is not None or speaks(model, batch) for batch in batches)
        target = "label" if known else "predicted"
    wanted: Any = {"signed": signed, "composite": config.composite}
    parts = relevance_sums_by_blocks(model, stack, batches, linears, writers, target, **wanted)
    try:
        first = next(parts, None)
    except torch.OutOfMemoryError:
        raise
    except NOT_BY_BLOCKS:
        if is_offloaded(stack.blocks):
            raise
        yield relevance_sums(model, batches, linears, writers, target, absolute=not signed, **wanted)
        return
    if first is not None:
        yield first
        del first
    yield from parts


def input_norms(
    context: CalibrationContext, batches: Sequence[Batch], modules: Mapping[str, nn.Module], stack: Stack
) -> dict[str, Tensor]:
    """Root of the mean square of what modules read, (inputs) float32 each, over real tokens.

    Source: M. Sun et al., "Wanda" (arXiv 2306.11695), equation (1), but for the number of tokens.
    """
    sums: dict[str, Tensor] = {}
    counts: dict[str, Tensor] = {}

    def add(path: str, rows: Tensor) -> None:
        sums[path] = sums.get(path, 0) + rows.float().square().sum(dim=0)
        counts[path] = counts.get(path, 0) + torch.tensor(len(rows))

    with inference(context.model):
        sweep = Sweep(context.model, stack, batches)
        for index in sweep.blocks("reading activations"):
            own = linears_of(stack, index, modules)
            for _ in sweep.past(index, partial(watch_rows, stack, modules=own, consume=add)):
                pass
    summed_by_name(sums)
    summed_by_name(counts)
    device = computing_device(context.model)
    unread = {path: torch.zeros(len(linear_map(m)), device=device) for path, m in modules.items()}
    return unread | {path: (total / max(1, int(counts[path]))).sqrt() for path, total in sums.items()}


@contextmanager
def watch_rows(
    stack: Stack,
    batch: Batch,
    modules: Mapping[str, nn.Module],
    consume: Callable[[str, Tensor], None],
    wanted: Callable[[str, Tensor], bool] | None = None,
) -> Iterator[None]:
    """While a batch runs, `consume(path, rows)` with what each module reads at real tokens, (tokens, inputs).

    Args:
        wanted: given a path and the tensor that its module is handed, says whether it is to be consumed.
    """

    with watch_routes(stack.blocks) as routes, watch_encoded(stack) as encoded:

        def keep(path: str) -> Callable[..., None]:
            def before(module: nn.Module, args: tuple[Any, ...]) -> None:
                if wanted is None or wanted(path, args[0]):
                    consume(path, real_rows(stack, batch, args[0], routes.get(module), encoded))

            return before

        with hooked(module.register_forward_pre_hook(keep(path)) for path, module in modules.items()):
            yield


def real_rows(
    stack: Stack, batch: Batch, given: Tensor, route: Route | None = None, encoded: Sequence[Tensor] = ()
) -> Tensor:
    """What a module of a stack reads at real tokens, (tokens, inputs); all where it does not read one row a token.

    Args:
        route: of what an expert reads.
        encoded: what the stack is given of an encoder (see `watch_encoded`).
    """
    if any(given is one for one in encoded):
        return given[real_tokens(batch, given)]
    if given.ndim == 3:
        return given[stream_tokens(stack, batch, given)]
    rows = given.flatten(0, -2)
    everywhere, real = len(rows) if route is None else route.everywhere, tokens_of(stack, batch)
    if real is None or everywhere != real.numel():
        return rows
    real = real.flatten().to(rows.device)  # tokens in one dimension
    return rows[real if route is None else real[route.tokens]]


def _random(generator: torch.Generator, weights: Weights, writers: Mapping[str, nn.Module]) -> Scores:
    return Scores(
        {path: torch.rand(weight.shape, generator=generator).to(weight.device) for path, weight in weights.items()},
        {path: torch.rand(linear_map(module).shape[0], generator=generator) for path, module in writers.items()},
    )


def _over(sums: dict[str, Tensor], count: int) -> dict[str, Tensor]:
    """The sums themselves, divided; taken out."""
    return {path: sums.pop(path).div_(count) for path in list(sums)}
