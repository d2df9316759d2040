"""Running single blocks on any residual stream, as the model's own forward calls them.

A batch is given to the model's forward once, and that waits before each block until somebody asks what the next one
does. So the model prepares masks, positions and caches as it always does, no family needs code of its own, and each
block's arguments are there from then on: to run it on another stream takes no more than the block.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import copy_context
from functools import partial
from typing import Any, NamedTuple, TypeVar

from greenlet import getcurrent, greenlet
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_compress.anatomy.stacks import Stack
from hf_compress.anatomy.undo import Undo
from hf_compress.calibration.capture import (
    check_stream,
    forward,
    stream_of,
    stream_of_output,
    streams_beside,
    with_stream,
)
from hf_compress.calibration.data import Batch
from hf_compress.errors import CalibrationError, UnsupportedModelError
from hf_compress.modules.bottleneck import BOTTLENECK, squeezed

# (the block's own forward, its arguments) -> what the block returns
BlockForward = Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]

_T = TypeVar("_T")
_STATES = (2, 3)  # dimensions that they have; masks have more


@contextmanager
def replaced_forwards(stack: Stack, replacements: dict[int, BlockForward]) -> Iterator[None]:
    """Give single blocks, not their class, another forward for a while. A bottleneck behind a block is part of it.

    It is given what the model hands to the block, and what it returns is what the model goes on with, whatever hooks on
    the block would make of either: they act where the block itself is run. Those that only look see what is returned.
    """
    with Undo() as undo:
        for index, replacement in replacements.items():
            block, returned = stack.blocks[index], list[Any]()
            own = _forward_with_bottleneck(block, undo)
            undo.set(block, "forward", _wrapped(own, replacement, returned, bool(block._forward_hooks)))
            undo.set(block, "_forward_pre_hooks", OrderedDict())
            undo.later(block.register_forward_hook(partial(_instead, returned)).remove)
        yield


def _forward_with_bottleneck(block: nn.Module, undo: Undo) -> Callable[..., Any]:
    """The block's own forward, its bottleneck included, whose hook then has nothing left to do."""
    own, bottleneck = block.forward, block._modules.get(BOTTLENECK)
    if bottleneck is None:
        return own
    undo.put(block._modules, BOTTLENECK, nn.Identity())
    return lambda *args, **kwargs: squeezed(bottleneck, own(*args, **kwargs))


