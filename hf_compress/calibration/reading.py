"""Containers of samples, as users have them, into plain lists of texts, rows of token ids, or batches."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_compress.calibration.conversations import is_conversation
from hf_compress.calibration.files import is_source, load_texts
from hf_compress.calibration.tables import Table, dimensions, is_row, table_of, table_of_rows
from hf_compress.errors import CalibrationError

logger = logging.getLogger(__name__)

BOUND = 4096  # samples: what has no length (a generator, a streaming dataset) may have no end
_BOUNDED = (
    "the data has no length, so only its first %d samples are read: pass a list to have all of them, or "
    "DataOptions(max_samples=) for another number"
)


def read(data: Any, text_column: str | None = None, max_samples: int | None = None, batch_size: int = 8) -> list[Any]:
    """What a container holds: texts; rows, which are mappings of `input_ids` and labels (positions); or batches.

    Args:
        data: a list or another iterable of texts, of lists of token ids, of rows, or of batches; a table (see
            `table_of`); a tensor or an array; a mapping of tensors.
        text_column: the column of a table that holds the texts.
        max_samples: so many are read, the first ones, and the rest of the batch that the last of them is in; all when
            not given, but `BOUND` of what has no length.
        batch_size: of the batches that tensors are cut into.

    Raises:
        CalibrationError: it iterates over something else than samples, or no column can be told to be the texts.
    """
    content = _content(data, text_column, max_samples)
    if isinstance(content, Mapping):
        return _batches(content, batch_size, max_samples)
    if isinstance(content, Tensor):
        check_dimensions(content)
        return list(content[:max_samples].split(batch_size))
    return content


def _content(data: Any, text_column: str | None, max_samples: int | None) -> Any:
    """The data as a list, a mapping, or a tensor."""
    if isinstance(data, (str, bytes)):
        raise CalibrationError(f"the data must be a list of texts, not one string ({data[:40]!r}...): pass [text]")
    if isinstance(data, (set, frozenset)):
        raise CalibrationError("the data is a set, which has another order in every run: pass a list")
    data = _only_split(_as_tensor(data))
    if isinstance(table := table_of(data), Table):
        content = table.content(text_column)
        return content[:max_samples] if isinstance(content, list) else content
    if isinstance(data, (Mapping, Tensor)):
        return data
    items = take(data, max_samples)
    if items and (all(map(is_row, items)) or hasattr(data, "column_names")):
        return table_of_rows(items).content(text_column)
    return [{"input_ids": list(item)} for item in items] if all(map(_is_ids, items)) else items


def read_texts(data: Any) -> list[str]:
    """The texts of a list, another iterable or a table, read as by `read`; or of a file, by its name (`load_texts`).

    Raises:
        TypeError: there is something else than texts.
        CalibrationError: no column can be told to be the texts.
    """
    if is_source(data):
        data = texts_of(data)
    if isinstance(data, str):
        raise TypeError("texts is a single string; expected several documents: pass [text].")
    texts = read(data)
    for number, text in enumerate(texts):
        if not isinstance(text, str):
            kind = "conversation" if is_conversation(text) else type(text).__name__
            raise TypeError(f"texts[{number}] is a {kind}; expected a string.")
    return texts


def texts_of(source: str | Path, text_column: str | None = None, max_samples: int | None = None) -> list[Any]:
    """What `load_texts` finds under a name; of a dataset on the Hub the first `BOUND` when not told otherwise."""
    endless = max_samples is None and not os.path.exists(source)
    texts = load_texts(source, text_column, BOUND if endless else max_samples)
    if endless and len(texts) == BOUND:
        logger.warning(_BOUNDED, len(texts))
    return texts


def take(data: Any, max_samples: int | None = None) -> list[Any]:
    """The items of an iterable that hold the first `max_samples` samples.

    All when not given; but of what has no length those with the first `BOUND` samples, and a warning if there are more.
    """
    bound = max_samples or (None if has_length(data) else BOUND)
    items: list[Any] = []
    count = 0
    for item in _iterate(data):
        if bound is not None and count >= bound:
            if max_samples is None:
                logger.warning(_BOUNDED, count)
            break
        items.append(item)
        count += _samples(item)
    return items


def has_length(data: Any) -> bool:
    """Whether it can be said how much there is; of a generator or a stream it cannot."""
    try:
        len(data)
    except TypeError:  # a DataLoader of a stream has __len__, and raises
        return False
    return True


def _iterate(data: Any) -> Iterator[Any]:
    try:
        return iter(data)
    except TypeError:
        raise CalibrationError(
            f"the data cannot be a {type(data).__name__}; pass texts, a Dataset, a DataLoader or a tensor"
        ) from None


def _samples(item: Any) -> int:
    """How many samples an item holds. An empty batch is one too: endlessly many would never reach a bound."""
    if isinstance(item, (list, tuple)) and item and isinstance(item[0], (Tensor, Mapping)):
        item = item[0]  # (inputs, labels)
    if isinstance(item, Mapping):
        item = next((value for value in item.values() if dimensions(value) > 1), None)
    return max(1, len(item)) if item is not None and not _is_ids(item) and dimensions(item) > 1 else 1


def _only_split(data: Any) -> Any:
    """The dataset of a DatasetDict that holds no other."""
    splits = isinstance(data, Mapping) and bool(data) and all(hasattr(one, "column_names") for one in data.values())
    if not splits:
        return data
    first, *others = data
    if others:
        raise CalibrationError(f"the data has the splits {', '.join(map(str, data))}: pass one, as data[{first!r}]")
    return data[first]


def _as_tensor(value: Any) -> Any:
    """An array of numbers as a tensor; all else as it is."""
    is_numbers = isinstance(value, np.ndarray) and np.issubdtype(value.dtype, np.number)
    return torch.as_tensor(value) if is_numbers else value


def _batches(data: Mapping[str, Any], batch_size: int, max_samples: int | None) -> list[Any]:
    """A mapping of tensors cut into batches; one batch where that cannot be."""
    data = {name: _as_tensor(value) for name, value in data.items()}
    tensors = {name: value for name, value in data.items() if isinstance(value, Tensor) and value.ndim}
    sizes = {len(value) for value in tensors.values()}
    if len(tensors) < len(data) or len(sizes) != 1:
        return [data]
    samples = min(sizes.pop(), max_samples or 2**63)
    parts = [value[:samples].split(batch_size) for value in tensors.values()]
    return [dict(zip(tensors, part, strict=True)) for part in zip(*parts, strict=True)] if samples else []


def check_dimensions(values: Tensor) -> None:
    """Raise unless a tensor has a dimension for samples and one for positions."""
    if values.ndim < 2:
        raise CalibrationError(
            f"calibration tensors must have the dimensions (samples, positions), or more; got the shape "
            f"{tuple(values.shape)}: add the missing one by .unsqueeze(0)"
        )


def _is_ids(item: Any) -> bool:
    """Whether an item is the token ids of one text."""
    return isinstance(item, (list, tuple)) and all(isinstance(token, int) for token in item)
