"""The linear maps of a stack, whose weights are scored, left out and rounded."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from hf_compress.anatomy.parts import is_linear, linear_map
from hf_compress.anatomy.stacks import Stack
from hf_compress.calibration.capture import forward, hooked, inference
from hf_compress.calibration.data import Batch
from hf_compress.errors import UnsupportedModelError
from hf_compress.modules.experts import Expert
from hf_compress.parity import Probe
from hf_compress.workbench import Workbench

logger = logging.getLogger(__name__)
_TOLERANCE = 0.05  # of what is written; half precision is far from it, and another map farther


def block_linears(stack: Stack) -> dict[str, nn.Module]:
    """The linear maps in the blocks of a stack, by their paths in the model."""
    return {
        f"{stack.path}.{index}.{path}": module
        for index, block in enumerate(stack.blocks)
        for path, module in block.named_modules()
        if is_linear(module)
    }


def changeable_linears(bench: Workbench, stack: Stack) -> dict[str, nn.Module]:
    """Those of them that may be stored in another form.

    Left out, and a warning says so, are those that do something else when they run, such as routers, which choose
    experts, and those that do not run, because the block reads their weights itself.

    Raises:
        UnsupportedModelError: there are none.
    """
    found = block_linears(stack)
    if others := found.keys() - _plain(bench, found):
        logger.warning("%s and %d others do not run as linear maps: they stay", min(others), len(others) - 1)
    found = {path: module for path, module in found.items() if path not in others}
    if not found:
        raise UnsupportedModelError(f"the blocks of {stack.path} have no linear maps to prune or to store in few bits")
    return found


def _plain(bench: Workbench, linears: Mapping[str, nn.Module]) -> set[str]:
    """Which of them compute x Wᵀ + b on a batch; those of experts do, which seldom all get some of it."""
    experts = {id(map_) for module in bench.model.modules() if isinstance(module, Expert) for map_ in module.children()}
    plain = {path for path, module in linears.items() if id(module) in experts}

    def watch(path: str) -> Callable[..., None]:
        def after(module: Any, args: tuple[Any, ...], output: Any) -> None:
            if isinstance(output, Tensor) and args and isinstance(args[0], Tensor):
                expected = args[0] @ linear_map(module) + (0 if module.bias is None else module.bias)
                if output.shape != expected.shape:
                    return
                if not float((output - expected).norm()) > _TOLERANCE * float(expected.norm()):  # NaN is found later
                    plain.add(path)

        return after

    with inference(bench.model), hooked(m.register_forward_hook(watch(path)) for path, m in linears.items()):
        forward(bench.model, some_batch(bench))
    return plain


def some_batch(bench: Workbench) -> Batch:
    """A batch to see what the model does; made up where there is no data."""
    return Probe.of(bench.model).batch if bench.data is None else bench.data.batches[0]


def weights_of(linears: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """Their weights, (outputs, inputs) float32."""
    return {path: linear_map(module).T.detach().float() for path, module in linears.items()}
