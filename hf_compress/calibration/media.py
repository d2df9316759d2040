"""Images and sounds among calibration data: where they are found, and the parts of processors that read them."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    FeatureExtractionMixin,
    ImageProcessingMixin,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)

# What turns samples into a model's inputs: a tokenizer for texts, an image processor, a feature extractor for sounds,
# or a processor that has several of these.
Processor = PreTrainedTokenizerBase | ProcessorMixin | ImageProcessingMixin | FeatureExtractionMixin


@dataclass(frozen=True)
class Kind:
    """Images, or sounds.

    Attributes:
        name: in the plural, for messages.
        column: what datasets call a column of them.
        inputs: the model inputs that are made of them.
        suffixes: of files.
        reader: the part of a processor that reads them, by its attribute.
        reader_class: the class of a reader that stands alone.
    """

    name: str
    column: str
    inputs: tuple[str, ...]
    suffixes: tuple[str, ...]
    reader: str
    reader_class: type


IMAGES = Kind(
    "images",
    "image",
    ("pixel_values",),
    (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"),
    "image_processor",
    ImageProcessingMixin,
)
SOUNDS = Kind(
    "sounds",
    "audio",
    ("input_values", "input_features"),
    (".wav", ".flac", ".ogg", ".mp3"),
    "feature_extractor",
    FeatureExtractionMixin,
)
KINDS = (IMAGES, SOUNDS)


@dataclass(frozen=True)
class Medium:
    """An image or a sound as it was found; a file or its bytes, which are opened when their batch is made.

    Attributes:
        kind: which of the two.
        value: a `PIL.Image`; an array of samples, or a mapping of `array` and `sampling_rate`; a mapping of `bytes` and
            `path`, as in datasets; or a path.
        label: its class, where the data says it.
    """

    kind: Kind
    value: Any
    label: int | None = None

    def __str__(self) -> str:
        """The file that it is from, if it is."""
        path = self.value.get("path") if isinstance(self.value, Mapping) else self.value
        return str(path) if isinstance(path, (str, Path)) else f"one of the {self.kind.name}"


def kind_read(model: PreTrainedModel, processor: Processor | None) -> Kind | None:
    """What a model reads in place of texts, as its main input says; None for texts, and for other numbers."""
    for kind in KINDS:
        if model.main_input_name in kind.inputs:
            other_numbers = model.main_input_name == "input_values" and reader_of(processor, kind) is None
            return None if other_numbers else kind
    return None


def reader_of(processor: Processor | None, kind: Kind) -> Any:
    """The image processor or the feature extractor that a processor is, or has; None where there is none."""
    return processor if isinstance(processor, kind.reader_class) else getattr(processor, kind.reader, None)


def tokenizer_of(processor: Any) -> PreTrainedTokenizerBase | None:
    """The tokenizer that a processor is, or has; None where there is none."""
    if isinstance(processor, ProcessorMixin):
        return getattr(processor, "tokenizer", None)
    return None if any(isinstance(processor, kind.reader_class) for kind in KINDS) else processor


def kind_of(value: Any, wanted: Kind | None = None) -> Kind | None:
    """Whether something is an image or a sound.

    Args:
        value: anything.
        wanted: what is to be read. With it, files by their names, their bytes, and arrays (a sound) are taken for that.
    """
    images = sys.modules.get("PIL.Image")  # who has an image has imported it
    if images is not None and isinstance(value, images.Image):
        return IMAGES
    if (isinstance(value, Mapping) and {"array", "sampling_rate"} <= set(value)) or hasattr(value, "get_all_samples"):
        return SOUNDS
    if wanted is None:
        return None
    if is_encoded(value) or (isinstance(value, (str, Path)) and Path(value).suffix.lower() in wanted.suffixes):
        return wanted
    numbers = isinstance(value, (np.ndarray, torch.Tensor)) and value.ndim == 1
    return SOUNDS if wanted is SOUNDS and numbers else None


def is_encoded(value: Any) -> bool:
    """Whether something is a file as datasets have it: its bytes, its path, or both."""
    return isinstance(value, Mapping) and set(value) == {"bytes", "path"}


def media_in(items: Sequence[Any], wanted: Kind | None, labels: Sequence[Any] | None = None) -> list[Medium] | None:
    """Items as images or sounds, with their classes; None where the first is none, or where there are none."""
    kind = kind_of(items[0], wanted) if len(items) else None
    if kind is None:
        return None
    classes = labels if labels is not None and all(isinstance(label, int) for label in labels) else [None] * len(items)
    return [Medium(kind, item, label) for item, label in zip(items, classes, strict=True)]


def files_in(folder: Path, kind: Kind) -> list[Medium]:
    """The images or sounds in a folder and the folders in it, by name; hidden ones are left out."""
    paths = (path for path in folder.rglob("*") if path.suffix.lower() in kind.suffixes and path.is_file())
    shown = (path for path in paths if not any(part.startswith(".") for part in path.relative_to(folder).parts))
    return [Medium(kind, path) for path in sorted(shown)]


def encoded(data: Any) -> Any:
    """A dataset whose images and sounds are not opened when its rows are read, and that needs no library for them."""
    for name, _ in columns_of(data):
        data = data.cast_column(name, type(data.features[name])(decode=False))
    return data


def columns_of(data: Any) -> Iterator[tuple[str, Kind]]:
    """The columns of a dataset that are said to hold images or sounds."""
    for name, feature in (getattr(data, "features", None) or {}).items():
        for kind in KINDS:
            if type(feature).__name__.lower() == kind.column:
                yield name, kind
