"""Samples as a model's inputs: texts through its tokenizer, images and sounds through other parts of a processor."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_compress.calibration.audio import features, heard
from hf_compress.calibration.conversations import has_media, is_conversation, written_out, written_with_media
from hf_compress.calibration.images import mode_read, pixels
from hf_compress.calibration.media import IMAGES, Medium, Processor, reader_of, tokenizer_of
from hf_compress.calibration.padding import pad_id, padded
from hf_compress.calibration.tables import PER_TOKEN, dimensions
from hf_compress.calibration.vocabulary import accepts
from hf_compress.errors import CalibrationError


def raw_batches(
    items: list[Any], model: PreTrainedModel, processor: Processor | None, batch_size: int, length: int
) -> tuple[list[Any], int]:
    """Samples as batches of whatever kind they are of, and how many of them are longer than `length` tokens."""
    tokenizer = tokenizer_of(processor)
    if any(isinstance(item, Medium) for item in items):
        return _media_batches(items, model, processor, batch_size)
    if any(isinstance(item, str) for item in items):
        _check_reads_texts(model)
        items = _tokenize(items, tokenizer, length)
    elif any(map(is_conversation, items)):  # the template writes special tokens too
        _check_reads_texts(model)
        if any(map(has_media, items)):
            return written_with_media(items, processor, batch_size, length), 0
        template = processor if getattr(processor, "chat_template", None) else tokenizer
        items = _tokenize(written_out(items, template), tokenizer, length, add_special_tokens=False)
    if not items or not all(map(_is_row, items)):
        return items, sum(map(partial(_too_long, length), items))
    pad = pad_id(model.config, tokenizer)
    items = [item for item in items if item["input_ids"]]
    rows = [{name: torch.tensor(values[:length], dtype=torch.int32) for name, values in row.items()} for row in items]
    return _cut(rows, batch_size, lambda some: padded(some, pad)), sum(
        any(len(values) > length for values in row.values()) for row in items
    )


def _cut(rows: list[Any], batch_size: int, batch: Callable[[list[Any]], Any]) -> list[Any]:
    return [batch(rows[start : start + batch_size]) for start in range(0, len(rows), batch_size)]


def _check_reads_texts(model: PreTrainedModel) -> None:
    if model.main_input_name != "input_ids" and not accepts(model, "input_ids"):
        raise CalibrationError(
            f"the data is texts, and {type(model).__name__} reads {model.main_input_name}: pass images, sounds or "
            "batches"
        )


def _media_batches(
    items: list[Any], model: PreTrainedModel, processor: Processor | None, batch_size: int
) -> tuple[list[Any], int]:
    """Images or sounds as batches in the model's precision, with their classes, and how many sounds were cut."""
    media = [item for item in items if isinstance(item, Medium)]
    kind = media[0].kind
    if len(media) < len(items) or any(medium.kind is not kind for medium in media):
        raise CalibrationError(f"calibration must be all {kind.name} or none: leave the other samples out")
    if model.main_input_name not in kind.inputs:
        others = "conversations with them" if any(accepts(model, name) for name in kind.inputs) else "what it reads"
        raise CalibrationError(
            f"the data is {kind.name}, and {type(model).__name__} reads {model.main_input_name}: pass {others}"
        )
    if (reader := reader_of(processor, kind)) is None:
        part = kind.reader.replace("_", " ")
        raise CalibrationError(f"calibration is {kind.name}: pass the model's {part}, or processor, as tokenizer=")
    made, cut = (partial(pixels, mode_read(model.config)) if kind is IMAGES else features), 0
    if kind is not IMAGES:
        media, cut = heard(media, reader)
    dtype = next(model.parameters()).dtype

    def batch(some: list[Medium]) -> dict[str, Any]:
        inputs = {name: _no_wider(value, dtype) for name, value in made(some, reader).items()}
        labels = [medium.label for medium in some]
        return inputs if None in labels else inputs | {"labels": torch.tensor(labels)}

    return _cut(media, batch_size, batch), cut


def _no_wider(value: Any, dtype: torch.dtype) -> Any:
    """Numbers in the model's precision, in which it will read them, if that takes less memory."""
    is_wider = isinstance(value, Tensor) and value.is_floating_point() and value.element_size() > dtype.itemsize
    return value.to(dtype) if is_wider else value


def _is_row(item: Any) -> bool:
    """Whether an item is the token ids of one sample, with what else there is of them, as lists."""
    ids = item.get("input_ids") if isinstance(item, Mapping) else None
    return isinstance(ids, list) and dimensions(ids) == 1


def _tokenize(
    texts: list[str], tokenizer: PreTrainedTokenizerBase | None, length: int, add_special_tokens: bool = True
) -> list[Any]:
    """Rows of token ids; texts without any are left out."""
    if other := next(((i, item) for i, item in enumerate(texts) if not isinstance(item, str)), None):
        raise CalibrationError(
            f"calibration must be all texts or none; entry {other[0]} is a {type(other[1]).__name__}: leave it out"
        )
    if tokenizer is None:
        raise CalibrationError("calibration is text: pass tokenizer= as well")
    # One token more than fits, so that truncation can be seen and told.
    settings = {"truncation": True, "max_length": length + 1, "add_special_tokens": add_special_tokens}
    encoded = tokenizer(texts, **settings)["input_ids"]
    return [{"input_ids": ids} for ids in encoded]


def _too_long(length: int, item: Any) -> int:
    """How many samples of a batch of the user's have more tokens than `length`."""
    given = item if isinstance(item, Mapping) else {"input_ids": item}
    tokens = [given.get(name) for name in ("input_ids", *PER_TOKEN)]
    shapes = [ids.shape for ids in tokens if isinstance(ids, Tensor) and ids.ndim == 2]
    return max((samples for samples, positions in shapes if positions > length), default=0)
