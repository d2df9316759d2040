"""estimate(): what a compress() would take, before it is done."""

from __future__ import annotations

from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

from hf_compress.anatomy.dispatch import computing_device, is_offloaded
from hf_compress.anatomy.residency import resident
from hf_compress.anatomy.stacks import Stack
from hf_compress.api.arguments import check_arguments, prepared
from hf_compress.api.one_method import disk_needed
from hf_compress.calibration.capture import inference
from hf_compress.calibration.compute import Compute, bytes_of, least_memory
from hf_compress.calibration.data import Calibration, DataOptions
from hf_compress.calibration.media import Processor
from hf_compress.calibration.memory import COPIES
from hf_compress.calibration.runner import BlockRunner
from hf_compress.methods.base.context import CalibrationContext
from hf_compress.methods.base.registry import work_for
from hf_compress.methods.base.settings import CompressionConfig
from hf_compress.numerics.defaults import torch_defaults
from hf_compress.plan.tables import html_table

_SIDE = 1024  # of the float32 matrices whose product is timed
_STREAMS = 2  # of each batch that are kept


class Disk(NamedTuple):
    """Bytes of files: new weights in a workdir, at most; streams, for a while; and the saved model, at most.

    Not of what else lies in files for a while: scores, or what weights in memory were before. Streams are None where
    nobody has counted them.
    """

    weights: int
    streams: int | None
    saved: int


@dataclass(frozen=True)
class Estimate:
    """What a compress() would take. Times are for this machine as it is now, from its first block, and rough.

    Attributes:
        seconds: in all; None where nobody has counted what the method does.
        passes: of the calibration data through the model's blocks; 1 is a plain forward pass.
        pass_seconds: of one of them.
        products: multiplications of the solvers.
        memory: bytes, at the peak: the model or what is read of it, streams, and what solving takes.
        disk: bytes of files.
    """

    seconds: float | None
    passes: float | None
    pass_seconds: float
    products: float | None
    memory: int
    disk: Disk

    def __str__(self) -> str:
        """A line each for time, memory and disk."""
        return "\n".join(f"{name}: {told}" for name, told in self._rows())

    def _repr_html_(self) -> str:
        """The same for notebooks."""
        return html_table("estimate", ("", "what it would take"), self._rows())

    def _rows(self) -> list[tuple[str, str]]:
        if self.seconds is None or self.passes is None or self.products is None:
            time = f"not known for this method; a plain pass over the data takes {_time(self.pass_seconds)}"
        else:
            time = (
                f"about {_time(self.seconds)}, for {self.passes:.1f} passes over the data of "
                f"{_time(self.pass_seconds)} each, and {self.products / 1e12:.2f} T multiplications to solve"
            )
        weights, streams, saved = self.disk
        told = (
            "streams for a while (not counted)" if streams is None else f"about {_size(streams)} of streams for a while"
        )
        disk = f"at most {_size(weights)} of new weights in the workdir, {told}, {_size(saved)} saved"
        return [("time", time), ("memory", f"about {_size(self.memory)}"), ("disk", disk)]


@torch_defaults()
def estimate(
    model: PreTrainedModel,
    config: CompressionConfig | str,
    calibration: Any = None,
    tokenizer: Processor | None = None,
    options: DataOptions | None = None,
    compute: Compute | None = None,
    **settings: Any,
) -> Estimate:
    """What `compress` would take with these arguments, without doing it: one block is run on one batch.

    Raises:
        ValueError, TypeError: as `compress`, as far as it looks.
    """
    config = check_arguments(model, config, settings)
    compute = compute or Compute()
    data = prepared(calibration, model, tokenizer, options)
    context = CalibrationContext(model, data)
    stack = context.stack(getattr(config, "stack", None))
    with replace(compute, workdir=None).applied(model):
        one_pass, reading, stream = (0.0, 0.0, 0) if data is None else _measured(model, stack, data)
        device = computing_device(model)
        speed = _products_a_second(device)
    work = work_for(config, context)
    seconds = None
    if work is not None:
        seconds = work.passes * one_pass + work.products / speed + work.sweeps * reading
    held = _STREAMS * stream
    filed = 0 if work is None else round(work.streams * (len(stack) + 1) * stream)
    if device.type == "cpu":
        beyond = max(0, held - _STREAMS * (compute.memory_for(model).streams // COPIES))
        held, filed = held - beyond, filed + beyond
    else:  # they stay on the device
        held, filed = held + filed, 0
    return Estimate(
        seconds,
        None if work is None else work.passes,
        one_pass,
        None if work is None else work.products,
        _memory(model) + held,
        Disk(disk_needed(context, work), None if work is None else filed, bytes_of(model)),
    )


def _measured(model: PreTrainedModel, stack: Stack, data: Calibration) -> tuple[float, float, int]:
    """Seconds of a pass of all the data through the stack, and of reading its blocks once; bytes of the streams."""
    batch = data.batches[0]
    share = bytes_of(stack.blocks[0]) / bytes_of(stack.blocks)
    with inference(model):
        runner = BlockRunner(model, stack, batch)
        stream = runner.start()
        start = perf_counter()
        with resident(stack.blocks[0]):
            reading = perf_counter() - start
            runner.run(0, stream)
            start = perf_counter()
            runner.run(0, stream)
            running = perf_counter() - start
    batches = data.samples / batch.samples
    return running * batches / share, reading / share, round(stream.nbytes * batches)


def _products_a_second(device: torch.device) -> float:
    """Multiplications in float32."""
    matrix = torch.ones(_SIDE, _SIDE, dtype=torch.float32, device=device)
    matrix @ matrix
    start = perf_counter()
    float((matrix @ matrix)[0, 0])
    return _SIDE**3 / (perf_counter() - start)


def _memory(model: PreTrainedModel) -> int:
    """Bytes at the peak, without streams."""
    block, around, squares = least_memory(model)
    return squares + (block + around if is_offloaded(model) else bytes_of(model))


def _size(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"


def _time(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
