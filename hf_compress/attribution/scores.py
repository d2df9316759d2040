"""Relevance of weights and units, summed over calibration data as it streams by."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_compress.anatomy.parts import linear_map
from hf_compress.anatomy.stacks import Stack
from hf_compress.attribution.composites import Composite
from hf_compress.attribution.passes import Sources, check_conserved, explain, explained_behind, explaining, gradients
from hf_compress.attribution.targets import Target
from hf_compress.attribution.watch import watch_inputs, watch_linears
from hf_compress.calibration.capture import inference
from hf_compress.calibration.data import Batch
from hf_compress.calibration.descent import Descent
from hf_compress.calibration.processes import by_first, own, summed, summed_by_name, total
from hf_compress.calibration.progress import bar
from hf_compress.calibration.routing import Route, watch_routes
from hf_compress.calibration.runner import BlockRunner
from hf_compress.calibration.sweep import Streams
from hf_compress.errors import CalibrationError

_CHUNK = 2**19  # weights whose sums are added to together


@dataclass
class RelevanceSums:
    """Sums over samples, float32.

    Attributes:
        signed: Σ R of every weight, (outputs, inputs), by the path of its linear map.
        absolute: Σ |R| likewise, R being summed over the tokens of a sample first.
        signed_units, absolute_units: of what other modules read, (inputs); |R| is summed over single tokens.
        samples: how many there were.
    """

    signed: dict[str, Tensor] = field(default_factory=dict)
    absolute: dict[str, Tensor] = field(default_factory=dict)
    signed_units: dict[str, Tensor] = field(default_factory=dict)
    absolute_units: dict[str, Tensor] = field(default_factory=dict)
    samples: int = 0

    def slopes(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Σ |R| / |w|, by how much what is explained moves for each unit that a weight does; 0 where the weight is."""
        tiny = torch.finfo(torch.float32).tiny
        return {path: self.absolute[path] / weights[path].abs().clamp(min=tiny) for path in weights}


class _Sums:
    """Sums of x · g products of every linear map, before they are multiplied by the weight.

    Attributes:
        samples: how many the batch has that is running.
        routes: of what experts read in it.
    """

    samples = 0
    routes: Mapping[nn.Module, Route] = {}

    def __init__(self, linears: Mapping[str, nn.Module], signed: bool, absolute: bool) -> None:
        self.linears = linears
        self.wanted = {"signed": signed, "absolute": absolute}
        self.weights: dict[str, dict[str, Tensor]] = {"signed": {}, "absolute": {}}
        self.units: dict[str, dict[str, Tensor]] = {"signed": {}, "absolute": {}}

    def take_weights(self, name: str, given: Tensor, gradient: Tensor) -> None:
        if self.wanted["signed"]:
            _add(self.weights["signed"], name, gradient.flatten(0, -2).T @ given.flatten(0, -2))
        if not self.wanted["absolute"]:
            return
        route = self.routes.get(self.linears[name])
        if route is not None:
            owners = route.samples(self.samples)
            parts = [(given[owners == one], gradient[owners == one]) for one in owners.unique()]
        else:
            flat = given.ndim == 2 and len(given) % self.samples == 0  # tokens of all samples in one dimension
            count = self.samples if flat else len(given)
            given, gradient = (t.reshape(count, -1, t.shape[-1]) for t in (given, gradient))
            parts = list(zip(given, gradient, strict=True))
            if given.shape[1] == 1:  # |g x| = |g| |x|, of all samples at once
                parts = [(given[:, 0].abs(), gradient[:, 0].abs())]
        if name not in self.weights["absolute"]:
            shape = gradient.shape[-1], given.shape[-1]
            self.weights["absolute"][name] = torch.zeros(shape, dtype=torch.float32, device=given.device)
        _add_sizes(self.weights["absolute"][name], parts)

    def reduce(self) -> None:
        """Make these the sums over the batches of all processes."""
        for kind, found in self.weights.items():
            for name, linear in self.linears.items() if self.wanted[kind] else ():
                weight = linear_map(linear).T
                if name not in found:  # nothing goes through queries held fast
                    found[name] = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
            summed(found[name] for name in self.linears if name in found)
        for units in self.units.values():
            summed_by_name(units)

    def take_units(self, name: str, given: Tensor, gradient: Tensor) -> None:
        found = (given.float() * gradient.float()).flatten(0, -2)
        _add(self.units["signed"], name, found.sum(dim=0))
        _add(self.units["absolute"], name, found.abs().sum(dim=0))


