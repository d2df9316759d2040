"""What the linear maps of a block read, on the streams of pairs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor, nn

from hf_compress.anatomy.parts import linear_map
from hf_compress.anatomy.stacks import Stack
from hf_compress.calibration.streams import StreamPair
from hf_compress.methods.lrp.scores import watch_rows

_MEMORY = 4 * 2**30  # for the Gram matrices of as many linear maps as are solved for in one pass of a block


def linears_of(stack: Stack, index: int, linears: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Those of a block."""
    return {path: module for path, module in linears.items() if path.startswith(f"{stack.path}.{index}.")}


def few_at_once(linears: Mapping[str, nn.Module]) -> Iterator[dict[str, nn.Module]]:
    """Linear maps in parts, none of whose Gram matrices take more memory than is meant for them: experts are many."""
    part: dict[str, nn.Module] = {}
    size = 0
    for path, module in linears.items():
        own = 8 * len(linear_map(module)) ** 2
        if part and size + own > _MEMORY:
            yield part
            part, size = {}, 0
        part[path] = module
        size += own
    if part:
        yield part


def grams_of(stack: Stack, index: int, linears: Mapping[str, nn.Module], pairs: list[StreamPair]) -> dict[str, Tensor]:
    """Σ x xᵀ over what each linear map of a block reads at real tokens, (inputs, inputs) float64."""
    sums: dict[str, Tensor] = {}

    def add(path: str, rows: Tensor) -> None:
        gram = rows.double().T @ rows.double()
        sums[path] = sums[path] + gram if path in sums else gram

    for pair in pairs:
        with watch_rows(stack, pair.runner.batch, linears, add):
            pair.runner.run(index, pair.compressed)
    return sums


def advance(pairs: list[StreamPair], index: int) -> None:
    """Take the compressed stream past a block."""
    for pair in pairs:
        pair.compressed = pair.runner.run(index, pair.compressed)
