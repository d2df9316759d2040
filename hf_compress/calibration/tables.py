"""Data in columns: datasets, streaming or not, DataFrames, Arrow tables, and mappings of lists."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_compress.calibration.conversations import COLUMN, is_conversation
from hf_compress.calibration.media import Kind, Medium, columns_of, encoded, is_encoded, kind_of, media_in
from hf_compress.calibration.sampling import BOUND, Drawn, choose, drawn_from, indices
from hf_compress.errors import CalibrationError

VALUES = ("pixel_values", "input_values", "input_features")
PER_TOKEN = ("labels", "decoder_input_ids", "decoder_attention_mask")  # in encoder-decoders of a length of their own


@dataclass(frozen=True)
class Table:
    """Columns of samples.

    Attributes:
        names: of the columns.
        strings: of those that hold strings.
        column: the values under a name.
        length: how many samples there are.
        rows_at: the table of the samples at some indices.
        media: the columns that are known to hold images or sounds.
    """

    names: Sequence[str]
    strings: Sequence[str]
    column: Callable[[str], Any]
    length: int
    rows_at: Callable[[Sequence[int]], Table]
    media: Mapping[str, Kind]

    def sample(
        self, count: int | None, seed: int | None, text_column: str | None = None, wanted: Kind | None = None
    ) -> Drawn:
        """`count` samples, or all of them, in their order, drawn with a seed or the first ones.

        They are texts or conversations; or rows of token ids, with labels of tokens; or other values in one tensor; or
        images or sounds, where these are wanted, or there is nothing else.
        """
        if text_column is None and not {"input_ids", *VALUES}.isdisjoint(self.names):
            some = self if count is None else self.rows_at(indices(self.length, count, seed))
            return drawn_from(some._numbers(), some.length, self.length, seed)
        if (name := self._media_column(text_column, wanted)) is not None:
            some = self.rows_at(indices(self.length, count or BOUND, seed))
            return drawn_from(some._media(name, wanted), some.length, self.length, seed)
        column = self.column(self._text_column(text_column))
        if count is None:
            return drawn_from(list(column), self.length, self.length, seed)
        return choose(column, count, seed)

    def _media_column(self, given: str | None, wanted: Kind | None) -> str | None:
        """The column of images or sounds to read; None where texts are to be read."""
        if given is not None or (wanted is None and self._likely_column() is not None):
            return given if self._kind(given, wanted) is not None else None
        found = [name for name in self.names if self._kind(name, wanted) is not None]
        usual = [name for name in found if wanted is not None and name == wanted.column]
        return next(iter(usual + found), None)

    def _kind(self, name: str | None, wanted: Kind | None) -> Kind | None:
        if name is None or name not in self.names:
            return None
        if (known := self.media.get(name)) is not None:
            return known if wanted in (None, known) else None
        first = next((value for value in self.column(name) if value is not None), None)
        return kind_of(first, wanted)

    def _media(self, name: str, wanted: Kind | None) -> list[Medium]:
        labels = next((list(self.column(name)) for name in ("label", "labels") if name in self.names), None)
        return media_in(list(self.column(name)), self.media.get(name, wanted), labels) or []

    def _numbers(self) -> list[Any] | dict[str, Tensor]:
        if "input_ids" in self.names:
            return self._token_rows()
        name = next(name for name in VALUES if name in self.names)
        return {name: _stacked(name, list(self.column(name)))} | self._labels()

    def rows(self) -> list[dict[str, Any]]:
        """The samples, with all there is of them."""
        columns = [self.column(name) for name in self.names]
        return [dict(zip(self.names, row, strict=True)) for row in zip(*columns, strict=True)]

    def _token_rows(self) -> list[dict[str, Any]]:
        columns = {name: _lists(self.column(name)) for name in ("input_ids", "attention_mask") if name in self.names}
        for name in PER_TOKEN:
            if name in self.names and dimensions(values := _lists(self.column(name))) == 2:
                columns[name] = values
        masks = columns.pop("attention_mask", None) if len(columns) == 2 else None
        if masks is not None:  # of texts alone, padding can be taken off
            columns["input_ids"] = [_unpadded(*pair) for pair in zip(columns["input_ids"], masks, strict=True)]
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]

    def _labels(self) -> dict[str, Tensor]:
        """Labels of tokens, as beside sounds and pictures, in one tensor; none where there are no such."""
        labels = _lists(self.column("labels")) if "labels" in self.names else []
        if dimensions(labels) != 2:
            return {}
        rows = [torch.as_tensor(row) for row in labels]
        return {"labels": torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-100)}

    def _has_conversations(self) -> bool:
        values = self.column(COLUMN) if COLUMN in self.names else []
        return any(map(is_conversation, values[:1]))

    def _likely_column(self) -> str | None:
        return likely_column("text" in self.strings, self._has_conversations(), self.strings)

    def _text_column(self, given: str | None) -> str:
        column = given
        if given is None:
            column = self._likely_column()
        if column is None or column not in self.names:
            raise CalibrationError(
                f"the data has the columns {list(self.names)}; name the one with the texts by text_column= (got "
                f"{given!r}), or pass it alone, as a list; pass numbers as a tensor"
            )
        return column


def likely_column(text: bool, conversations: bool, strings: Sequence[str]) -> str | None:
    """The column to read where none is named: "text" or "messages", where there are any, or the only one of strings."""
    return "text" if text else COLUMN if conversations else strings[0] if len(strings) == 1 else None


def table_of(data: Any) -> Table | None:
    """Data with columns as a table; None for any other, and for what streams, whose columns may not be known."""
    if hasattr(data, "to_pydict"):  # Arrow
        return _of_columns(data.to_pydict())
    if hasattr(data, "columns") and hasattr(data, "to_dict"):  # pandas, polars
        return _of_columns({str(name): data[name].to_list() for name in data.columns})
    if isinstance(data, Mapping):
        is_table = bool(data) and all(isinstance(values, (list, tuple)) for values in data.values())
        return _of_columns(data) if is_table and not is_row(data) else None
    if not hasattr(data, "column_names") or not hasattr(data, "__len__"):
        return None
    return _of_dataset(data)


def _of_dataset(data: Any) -> Table:
    media = dict(columns_of(data))
    data = encoded(data)
    names = list(data.column_names)
    strings = [name for name in names if getattr(data.features[name], "dtype", None) in ("string", "large_string")]
    return Table(
        names,
        strings,
        column=lambda name: data.with_format("torch" if name in VALUES else None)[name],
        length=len(data),
        rows_at=lambda chosen: _of_dataset(data.select(chosen)),
        media=media,
    )


def table_of_rows(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Samples by name as a table. The first one says what there is."""
    names = list(rows[0]) if rows else []
    for number, row in enumerate(rows):
        if missing := [name for name in names if name not in row]:
            raise CalibrationError(f"sample {number} has no {missing[0]!r}, as the first one has: leave it out")
    return _of_columns({name: [row[name] for row in rows] for name in names})


