"""Relevance of weights and units, summed over calibration data as it streams by."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel

from hf_compress.anatomy.parts import linear_map
from hf_compress.attribution.composites import Composite
from hf_compress.attribution.passes import check_conserved, explain, explaining
from hf_compress.attribution.targets import Target
from hf_compress.attribution.watch import watch_inputs, watch_linears
from hf_compress.calibration.data import Batch
from hf_compress.calibration.routing import Route, watch_routes
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
    """Relevances of the weights of `linears`, and of what `writers` read, over calibration data.

    Costs a forward and a backward pass a batch, and a tensor as large as the weight for each sum.

    Raises:
        UnsupportedModelError: the model has a part that there is no rule for.
        CalibrationError: NaN or infinite relevances; no labels where the target is one.
    """
    sums = _Sums(linears, signed, absolute)
    result = RelevanceSums()
    with ExitStack() as stack:
        sources = None
        for batch in tqdm(batches, desc="scoring by relevance", disable=None):
            if sources is None:
                check_conserved(model, batch, composite)
                sources = stack.enter_context(explaining(model, composite))
                sums.routes = stack.enter_context(watch_routes([model]))
                stack.enter_context(watch_linears(linears, sums.take_weights))
                stack.enter_context(watch_inputs(writers or {}, sums.take_units))
            sums.samples = batch.samples
            explain(model, batch, sources, target)
            result.samples += batch.samples
    for kind, found in sums.weights.items():
        for name, linear in linears.items() if sums.wanted[kind] else ():
            weight = linear_map(linear).T.detach()
            if name not in found:  # nothing goes through queries held fast
                found[name] = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
            products = found[name]
            products *= weight if kind == "signed" else weight.abs()
            _check(name, products)
    for found in sums.units.values():
        for name, units in found.items():
            _check(name, units)
    result.signed, result.absolute = sums.weights["signed"], sums.weights["absolute"]
    result.signed_units, result.absolute_units = sums.units["signed"], sums.units["absolute"]
    return result


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
