"""One number of bits for whole linear maps, as formats have it that know no others."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_compress.calibration.capture import forward, hooked
from hf_compress.calibration.data import Batch
from hf_compress.calibration.processes import from_one
from hf_compress.methods.lrp.config import MODULE_BITS, LRPConfig
from hf_compress.methods.lrp.linears import Weights
from hf_compress.methods.lrp.precision import CostParts, all_errors, stored_bits
from hf_compress.numerics.budget import spend_on_items


def read_together(model: PreTrainedModel, batch: Batch, linears: Mapping[str, nn.Module]) -> list[list[str]]:
    """The paths of linear maps, those together that stand in one module and read the same tensor on a batch.

    So queries, keys and values are one, and gate and up: vLLM computes each of these in one product, for which it takes
    the number of bits of the first (its `compressed_tensors/utils.py`, `_match_fused_layer`).
    """
    first: dict[str, str] = {}  # of each, the first in its module that read its tensor
    reading: dict[str, Tensor] = {}  # the maps of one module, which are held so that no tensor gets another's place

    def watch(path: str) -> Callable[..., None]:
        def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            own, given = path.rpartition(".")[0], next(iter((*args, *kwargs.values())))
            for other in [other for other in reading if other.rpartition(".")[0] != own]:
                del reading[other]
            reading.pop(path, None)
            first[path] = next((other for other, tensor in reading.items() if tensor is given), path)
            reading[path] = given

        return note

    hooks = (module.register_forward_pre_hook(watch(path), with_kwargs=True) for path, module in linears.items())
    with hooked(hooks):
        forward(model, batch)
    together: dict[str, list[str]] = {}
    for path in linears:
        together.setdefault(first.get(path, path), []).append(path)
    return list(together.values())


def bits_of_modules(
    config: LRPConfig,
    weights: Weights,
    costs: CostParts,
    together: Iterable[Sequence[str]],
    budget: int,
) -> dict[str, Tensor]:
    """Numbers of bits of all groups, (outputs, groups of a row) uint8, by path of the map; one number in each map.

    The sum of errors is the least of all that the budget allows (see `spend_on_items`).

    Args:
        weights: of the linear maps.
        costs: paths, and what a squared error of each weight costs, of the weight's shape, by path.
        together: the maps that get the same number of bits, by their paths.
        budget: bits that all maps may take, with all that is stored, as many as at the fewest bits at least.
    """
    errors, groups = {}, {}
    for path, own in all_errors(config, MODULE_BITS, weights, costs):
        errors[path], groups[path] = own.double().sum(dim=0).cpu(), len(own)
    if config.allocation == "uniform":  # all groups alike, however hard they are to round
        mean = torch.stack(list(errors.values())).sum(dim=0) / sum(groups.values())
        errors = {path: mean * count for path, count in groups.items()}
    items = [list(paths) for paths in together]
    sums = torch.stack([torch.stack([errors[path] for path in paths]).sum(dim=0) for paths in items])
    counts = [sum(groups[path] for path in paths) for paths in items]
    sizes = [[count * stored_bits(config, bits) for bits in MODULE_BITS] for count in counts]
    found: dict[str, Tensor] = {}
    for paths, choice in zip(items, from_one(lambda: spend_on_items(sums, sizes, budget)), strict=True):
        for path in paths:
            outputs = weights.shape(path)[0]
            bits = torch.tensor(MODULE_BITS[choice], dtype=torch.uint8)
            found[path] = bits.expand(outputs, groups[path] // outputs)
    return {path: found[path] for path in weights}