def relevance_sums(
    model: PreTrainedModel,
    batches: Iterable[Batch],
    linears: Mapping[str, nn.Module],
    writers: Mapping[str, nn.Module] | None = None,
    target: Target = "label",
    *,
    signed: bool = True,
    absolute: bool = True,
    composite: str | Composite = "attnlrp",
) -> RelevanceSums:
    """Relevances of the weights of `linears`, and of what `writers` read, over calibration data of all processes.

    Costs a forward and a backward pass a batch, and a tensor as large as the weight for each sum.

    Raises:
        UnsupportedModelError: the model has a part that there is no rule for.
        CalibrationError: NaN or infinite relevances; no labels where the target is one.
    """
    sums = _Sums(linears, signed, absolute)
    samples = 0
    with ExitStack() as stack:
        sources = None
        for number, batch in bar(own(batches), "scoring by relevance"):
            if sources is None:
                if number == 0:
                    check_conserved(model, batch, composite)
                sources = stack.enter_context(explaining(model, composite))
                sums.routes = stack.enter_context(watch_routes([model]))
                stack.enter_context(watch_linears(linears, sums.take_weights))
                stack.enter_context(watch_inputs(writers or {}, sums.take_units))
            sums.samples = batch.samples
            explain(model, batch, sources, target)
            samples += batch.samples
    return _finished(sums, linears, samples)


def relevance_sums_by_blocks(
    model: PreTrainedModel,
    stack: Stack,
    batches: Iterable[Batch],
    linears: Mapping[str, nn.Module],
    writers: Mapping[str, nn.Module] | None = None,
    target: Target = "label",
    *,
    signed: bool = False,
    composite: str | Composite = "attnlrp",
) -> Iterator[RelevanceSums]:
    """Sums of relevances, or of their sizes, of the blocks of a stack, from the last to the first.

    Each is in memory while its sums are given.

    No more than that has to be: one block, its sums, its graph for one batch, and of every batch the streams.
    """
    batches = list(batches)
    if not batches:
        return
    mine = own(batches)
    samples = sum(batch.samples for _, batch in mine)
    by_first(check_conserved)(model, batches[0], composite, stack)  # all go on by blocks, or none
    with inference(model):
        streams = Streams(model, stack, batches)
        streams.keep()
    for runner in streams.runners:
        runner.trace_handed()
    with explaining(model, composite) as sources, watch_routes(stack.blocks) as routes:
        descent = Descent(streams, partial(_explained_behind, sources, target))
        for index in descent.blocks("scoring by relevance"):
            inside = set(stack.blocks[index].modules())
            inner, ends = (
                {path: module for path, module in modules.items() if module in inside}
                for modules in (linears, writers or {})
            )
            sums = _Sums(inner, signed, not signed)
            sums.routes = routes
            with watch_linears(inner, sums.take_weights), watch_inputs(ends, sums.take_units):
                for place, runner in enumerate(streams.runners):
                    sums.samples = runner.batch.samples
                    descent.take_past(index, place)
            yield _finished(sums, inner, samples)


def _explained_behind(sources: Sources, target: Target, runner: BlockRunner, stream: Tensor) -> Tensor:
    """The gradient, behind the last block, of what is explained of a batch."""
    given = stream.detach().requires_grad_()
    return gradients(explained_behind(runner, given.clone(), sources, target).sum(), [given])[0]


def _finished(sums: _Sums, linears: Mapping[str, nn.Module], samples: int) -> RelevanceSums:
    """Relevances over all processes, of products that are times the weights."""
    sums.reduce()
    for kind, found in sums.weights.items():
        for name, linear in linears.items() if sums.wanted[kind] else ():
            weight = linear_map(linear).T.detach()
            products = found[name]
            products *= weight if kind == "signed" else weight.abs()
            _check(name, products)
    for units in sums.units.values():
        for name, values in units.items():
            _check(name, values)
    return RelevanceSums(
        signed=sums.weights["signed"],
        absolute=sums.weights["absolute"],
        signed_units=sums.units["signed"],
        absolute_units=sums.units["absolute"],
        samples=round(total(samples)[0]),
    )


def _add_sizes(total: Tensor, parts: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Add |gᵀ x| of every part (x, g), (tokens, …) each, to a sum (outputs, inputs) float32.

    Some outputs at a time, so that their sum stays in the cache from part to part.
    """
    rows = max(1, _CHUNK // total.shape[1])
    for start in range(0, len(total), rows):
        own = total[start : start + rows]
        for read, slope in parts:
            own.add_((slope[:, start : start + rows].T @ read).abs_())


def _add(table: dict[str, Tensor], name: str, value: Tensor) -> None:
    """Add to a sum in float32, whatever the dtype of what is added."""
    if name in table:
        table[name] += value
    else:
        table[name] = value.float()


def _check(name: str, values: Tensor) -> None:
    if values.numel() and not all(bool(torch.isfinite(end)) for end in values.aminmax()):
        raise CalibrationError(f"the relevances of {name} hold NaN or infinity: load the model in float32 or bfloat16")
