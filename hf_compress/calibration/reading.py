"""Containers of samples, as users have them, into plain lists of texts, rows of token ids, or batches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_compress.calibration.conversations import is_conversation
from hf_compress.calibration.files import is_source, load
from hf_compress.calibration.media import Kind, encoded, media_in
from hf_compress.calibration.sampling import (
    BOUND,
    POOL,
    Drawn,
    choose,
    drawn_from,
    from_stream,
    indices,
    one,
    reservoir,
)
from hf_compress.calibration.tables import Table, dimensions, is_row, table_of, table_of_rows
from hf_compress.errors import CalibrationError


def read(
    data: Any,
    text_column: str | None = None,
    max_samples: int | None = None,
    batch_size: int = 8,
    seed: int | None = 0,
    wanted: Kind | None = None,
) -> Drawn:
    """What a container holds: texts, images or sounds; rows, mappings of `input_ids` and labels (positions); batches.

    Args:
        data: a list or another iterable of texts, of images, of sounds, of lists of token ids, of rows, or of batches;
            a table (see `table_of`); a tensor or an array; a mapping of tensors.
        text_column: the column of a table that holds the texts.
        max_samples: so many are drawn, and the rest of the batch that the last of them is in; all when not given, but
            `BOUND` of images and sounds, and of what has no length.
        batch_size: of the batches that tensors are cut into.
        seed: for the draw; None for the first ones. Batches that are made as they are asked for, by a DataLoader, are
            always the first ones.
        wanted: what a model reads in place of texts.

    Raises:
        CalibrationError: it iterates over something else than samples, or no column can be told to be the texts.
    """
    drawn = _drawn(data, text_column, max_samples, seed, wanted)
    drawn.tell(asked=max_samples is not None)
    if isinstance(drawn.items, Mapping):
        return replace(drawn, items=_batches(drawn.items, batch_size))
    if isinstance(drawn.items, Tensor):
        return replace(drawn, items=list(drawn.items.split(batch_size)))
    return drawn


def _drawn(data: Any, text_column: str | None, max_samples: int | None, seed: int | None, wanted: Kind | None) -> Drawn:
    """Samples of the data, as a list, a mapping, or a tensor."""
    if isinstance(data, (str, bytes)):
        raise CalibrationError(f"the data must be a list of texts, not one string ({data[:40]!r}...): pass [text]")
    if isinstance(data, (set, frozenset)):
        raise CalibrationError("the data is a set, which has another order in every run: pass a list")
    data = _only_split(_as_tensor(data))
    if isinstance(table := table_of(data), Table):
        return table.sample(max_samples, seed, text_column, wanted)
    if isinstance(data, Mapping):
        return _of_tensors({name: _as_tensor(value) for name, value in data.items()}, max_samples, seed)
    if isinstance(data, Tensor):
        check_dimensions(data)
        chosen = indices(len(data), max_samples, seed)
        return drawn_from(data if max_samples is None else data[chosen], len(chosen), len(data), seed)
    drawn = take(data, max_samples, seed)
    items = drawn.items
    if media := media_in(items, wanted):
        drawn = choose(media, max_samples or BOUND, seed) if drawn.all_there_are else replace(drawn, items=media)
    elif items and (all(map(is_row, items)) or hasattr(data, "column_names")):
        table = table_of_rows(items)
        found = table.sample(max_samples, seed, text_column, wanted)
        drawn = found if drawn.all_there_are else replace(drawn, items=found.items)
    elif all(map(_is_ids, items)):
        drawn = replace(drawn, items=[{"input_ids": list(item)} for item in items])
    return drawn


def read_texts(data: Any) -> list[str]:
    """The texts of a list, another iterable or a table, read as by `read`; or of a file, by its name (`load`).

    Of what has no length, the first `BOUND`.

    Raises:
        TypeError: there is something else than texts.
        CalibrationError: no column can be told to be the texts.
    """
    if is_source(data):
        data = load(data, seed=None)
    if isinstance(data, str):
        raise TypeError("texts is a single string; expected several documents: pass [text].")
    texts = data.items if isinstance(data, Drawn) else read(data, seed=None).items
    for number, text in enumerate(texts):
        if not isinstance(text, str):
            kind = "conversation" if is_conversation(text) else type(text).__name__
            raise TypeError(f"texts[{number}] is a {kind}; expected a string.")
    return texts


def take(data: Any, max_samples: int | None = None, seed: int | None = 0) -> Drawn:
    """The items of a container or a stream that hold `max_samples` samples, drawn as `read` says."""
    if max_samples is None and has_length(data):
        items = list(_iterate(data))
        return Drawn(items, len(items), len(items))
    bound = max_samples or BOUND
    if has_length(data) and hasattr(data, "__getitem__"):
        indexed = data.to_list() if hasattr(data, "to_list") else data  # a Series has names for its items
        return choose(indexed, bound, seed, _samples)
    if hasattr(data, "column_names"):
        return from_stream(encoded(data), bound, seed)
    stream = _iterate(data)
    if (first := next(stream, None)) is None:
        return Drawn([], 0, 0)
    whole = chain([first], stream)
    if _batched(first) is not None:
        return _first(whole, bound)
    return reservoir(whole, bound, seed, len(data) if has_length(data) else POOL)


def _first(batches: Iterable[Any], count: int) -> Drawn:
    """The batches that hold the first `count` samples. Who makes batches has decided what comes first."""
    found: list[Any] = []
    held = 0
    for batch in batches:
        if held >= count:
            return Drawn(found, held, more=True)
        found.append(batch)
        held += _samples(batch)
    return Drawn(found, held, held)


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
    values = _batched(item)
    return one(item) if values is None else max(1, len(values))


def _batched(item: Any) -> Any:
    """What has a row for each sample, in an item that is a batch; None where it is a single sample."""
    if isinstance(item, (list, tuple)) and item and isinstance(item[0], (Tensor, Mapping)):
        item = item[0]  # (inputs, labels)
    if isinstance(item, Mapping):
        return next((value for value in item.values() if dimensions(value) > 1), None)
    return item if dimensions(item) > 1 and not _is_ids(item) else None


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


def _of_tensors(data: Mapping[str, Any], max_samples: int | None, seed: int | None) -> Drawn:
    """Samples of a mapping of tensors; all of it where not every tensor has a row for each sample."""
    if (samples := _rows_of(data)) is None:
        return Drawn(data, 1, 1)
    if max_samples is None:
        return Drawn(data, samples, samples)
    chosen = indices(samples, max_samples, seed)
    return drawn_from({name: value[chosen] for name, value in data.items()}, len(chosen), samples, seed)


def _sized(data: Mapping[str, Any]) -> dict[str, Tensor]:
    return {name: value for name, value in data.items() if isinstance(value, Tensor) and value.ndim}


def _rows_of(data: Mapping[str, Any]) -> int | None:
    """How many rows all tensors have; None where they differ, or something has none."""
    sizes = {len(value) for value in _sized(data).values()}
    return sizes.pop() if len(sizes) == 1 and len(_sized(data)) == len(data) else None


def _batches(data: Mapping[str, Any], batch_size: int) -> list[Any]:
    """A mapping of tensors cut into batches; one batch where that cannot be."""
    if (samples := _rows_of(data)) is None:
        return [data]
    parts = [value.split(batch_size) for value in data.values()]
    return [dict(zip(data, part, strict=True)) for part in zip(*parts, strict=True)] if samples else []


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
