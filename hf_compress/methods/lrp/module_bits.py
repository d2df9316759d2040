"""One number of bits for whole linear maps, as formats have it that know no others."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_compress.calibration.capture import forward, watch_arguments
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
    with watch_arguments(linears) as given:  # all kept until then, so that no tensor gets the place of another
        forward(model, batch)
    together: dict[tuple[str, int], list[str]] = {}
    for path, calls in given.items():
        key = (path.rpartition(".")[0], id(calls[-1][0])) if calls else (path, 0)
        together.setdefault(key, []).append(path)
    return list(together.values())


def bits_of_modules(
    config: LRPConfig,
    weights: Weights,
    costs: CostParts,
    together: Iterable[Sequence[str]],
    budget: int,
) -> dict[str, Tensor]:
    """Numbers of bits of all groups, (outputs, groups of a row) on the CPU, by path of the map; one number in each map.

    The sum of errors is the least of all that the budget allows (see `spend_on_items`).

    Args:
        weights: of the linear maps.
        costs: paths, and what a squared error of each weight costs, of the weight's shape, by path.
        together: the maps that get the same number of bits, by their paths.
        budget: bits that all maps may take, with all that is stored, as many as at the fewest bits at least.
    """
    unsorted = all_errors(config, MODULE_BITS, weights, costs)
    errors = {path: unsorted.pop(path).double() for path in weights}
    outputs = {path: weights.shape(path)[0] for path in weights}
    if config.allocation == "uniform":  # all groups alike, however hard they are to round
        mean = torch.cat(list(errors.values())).mean(dim=0, keepdim=True)
        errors = {path: mean.expand_as(own) for path, own in errors.items()}
    items = [list(paths) for paths in together]
    sums = torch.stack([torch.stack([errors[path].sum(dim=0) for path in paths]).sum(dim=0) for paths in items])
    counts = [sum(len(errors[path]) for path in paths) for paths in items]
    sizes = [[count * stored_bits(config, bits) for bits in MODULE_BITS] for count in counts]
    found: dict[str, Tensor] = {}
    for paths, choice in zip(items, from_one(lambda: spend_on_items(sums, sizes, budget)), strict=True):
        for path in paths:
            found[path] = torch.full((outputs[path], len(errors[path]) // outputs[path]), MODULE_BITS[choice])
    return {path: found[path] for path in weights}
