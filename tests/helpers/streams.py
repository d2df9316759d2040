"""Blocks run one after another by hand: all streams of a batch, and what the model makes of one of them."""

from typing import Any

from torch import Tensor

from hf_compress.calibration.runner import BlockRunner


def recorded(runner: BlockRunner) -> tuple[Any, dict[int, Tensor]]:
    """The model's output, and the streams before every block and behind the last."""
    end = len(runner.stack)
    streams = {0: runner.start()}
    for index in range(end):
        streams[index + 1] = runner.run(index, streams[index])
    return runner.finish(streams[end]), streams


def finished(runner: BlockRunner, start: int, stream: Tensor, skipped: tuple[int, ...] = ()) -> Any:
    """The model's output when `stream` is what comes before block `start` and the blocks `skipped` are left out."""
    for index in range(start, len(runner.stack)):
        stream = stream if index in skipped else runner.run(index, stream)
    return runner.finish(stream)