def _of_columns(columns: Mapping[str, Any]) -> Table:
    strings = [name for name, values in columns.items() if any(isinstance(value, str) for value in values)]
    return Table(
        list(columns),
        strings,
        column=columns.__getitem__,
        length=len(next(iter(columns.values()), ())),
        rows_at=lambda chosen: _of_columns({n: [values[i] for i in chosen] for n, values in columns.items()}),
        media={},
    )


def is_row(item: Any) -> bool:
    """Whether this is one sample by name: with a text, an image, a conversation, or token ids in one dimension."""
    if not isinstance(item, Mapping) or any(name in item for name in VALUES):
        return False
    if "input_ids" in item:
        return dimensions(item["input_ids"]) == 1
    if is_encoded(item) or kind_of(item) is not None:
        return False
    held = any(isinstance(value, str) or is_encoded(value) or kind_of(value) is not None for value in item.values())
    return held or is_conversation(item.get(COLUMN))


def dimensions(value: Any) -> int:
    """How many a tensor, an array or nested lists have; 0 for anything else."""
    if isinstance(value, (list, tuple)):
        return 1 + (dimensions(value[0]) if value else 0)
    return getattr(value, "ndim", 0)


def _lists(values: Any) -> list[Any]:
    return [value.tolist() if isinstance(value, (Tensor, np.ndarray)) else value for value in values]


def _unpadded(ids: Sequence[int], mask: Sequence[int]) -> list[int]:
    """Token ids of a text without those that the mask leaves out."""
    return [token for token, counts in zip(ids, mask, strict=True) if counts]


def _stacked(name: str, samples: Sequence[Any]) -> Tensor:
    """All samples of a column in one tensor."""
    tensors = [torch.as_tensor(sample) for sample in samples]
    if len(shapes := {tuple(tensor.shape) for tensor in tensors}) > 1:
        raise CalibrationError(
            f"the samples of the column {name} have different shapes, such as {sorted(shapes)[:2]}: pad them, or "
            "pass a DataLoader of padded batches"
        )
    return torch.stack(tensors) if tensors else torch.empty(0)
