"""Running single blocks on any residual stream, inside the model's own forward.

The model prepares masks, positions and caches as it always does; the blocks before the wanted one hand a given stream
through, and the pass ends after it. So no family needs code of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_compress.anatomy.stacks import Stack
from hf_compress.anatomy.undo import Undo
from hf_compress.calibration.capture import (
    StopForward,
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


@contextmanager
def replaced_forwards(stack: Stack, replacements: dict[int, BlockForward]) -> Iterator[None]:
    """Give single blocks, not their class, another forward for a while. A bottleneck behind a block is part of it."""
    with Undo() as undo:
        for index, replacement in replacements.items():
            block = stack.blocks[index]
            undo.set(block, "forward", _wrapped(_forward_with_bottleneck(block, undo), replacement))
        yield


def _forward_with_bottleneck(block: nn.Module, undo: Undo) -> Callable[..., Any]:
    """The block's own forward, its bottleneck included, whose hook then has nothing left to do."""
    own, bottleneck = block.forward, block._modules.get(BOTTLENECK)
    if bottleneck is None:
        return own
    undo.put(block._modules, BOTTLENECK, nn.Identity())
    return lambda *args, **kwargs: squeezed(bottleneck, own(*args, **kwargs))


def _wrapped(own: Callable[..., Any], new: BlockForward) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        return new(own, args, kwargs)

    return forward


class BlockRunner:
    """One batch, and blocks run on streams of it.

    What a block returns besides the stream (a tuple's other entries, such as T5's position bias) is kept from the first
    time it runs, for when it has to hand a stream through; so every block has to run before a later one is run alone.

    Attributes:
        batch: the inputs.
    """

    def __init__(self, model: PreTrainedModel, stack: Stack, batch: Batch) -> None:
        self.model, self.stack, self.batch = model, stack, batch
        self._forms: dict[int, Any] = {}

    def record(self, skipped: Collection[int] = ()) -> tuple[Any, dict[int, Tensor]]:
        """The model's output without the blocks `skipped`, and the stream before every block.

        The first time, no block may be skipped.
        """
        streams: dict[int, Tensor] = {}

        def recorded(index: int) -> BlockForward:
            def block(own: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
                streams[index] = stream_of(args, kwargs)
                if index in skipped:
                    return with_stream(self._forms[index], streams[index])
                output = own(*args, **kwargs)
                self._refuse_several_streams(index, output, kwargs, streams[index])
                check_stream(self.stack, index, streams[index], stream_of_output(output))
                self._forms.setdefault(index, with_stream(output, None))
                return output

            return block

        with replaced_forwards(self.stack, {index: recorded(index) for index in range(len(self.stack))}):
            return forward(self.model, self.batch), streams

    def start(self) -> Tensor:
        """The stream before the first block, (samples, positions, width)."""
        seen: list[Tensor] = []

        def stop(own: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            seen.append(stream_of(args, kwargs))
            raise StopForward

        with replaced_forwards(self.stack, {0: stop}):
            forward(self.model, self.batch)
        return self._seen(0, seen)

    def run(self, index: int, stream: Tensor) -> Tensor:
        """What block `index` makes of `stream`."""
        seen: list[Tensor] = []

        def wanted(own: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            output = own(*_with_argument(args, stream), **kwargs) if args else own(**_with_keyword(kwargs, stream))
            seen.append(stream_of_output(output))
            self._refuse_several_streams(index, output, kwargs, seen[0])
            self._forms.setdefault(index, with_stream(output, None))
            raise StopForward

        with replaced_forwards(self.stack, {**self.handing(range(index), stream), index: wanted}):
            forward(self.model, self.batch)
        after = self._seen(index, seen)
        check_stream(self.stack, index, stream, after)
        return after

    def _seen(self, index: int, seen: list[Tensor]) -> Tensor:
        """The stream that was seen at a block; CalibrationError where the model has passed the block by."""
        if not seen:
            raise CalibrationError(
                f"block {self.stack.path}.{index} does not run on the calibration data, as one that reads images does "
                "not on text alone: give data that all blocks run on"
            )
        return seen[0]

    def _refuse_several_streams(self, index: int, output: Any, kwargs: dict[str, Any], stream: Tensor) -> None:
        if beside := streams_beside(output, kwargs, stream):
            raise UnsupportedModelError(
                f"block {self.stack.path}.{index} has a second stream, {next(iter(beside))}, and no single one that "
                "tells what it does"
            )

    def finish(self, start: int, stream: Tensor, skipped: Collection[int]) -> Any:
        """The model's output when `stream` is what comes before block `start` and the blocks `skipped` are left out."""
        replacements = self.handing(range(start), stream) | self.handing([i for i in skipped if i >= start], None)
        with replaced_forwards(self.stack, replacements):
            return forward(self.model, self.batch)

    def handing(self, indices: Iterable[int], stream: Tensor | None) -> dict[int, BlockForward]:
        """Replacements with which blocks return `stream`, or what came in, in the form of their own return values."""

        def hand(index: int) -> BlockForward:
            return lambda own, args, kwargs: with_stream(
                self._forms[index], stream_of(args, kwargs) if stream is None else stream
            )

        return {index: hand(index) for index in indices}


def _with_argument(args: tuple[Any, ...], stream: Tensor) -> tuple[Any, ...]:
    return (stream, *args[1:])


def _with_keyword(kwargs: dict[str, Any], stream: Tensor) -> dict[str, Any]:
    name = next(n for n, v in kwargs.items() if v is stream_of((), kwargs))
    return {**kwargs, name: stream}
