"""Trained bottlenecks of a model: looked through, spliced into it, written to a folder and read again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from hf_compress.anatomy.anatomy import Anatomy, Block
from hf_compress.anatomy.stacks import Stack
from hf_compress.calibration.capture import (
    StopForward,
    forward,
    hooked,
    inference,
    stream_of_output,
    stream_tokens,
    watch_blocks,
    with_stream,
)
from hf_compress.calibration.data import Calibration, DataOptions, prepare
from hf_compress.calibration.media import Processor
from hf_compress.calibration.progress import bar
from hf_compress.calibration.statistics import pool
from hf_compress.errors import CalibrationError
from hf_compress.modules.bottleneck import BOTTLENECK, Bottleneck, Form
from hf_compress.modules.packed import unpack_bits
from hf_compress.modules.sparse import pack_mask
from hf_compress.numerics.tensor_file import read_tensors, write_tensors
from hf_compress.plan.plan import Plan
from hf_compress.rewrite.builders import insert_bottleneck

_FILE = "bottlenecks.safetensors"
_VERSION = 1
_POINTS = 200  # of a curve, at most twice as many, in a report


@dataclass
class FittedBottleneck:
    """The bottleneck behind one block.

    Attributes:
        module: in float32.
        importance: of every feature that was trained, (features) float32, kept or not.
        kept: which of them the module has, in rising order, (width).
        curve: by name ("step", "retention", "error", "active"), a number a step: the share kept, the squared error of
            ĥ relative to the variance of h on that step's tokens, and the features active in the mean.
        stopped: why training stopped early; empty if it did not.
    """

    module: Bottleneck
    importance: Tensor
    kept: Tensor
    curve: dict[str, list[float]] = field(default_factory=dict)
    stopped: str = ""


@dataclass
class Bottlenecks:
    """What `hf_compress.fit` gives: bottlenecks behind some blocks of a model, which is left as it was.

    Attributes:
        stack: path of the residual stack.
        places: by the index of the block.
        config: the settings they were trained with.
        tokens: how many they were trained on.
    """

    stack: str
    places: dict[int, FittedBottleneck]
    config: dict[str, Any]
    tokens: int = 0

    @property
    def layers(self) -> list[int]:
        """Indices of the blocks."""
        return sorted(self.places)

    def plan(self, model: PreTrainedModel) -> Plan:
        """To put them into `model` for good: `hf_compress.rewrite.apply.apply(found.plan(model), model)`."""
        stack, plan = Anatomy(model).stack(self.stack), Plan()
        for index in self.layers:
            plan += insert_bottleneck(Block(model, stack, index), self.places[index].module)
        places = {str(index): _summary(place) for index, place in sorted(self.places.items())}
        return Plan(plan.edits, plan.tensors, {"tokens": self.tokens, "bottlenecks": places})

    @contextmanager
    def spliced(self, model: PreTrainedModel, layers: list[int] | None = None) -> Iterator[None]:
        """While it lasts, what leaves the blocks passes through their bottlenecks, in float32."""

        def through(index: int) -> Callable[[Tensor], Tensor]:
            module = self.places[index].module
            return lambda stream: module.to(stream.device)(stream.float()).to(stream.dtype)

        changes = {index: through(index) for index in (self.layers if layers is None else layers)}
        with replaced_streams(Anatomy(model).stack(self.stack), changes):
            yield

    def read(self, model: PreTrainedModel, data: Calibration) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Of each batch and block: the block's index, its stream (samples, positions, hidden) in float32, and the mask
        of its real tokens (samples, positions). The pass ends after the last of the blocks."""
        stack, last = Anatomy(model).stack(self.stack), self.layers[-1]
        found: list[tuple[int, Tensor]] = []

        def keep(index: int, before: Tensor, after: Tensor) -> None:
            if index in self.places:
                found.append((index, after.float()))
            if index == last:
                raise StopForward

        for batch in bar(data.batches, "reading streams"):
            found.clear()
            with inference(model), watch_blocks(stack, keep):
                forward(model, batch)
            for index, stream in found:
                yield index, stream, stream_tokens(stack, batch, stream)

    @torch.no_grad()
    def pooled(
        self,
        model: PreTrainedModel,
        data: Any,
        tokenizer: Processor | None = None,
        options: DataOptions | None = None,
    ) -> dict[int, tuple[Tensor, Tensor]]:
        """By block, a row for each text: the mean over its real tokens of their codes, (samples, features), and of
        their streams, (samples, hidden). On the CPU, in float32; data as for `compress`.

        Raises:
            CalibrationError: a text without a single real token.
        """
        rows: dict[int, list[tuple[Tensor, Tensor]]] = {layer: [] for layer in self.layers}
        for layer, stream, real in self.read(model, prepare(data, model, tokenizer, options)):
            if not bool(real.any(1).all()):
                raise CalibrationError("a text has no token that counts, so nothing of it can be pooled: leave it out")
            code, _ = self.places[layer].module.to(stream.device).encode(stream)
            rows[layer].append((pool(code, real, "mean"), pool(stream, real, "mean")))
        return {
            layer: (torch.cat([code for code, _ in parts]), torch.cat([stream for _, stream in parts]))
            for layer, parts in rows.items()
        }

    def save(self, folder: str | Path) -> Path:
        """Write them into a folder, whole or not at all; `Bottlenecks.load` reads them again."""
        path = Path(folder) / _FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors: dict[str, Tensor] = {}
        facts: dict[str, Any] = {}
        for index, place in self.places.items():
            mask = torch.zeros(len(place.importance), dtype=torch.bool)
            mask[place.kept] = True
            facts[str(index)] = {"form": asdict(place.module.form), "curve": place.curve, "stopped": place.stopped}
            own = {"importance": place.importance, "kept": pack_mask(mask)} | place.module.state_dict()
            tensors |= {f"{index}.{name}": tensor for name, tensor in own.items()}
        whole = {"version": _VERSION, "stack": self.stack, "config": self.config, "tokens": self.tokens}
        write_tensors(path, tensors, whole | {"places": facts})
        return path

    @staticmethod
    def load(folder: str | Path) -> Bottlenecks:
        """What `save` wrote.

        Raises:
            ValueError: the folder has no such file, or one of a newer version.
        """
        path = Path(folder) / _FILE
        if not path.is_file():
            raise ValueError(f"{folder} has no {_FILE}: give the folder that Bottlenecks.save wrote to")
        whole, tensors = read_tensors(path)
        if whole.get("version") != _VERSION:
            raise ValueError(f"{path} has version {whole.get('version')}, known is {_VERSION}: upgrade hf-compress")
        places = {}
        for index, facts in whole["places"].items():
            own = {n.partition(".")[2]: t for n, t in tensors.items() if n.partition(".")[0] == index}
            importance, mask = own.pop("importance"), own.pop("kept")
            hidden, width = own["encoder"].shape
            module = Bottleneck(hidden, width, Form(**facts["form"]), dtype=own["encoder"].dtype)
            module.load_state_dict(own)
            module.requires_grad_(False)
            kept = unpack_bits(mask[None])[0, : len(importance)].nonzero()[:, 0]
            places[int(index)] = FittedBottleneck(module, importance, kept, facts["curve"], facts["stopped"])
        return Bottlenecks(whole["stack"], places, whole["config"], whole["tokens"])


@contextmanager
def replaced_streams(stack: Stack, changes: Mapping[int, Callable[[Tensor], Tensor]]) -> Iterator[None]:
    """Have what leaves blocks replaced: behind a bottleneck that stands there, and before anyone collects it."""

    def hook(index: int) -> RemovableHandle:
        def change(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
            return with_stream(output, changes[index](stream_of_output(output)))

        block = stack.blocks[index]
        last: Any = block._modules.get(BOTTLENECK, block)
        return last.register_forward_hook(change, prepend=True)

    with hooked(hook(index) for index in changes):
        yield


def _summary(place: FittedBottleneck) -> dict[str, Any]:
    """What a report says of a place."""
    last = {name: values[-1] for name, values in place.curve.items() if values}
    thinned = {name: values[:: -max(1, len(values) // _POINTS)][::-1] for name, values in place.curve.items()}
    return {
        "features": len(place.kept),
        "of": len(place.importance),
        **last,
        "stopped": place.stopped,
        "curve": thinned,
        "importance": place.importance.tolist(),
        "kept": place.kept.tolist(),
    }