def _wrapped(own: Callable[..., Any], new: BlockForward, returned: list[Any], hooked: bool) -> Callable[..., Any]:
    """A forward that leaves what it returns in a list; hooks get a copy of the stream, which they may write into."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        output = new(own, args, kwargs)
        returned[:] = [output]
        return with_stream(output, stream_of_output(output).clone()) if hooked else output

    return forward


def _instead(returned: list[Any], *_: Any) -> Any:
    """The last hook of a block: what stands in the list is its output, if its forward has run."""
    return returned[0] if returned else None


@contextmanager
def stopped_by_errors(runners: Iterable[BlockRunner]) -> Iterator[None]:
    """Have forwards that wait be ended by an error."""
    try:
        yield
    except BaseException:
        for runner in runners:
            runner.stop()
        raise


class _Call(NamedTuple):
    """What the model calls a block with; the place of the stream is empty, so that none is kept."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    name: str | None  # of the stream, where it is given by name

    @staticmethod
    def of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Call:
        if args:
            return _Call((None, *args[1:]), kwargs, None)
        stream = stream_of(args, kwargs)
        name = next(name for name, value in kwargs.items() if value is stream)
        return _Call((), {**kwargs, name: None}, name)

    def on(self, stream: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments, with a stream among them."""
        if self.name is None:
            return (stream, *self.args[1:]), self.kwargs
        return (), {**self.kwargs, self.name: stream}


def _without(values: dict[int, _T], index: int) -> dict[int, _T]:
    """Values of blocks by their numbers, which are lower by one behind the block that has gone."""
    return {block - (block > index): value for block, value in values.items() if block != index}


class BlockRunner:
    """One batch, and blocks run on streams of it.

    What a block returns besides the stream (a tuple's other entries, such as T5's position bias) is kept from the first
    time it runs, and goes on with the model's forward; so every block has to run before a later one is run alone.

    Attributes:
        batch: the inputs.
    """

    def __init__(self, model: PreTrainedModel, stack: Stack, batch: Batch) -> None:
        self.model, self.stack, self.batch = model, stack, batch
        self._calls: dict[int, _Call] = {}  # of the blocks that the forward has come to
        self._forms: dict[int, Any] = {}  # what they return, without the stream
        self._waiting: greenlet | None = None  # the forward, inside its call of block `_reached`
        self._reached = -1
        self._handed: Tensor | None = None  # the stream that it goes on with

    def start(self) -> Tensor:
        """The stream before the first block, (samples, positions, width)."""
        again = len(self._calls) == len(self.stack)
        self._waiting = greenlet(partial(forward, self.model, self.batch))
        self._waiting.gr_context = copy_context()
        self._reached = -1
        stream = self._next()
        if again:  # nothing is to be learnt from the rest of it
            self.stop()
            self._reached = -1
        return stream

    def run(self, index: int, stream: Tensor) -> Tensor:
        """What block `index` makes of `stream`."""
        if index not in self._calls:
            self.come_to(index)
        output = self.output(index, stream)
        after = stream_of_output(output)
        if beside := streams_beside(output, self._calls[index].kwargs, after):
            raise UnsupportedModelError(
                f"block {self.stack.path}.{index} has a second stream, {next(iter(beside))}, and no single one that "
                "tells what it does"
            )
        check_stream(self.stack, index, stream, after)
        self._forms.setdefault(index, with_stream(output, None))
        if index == self._reached:
            self._handed = after
        return after

    def output(self, index: int, stream: Tensor) -> Any:
        """All that block `index`, which has run before, returns for `stream`, whatever that is."""
        args, kwargs = self._calls[index].on(stream.clone())  # a block may add to it in place
        return self.stack.blocks[index](*args, **kwargs)

    def lose(self, index: int) -> None:
        """Block `index` is no longer in the stack. All blocks have run."""
        self._calls, self._forms = _without(self._calls, index), _without(self._forms, index)

    def trace_handed(self) -> None:
        """Have gradients come to states that blocks are called with besides the stream, such as an encoder's."""
        traced: dict[int, Tensor] = {}

        def leaf(value: Any) -> Any:
            if not isinstance(value, Tensor) or not value.is_floating_point() or value.ndim not in _STATES:
                return value
            return traced.setdefault(id(value), value.detach().requires_grad_())

        for index, call in self._calls.items():
            args, kwargs = tuple(map(leaf, call.args)), {name: leaf(value) for name, value in call.kwargs.items()}
            self._calls[index] = _Call(args, kwargs, call.name)

    def handed(self, index: int) -> list[Tensor]:
        """What block `index` is called with besides the stream, and a gradient comes to."""
        found: dict[int, Tensor] = {}
        call = self._calls[index]
        left: list[Any] = [*call.args, *call.kwargs.values()]
        while left:
            value = left.pop()
            if isinstance(value, Tensor) and value.requires_grad:
                found[id(value)] = value
            elif isinstance(value, (tuple, list)):
                left += value
            elif isinstance(value, dict):
                left += value.values()
        return list(found.values())

    def finish(self, stream: Tensor) -> Any:
        """The model's output when `stream` is what comes out of the last block. All blocks have to have run."""
        with replaced_forwards(self.stack, {index: self._handing(index, stream) for index in range(len(self.stack))}):
            return forward(self.model, self.batch)

    def _handing(self, index: int, stream: Tensor) -> BlockForward:
        """A forward with which a block returns `stream` in the form of its own return value."""
        return lambda own, args, kwargs: with_stream(self._forms[index], stream)

    def come_to(self, index: int) -> None:
        """Let the forward go on as far as its call of block `index`, if it has not been there."""
        if index in self._calls:
            return
        if self._waiting is None:
            self.start()
        while self._reached < index:
            self._next()

    def stop(self) -> None:
        """End a forward that still waits: collected as garbage, it would put modes back that are others by then."""
        waiting, self._waiting = self._waiting, None
        if waiting is not None:
            waiting.throw()

    def _next(self) -> Tensor:
        """Let the forward go on from one block's call to that of the next; the stream that it comes with."""
        here, index = getcurrent(), self._reached + 1
        calls, seen = self._calls, list[Tensor]()

        # It does not know the runner: what waits inside a forward is not seen by the collection of garbage.
        def wait(own: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            seen.append(stream_of(args, kwargs))
            calls[index] = _Call.of(args, kwargs)
            return here.switch()

        assert self._waiting is not None
        returned = (with_stream(self._forms[index - 1], self._handed),) if index else ()
        with replaced_forwards(self.stack, {index: wait}):
            self._waiting.switch(*returned)
        if not seen:
            raise CalibrationError(
                f"block {self.stack.path}.{index} does not run on the calibration data, as one that reads images does "
                "not on text alone: give data that all blocks run on"
            )
        self._reached = index
        if index == len(self.stack) - 1:
            self._waiting = None  # what it holds is of no more use
        return seen.pop()
