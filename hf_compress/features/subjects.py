"""The bottlenecks that a feature report is on: those of a fit, or those spliced into a model."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_compress.anatomy.anatomy import Anatomy
from hf_compress.anatomy.dispatch import computing_device
from hf_compress.anatomy.stacks import Stack
from hf_compress.modules.bottleneck import BOTTLENECK, Bottleneck
from hf_compress.report.history import history_of
from hf_compress.report.report import CompressionReport
from hf_compress.rewrite.bottlenecks import Bottlenecks


@dataclass
class Subject:
    """A bottleneck to report on.

    Attributes:
        stack, layer: where it is.
        module: a copy in float32, on the model's device.
        source: where the stream is read: the module in the model that is handed it; None for the block's output.
        columns: features of the module that count: all, or in training those whose gates are open.
        kept: which of those trained they are, (columns); None where it is not known.
        importance: (features trained); empty where it is not known.
        trained: how many were trained; None where it is not known.
    """

    stack: Stack
    layer: int
    module: Bottleneck
    source: nn.Module | None
    columns: Tensor
    kept: list[int] | None
    importance: list[float] = field(default_factory=list)
    curve: dict[str, list[float]] = field(default_factory=dict)
    trained: int | None = None
    remarks: list[str] = field(default_factory=list)


def given(model: PreTrainedModel, bottlenecks: Bottlenecks) -> list[Subject]:
    stack = Anatomy(model).stack(bottlenecks.stack)
    if not bottlenecks.places:
        raise ValueError("bottlenecks has no places: give what hf_compress.fit returns")
    if beyond := [layer for layer in bottlenecks.layers if not 0 <= layer < len(stack)]:
        raise ValueError(
            f"bottlenecks has one behind block {beyond[0]}, but {stack.path} has the blocks 0 to {len(stack) - 1}: "
            "give those that were fitted to this model"
        )
    subjects = []
    for layer in bottlenecks.layers:
        place = bottlenecks.places[layer]
        module, columns = _copied(place.module, model)
        kept, importance = place.kept[columns.cpu()].tolist(), place.importance.tolist()
        remarks = [f"Training stopped early: {place.stopped}"] if place.stopped else []
        subjects.append(
            Subject(stack, layer, module, None, columns, kept, importance, place.curve, len(importance), remarks)
        )
    return subjects


def spliced(model: PreTrainedModel) -> list[Subject]:
    history = history_of(model)
    subjects = []
    for stack in Anatomy(model).stacks:
        for layer, block in enumerate(stack.blocks):
            source = block._modules.get(BOTTLENECK)
            if isinstance(source, Bottleneck):
                module, columns = _copied(source, model)
                subject = Subject(stack, layer, module, source, columns, None)
                _tell(subject, _told(history, stack.path, layer))
                subjects.append(subject)
    if not subjects:
        raise ValueError(
            f"{type(model).__name__} has no bottlenecks in its blocks: pass bottlenecks=, as hf_compress.fit gives "
            "them, or put them in with hf_compress.rewrite.apply.apply(found.plan(model), model)"
        )
    return subjects


def _told(history: CompressionReport | None, stack: str, layer: int) -> Mapping[str, Any]:
    """What the stage that trained the bottleneck behind a block has noted of it; blocks may have gone since."""
    for stage in reversed(history.stages if history else ()):
        if told := stage.notes.get("bottlenecks"):
            return told.get(str(layer)) or {}
        left = list(stage.survivors(stack))
        if layer >= len(left):
            break
        layer = left[layer]
    return {}


def _copied(module: Bottleneck, model: PreTrainedModel) -> tuple[Bottleneck, Tensor]:
    own = copy.deepcopy(module).to(computing_device(model)).float().requires_grad_(False)
    width = own.encoder.shape[1]
    return own, own.gate.nonzero()[:, 0] if own.form.gated else torch.arange(width, device=own.encoder.device)


def _tell(subject: Subject, entry: Mapping[str, Any]) -> None:
    """What the notes of a compression say of a spliced bottleneck, unless they are of one of another width."""
    width = len(subject.columns)
    if subject.module.form.gated:  # it is being trained, and has all features yet
        subject.kept, subject.trained = subject.columns.tolist(), subject.module.encoder.shape[1]
        return
    if entry.get("features", width) != width:
        entry = {}
    importance, curve, kept = (entry.get(name) for name in ("importance", "curve", "kept"))
    subject.trained = entry.get("of")
    subject.importance = [float(value) for value in importance] if importance is not None else []
    subject.curve = dict(curve or {})
    if entry.get("stopped"):
        subject.remarks.append(f"Training stopped early: {entry['stopped']}")
    trained = subject.trained or width
    if kept is not None and len(kept) == width:
        subject.kept = [int(index) for index in kept]
    elif trained == width:
        subject.kept = list(range(width))
    elif len(subject.importance) == trained and not entry.get("stopped"):
        order = torch.tensor(subject.importance).argsort(descending=True, stable=True)
        subject.kept = sorted(order[:width].tolist())  # training ends with the features of most importance
    if subject.kept is None or not entry:
        subject.remarks.append("Which of the features trained these are is not known: they are numbered as they stand.")
