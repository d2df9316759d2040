"""Data with a label for each document: texts, pairs of texts, or images, and their labels as a model numbers them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from hf_compress.calibration.files import TO_TEST, is_source, read_rows, unreadable
from hf_compress.calibration.reading import BOUND, has_length
from hf_compress.calibration.tables import table_of

_LABELS = ("label", "labels")
_PAIRS = (
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("question", "passage"),
    ("question", "answer"),
    ("text1", "text2"),
    ("text", "text_pair"),
)
_TEXTS = ("text", "sentence")


@dataclass(frozen=True)
class Labelled:
    """Labelled data, with the names of its columns where they cannot be guessed.

    Attributes:
        data: a `datasets.Dataset`, a DataFrame, a list of rows, or the name of a `.jsonl`, `.json`, `.csv` or
            `.parquet` file, of a folder (of images, one folder a class, too), or of a dataset on the Hub.
        label_column: the labels, ids or names; when not given, "label" or "labels".
        text_columns: the text, or the two texts of a pair; when not given, columns of usual names ("text", "sentence",
            "sentence1" and "sentence2", "premise" and "hypothesis", …), a column of images, or the only one of strings.
    """

    data: Any
    label_column: str | None = None
    text_columns: str | Sequence[str] | None = None


@dataclass(frozen=True)
class Examples:
    """Labelled data as it was read.

    Attributes:
        name: what to call it.
        inputs: for each document its text, or its two, or its image.
        labels: for each document its label, an id or a name.
        label_names: what the data itself calls its ids; None where it does not say.
        images: whether the inputs are images.
    """

    name: str
    inputs: list[Any]
    labels: list[int | str]
    label_names: tuple[str, ...] | None
    images: bool

    def ids(self, config: Any) -> list[int]:
        """The labels as a model numbers them: names by its `label2id`, ids as they are.

        Where the data names its ids and the model knows all of these names, the names count.

        Raises:
            ValueError: a label that the model does not have.
        """
        known = {str(name): int(number) for name, number in (config.label2id or {}).items()}
        by_name = self.label_names is not None and set(self.label_names) <= known.keys()
        return [self._id(row, label, known, int(config.num_labels), by_name) for row, label in enumerate(self.labels)]

    def _id(self, row: int, label: int | str, known: Mapping[str, int], count: int, by_name: bool) -> int:
        if isinstance(label, int) and by_name and self.label_names and 0 <= label < len(self.label_names):
            label = self.label_names[label]
        number = known.get(label) if isinstance(label, str) else label
        if number is None and str(label).isdecimal():
            number = int(label)  # a file of strings
        if number is None or not 0 <= number < count:
            names = ", ".join(map(repr, list(known)[:8])) + (", …" if len(known) > 8 else "")
            raise ValueError(
                f"{self.name}: row {row} has the label {label!r}, but the model has the classes 0 to {count - 1} "
                f"({names}): name the column with the labels by label_column=, or give data with the model's labels"
            )
        return number


def read_labelled(data: Any, limit: int | float | None = None) -> Examples:
    """Read labelled data.

    Args:
        data: a `Labelled`, or what its `data` takes.
        limit: the first so many documents, or a share of them below 1; default all, of data without a length the first
            4,096.

    Raises:
        TypeError: it is none of these.
        FileNotFoundError: no such file or folder.
        CalibrationError: a file that cannot be read.
        ValueError: no rows, or no column that can be told to hold labels or inputs.
    """
    if isinstance(data, Examples):
        return data
    given = data if isinstance(data, Labelled) else Labelled(data)
    rows, features, name = _rows(given.data, limit)
    if not rows:
        raise ValueError(f"{name} holds no rows; expected one for each document, with a text or an image, and a label")
    label_column = _label_column(rows[0], given.label_column, name)
    columns = _input_columns(rows[0], given.text_columns, label_column, name)
    images = _is_image(rows[0][columns[0]])
    inputs = [_input(row, columns, number, name) for number, row in enumerate(rows)]
    labels = [_label(row.get(label_column), number, name) for number, row in enumerate(rows)]
    names = getattr((features or {}).get(label_column), "names", None)
    return Examples(name, inputs, labels, tuple(names) if names else None, images)


def _rows(data: Any, limit: int | float | None) -> tuple[list[Mapping[str, Any]], Any, str]:
    """The rows, what a dataset says of its columns, and the data's name."""
    most = int(limit) if limit is not None and limit >= 1 else None
    name = "labelled data"
    if isinstance(data, (str, Path)):
        if not is_source(data):
            raise ValueError(f"labelled data is {str(data)[:80]!r}; expected rows, or the name of a file or a folder")
        source = str(data)
        name, data = Path(source).name, read_rows(source, most, TO_TEST)
        try:
            rows = list(islice(data, most))
        except (OSError, ValueError, TypeError) as error:
            raise unreadable(source, error) from error
    else:
        rows = _in_memory(data, most)
    if limit is not None and limit < 1:
        rows = rows[: math.ceil(limit * len(rows))]
    return rows, getattr(data, "features", None), name


