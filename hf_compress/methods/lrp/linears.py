"""The linear maps of a stack, whose weights are scored, left out and rounded."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hf_compress.anatomy.parts import is_linear, linear_map
from hf_compress.anatomy.residency import resident
from hf_compress.anatomy.stacks import Stack
from hf_compress.calibration.capture import forward, hooked, inference
from hf_compress.calibration.data import Batch
from hf_compress.calibration.memory import working_memory
from hf_compress.methods.base.context import CalibrationContext
from hf_compress.methods.lrp.config import LRPConfig
from hf_compress.modules.sparse import at_ones
from hf_compress.numerics.aside import Aside, give_back
from hf_compress.rewrite.probe import Probe
from hf_compress.rewrite.record import missing

logger = logging.getLogger(__name__)
_TOLERANCE = 0.05  # of what is written; half precision is far from it, and another map farther
_SAMPLES, _BATCHES = 2, 8  # to see what runs: in dense models all does on any sample
_ROWS = 256  # of what a map writes, evenly spread, that are held against the product


@dataclass(frozen=True)
class Subject:
    """What LRP works on: a stack of a model, and the linear maps in it that it may change.

    Attributes:
        linears: by their paths in the model.
        aside: where what is known of all of them goes, which is as much as their weights.
    """

    config: LRPConfig
    context: CalibrationContext
    stack: Stack
    linears: Mapping[str, nn.Module] = field(default_factory=dict)
    aside: Aside = field(default_factory=lambda: working_memory().aside())

    @property
    def model(self) -> PreTrainedModel:
        return self.context.model

    def of_block(self, index: int) -> dict[str, nn.Module]:
        """The linear maps of a block."""
        return linears_of(self.stack, index, self.linears)


def block_linears(stack: Stack) -> dict[str, nn.Module]:
    """The linear maps in the blocks of a stack, by their paths in the model."""
    return {
        f"{stack.path}.{index}.{path}": module
        for index, block in enumerate(stack.blocks)
        for path, module in block.named_modules()
        if is_linear(module)
    }


def linears_of(stack: Stack, index: int, linears: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Those of a block, by their paths in the model."""
    return {path: module for path, module in linears.items() if path.startswith(f"{stack.path}.{index}.")}


def changeable_linears(context: CalibrationContext, stack: Stack) -> dict[str, nn.Module]:
    """Those of them that may be stored in another form.

    Left out, and a warning says so, are those that do something else when they run, such as routers, which choose
    experts, and those that do not run, because the block reads their weights itself or the data has nothing for them.
    Of experts, which seldom all get some of the data, those that do not run are in.

    Raises:
        UnsupportedModelError: there are none.
    """
    found = block_linears(stack)
    plain, other = _kinds(context, found)
    unread = found.keys() - plain - other
    spared = {path for path in unread if "experts." in path and type(found[path]) in (nn.Linear, Conv1D)}
    _tell("something else than linear maps when they run", other)
    _tell("not run on the calibration data, or their weights are read otherwise", unread - spared)
    found = {path: module for path, module in found.items() if path in plain | spared}
    if not found:
        what = f"the blocks of {stack.path} have no linear maps to prune or to store in few bits"
        raise missing(what, context.model, stack.path)
    return found


def _tell(what: str, paths: set[str]) -> None:
    if paths:
        logger.warning("%d linear maps stay dense, %s among them: they are %s", len(paths), min(paths), what)


def _kinds(context: CalibrationContext, linears: Mapping[str, nn.Module]) -> tuple[set[str], set[str]]:
    """Which of them compute x Wᵀ + b on the data, and which compute something else."""
    plain: set[str] = set()
    other: set[str] = set()

    def watch(path: str) -> Callable[..., None]:
        def look(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            (plain if _is_plain(module, args, output) else other).add(path)
            give_back()

        return look

    batches = [] if context.data is None else context.data.spread(min(_BATCHES, len(context.data)))
    few = some_batch(context).first(_SAMPLES)
    with inference(context.model), hooked(m.register_forward_hook(watch(path)) for path, m in linears.items()):
        for batch in (few, *batches):
            forward(context.model, batch)
            if linears.keys() == plain | other:
                break
    return plain - other, other


def _is_plain(module: Any, args: tuple[Any, ...], output: Any) -> bool:
    if not (isinstance(output, Tensor) and args and isinstance(args[0], Tensor)):
        return False
    with resident(module):
        weight, bias = linear_map(module), module.bias
        if args[0].shape[-1] != len(weight) or output.shape != (*args[0].shape[:-1], weight.shape[1]):
            return False
        given, gave = (rows.reshape(-1, rows.shape[-1]) for rows in (args[0], output))
        some = slice(None, None, max(1, len(given) // _ROWS))
        given, gave = given[some], gave[some]
        expected = (given.to(weight) @ weight).float() + (0 if bias is None else bias.float())
    gap = float((gave.float() - expected).norm())
    return not gap > _TOLERANCE * float(expected.norm())  # NaN is found later, and told of in its own words


def some_batch(context: CalibrationContext) -> Batch:
    """A batch to see what the model does; made up where there is no data."""
    return Probe.of(context.model).batch if context.data is None else context.data.batches[0]


class Weights(Mapping[str, Tensor]):
    """The weights of linear maps by path, (outputs, inputs) float32: made when they are asked for, one at a time.

    Args:
        kept: of pruned maps, bool (outputs, inputs): then it is what is left of them, (1, kept).
    """

    def __init__(self, linears: Mapping[str, nn.Module], kept: Mapping[str, Tensor] | None = None) -> None:
        self._linears, self._kept = linears, kept or {}
        self._left = {path: int(mask.sum()) for path, mask in self._kept.items()}

    def __getitem__(self, path: str) -> Tensor:
        weight = linear_map(self._linears[path]).T.detach().float()
        return at_ones(weight, self._kept[path])[None] if path in self._kept else weight

    def __iter__(self) -> Iterator[str]:
        return iter(self._linears)

    def __len__(self) -> int:
        return len(self._linears)

    def shape(self, path: str) -> tuple[int, int]:
        """Outputs and inputs of a map, or 1 and how many weights are left of it."""
        if path in self._left:
            return 1, self._left[path]
        inputs, outputs = linear_map(self._linears[path]).shape
        return outputs, inputs
