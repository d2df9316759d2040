"""What the linear maps of a block read, on the streams of pairs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor, nn

from hf_compress.anatomy.parts import linear_map
from hf_compress.anatomy.stacks import Stack
from hf_compress.calibration.sweep import StreamPair
from hf_compress.methods.base.grams import few_at_once
from hf_compress.methods.lrp.scores import watch_rows
from hf_compress.numerics.moments import Moments


def linears_of(stack: Stack, index: int, linears: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Those of a block."""
    return {path: module for path, module in linears.items() if path.startswith(f"{stack.path}.{index}.")}


def in_parts(linears: Mapping[str, nn.Module]) -> Iterator[dict[str, nn.Module]]:
    """Linear maps in parts whose Gram matrices fit into memory together: experts are many."""
    for paths in few_at_once({path: 8 * len(linear_map(module)) ** 2 for path, module in linears.items()}):
        yield {path: linears[path] for path in paths}


def grams_of(stack: Stack, index: int, linears: Mapping[str, nn.Module], pairs: list[StreamPair]) -> dict[str, Tensor]:
    """Σ x xᵀ over what each linear map of a block reads at real tokens, (inputs, inputs) float64."""
    sums: dict[str, Moments] = {}

    def add(path: str, rows: Tensor) -> None:
        sums.setdefault(path, Moments(rows.shape[1], rows.device)).add(rows)

    for pair in pairs:
        with watch_rows(stack, pair.runner.batch, linears, add):
            pair.runner.run(index, pair.compressed)
    return {path: moments.gram for path, moments in sums.items()}