def _in_memory(data: Any, most: int | None) -> list[Mapping[str, Any]]:
    if not hasattr(data, "features") and (table := table_of(data)) is not None:
        rows: Iterable[Any] = table.rows()
    elif isinstance(data, Iterable) and not isinstance(data, Mapping):
        rows = data
    else:
        raise TypeError(
            f"labelled data cannot be a {type(data).__name__}; pass a Dataset, a list of rows, or the name of a file"
        )
    found = list(islice(rows, most or (None if has_length(rows) else BOUND)))
    for number, row in enumerate(found):
        if not isinstance(row, Mapping):
            raise TypeError(
                f"row {number} of the labelled data is a {type(row).__name__}; expected a mapping, such as "
                '{"text": "…", "label": 1}'
            )
    return found


def _label_column(row: Mapping[str, Any], given: str | None, name: str) -> str:
    column = given or next((known for known in _LABELS if known in row), None)
    if column is None or column not in row:
        there = f"; there is no {given!r}" if given else ""
        raise ValueError(
            f"{name} has the columns {', '.join(map(str, row))}: name the one with the labels by label_column={there}"
        )
    return column


def _input_columns(
    row: Mapping[str, Any], given: str | Sequence[str] | None, label_column: str, name: str
) -> tuple[str, ...]:
    """The column of texts or images, or the two of pairs of texts."""
    others = [column for column in row if column != label_column]
    if given is not None:
        columns = (given,) if isinstance(given, str) else tuple(given)
        if not 1 <= len(columns) <= 2:
            raise ValueError(f"text_columns must name one column, or the two of a pair; got {list(columns)}")
        if missing := [column for column in columns if column not in row]:
            raise ValueError(f"{name} has no column {missing[0]!r} for text_columns=; it has {', '.join(others)}")
        return columns
    strings = [column for column in others if isinstance(row[column], str)]
    pictures = [column for column in others if _is_image(row[column])]
    usual: list[tuple[str, ...]] = [pair for pair in _PAIRS if set(pair) <= set(strings)]
    usual += [(column,) for column in _TEXTS if column in strings]
    if usual:
        return usual[0]
    alone = pictures or strings
    if len(alone) != 1:
        raise ValueError(
            f"{name} has the columns {', '.join(map(str, row))}: name the one with the texts, or the two of a pair, by "
            "text_columns="
        )
    return (alone[0],)


def _input(row: Mapping[str, Any], columns: tuple[str, ...], number: int, name: str) -> Any:
    values = tuple(row.get(column) for column in columns)
    if len(values) == 1 and _is_image(values[0]):
        return values[0]
    for column, value in zip(columns, values, strict=True):
        if not isinstance(value, str):
            raise ValueError(
                f"{name}: row {number} has a {type(value).__name__} in the column {column!r}; expected a text or an "
                "image, as in the other rows"
            )
    return values[0] if len(values) == 1 else values


def _label(value: Any, number: int, name: str) -> int | str:
    if isinstance(value, (float, np.floating)) and float(value).is_integer():
        value = int(value)
    if isinstance(value, (bool, int, np.integer)):
        return int(value)
    if isinstance(value, str):
        return value.strip()
    raise ValueError(
        f"{name}: row {number} has the label {value!r}; expected the id or the name of a class (one for each document, "
        "no numbers to regress on)"
    )


def _is_image(value: Any) -> bool:
    """Whether this is an image of Pillow's."""
    return hasattr(value, "convert") and hasattr(value, "mode")
