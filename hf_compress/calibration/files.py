"""Texts, images and sounds from files, folders and datasets on the Hub, by name."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from hf_compress.calibration.conversations import COLUMN, is_conversation
from hf_compress.calibration.media import KINDS, Kind, Medium, encoded, files_in, kind_of
from hf_compress.calibration.sampling import BOUND, Drawn, choose, from_stream, one, reservoir
from hf_compress.calibration.tables import likely_column, table_of, table_of_rows
from hf_compress.errors import CalibrationError

_BUILDERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
ROWS = 1_000_000  # of a file that are looked at, to draw some
_AT_ONCE = 1000  # rows that are read together
TO_LEARN, TO_TEST = ("train",), ("test", "validation")  # splits, where several are there and none is named
_LONGEST = 1000  # characters of a name: a text has more
_HUB_NAME = re.compile(r"^\w[\w.-]*(/\w[\w.-]*)?(:[\w.-]+){0,2}$")


def load_texts(source: str | Path, text_column: str | None = None, limit: int | None = None) -> list[Any]:
    """All texts, or conversations, that `load` finds under a name; or the first `limit`.

    Raises:
        FileNotFoundError, CalibrationError: as for `load`.
        ValueError: `limit` is below 1.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"the number of texts must be at least 1; got {limit}")
    return _load(str(source), text_column, limit, None, splits=TO_TEST).items


def load(
    source: str | Path,
    text_column: str | None = None,
    max_samples: int | None = None,
    seed: int | None = 0,
    wanted: Kind | None = None,
) -> Drawn:
    """Texts, conversations, images or sounds of a file, a folder or a dataset on the Hub; empty texts are left out.

    Args:
        source: one of
            - a `.txt` file: every paragraph is a text, paragraphs being separated by blank lines. (A whole file as one
              text would be cut off at the model's positions.)
            - a `.jsonl`, `.json`, `.csv` or `.parquet` file, with a text a row;
            - a folder written by `datasets.Dataset.save_to_disk`, or one with files of the kinds above;
            - a dataset on the Hub: `name`, `name:configuration` or `name:configuration:split`, such as
              `Salesforce/wikitext:wikitext-2-raw-v1`;
            - a folder of images or sounds, those in its folders included, whose names are not read as classes; or one
              such file. Datasets may hold them too.
        text_column: the column that holds them; when not given, "text", "messages", or else the only one of strings; or
            the one of images or sounds, where these are wanted.
        max_samples: so many are drawn; all when not given, but `BOUND` of images and sounds, and of a dataset on the
            Hub. Of files the first `ROWS` rows are looked at; of a dataset on the Hub those that its shuffling reads
            (see `from_stream`).
        seed: for the draw; None for the first ones.
        wanted: what a model reads in place of texts; a folder that holds nothing else gives images or sounds, too.

    Raises:
        FileNotFoundError: no such file or folder.
        CalibrationError: a kind of file that is not known, a dataset that cannot be read, a missing column, no texts
            or images.
    """
    there = os.path.exists(source)
    count = max_samples if there else max_samples or BOUND
    drawn = _media(Path(source), count or BOUND, seed, wanted) or _load(str(source), text_column, count, seed, wanted)
    drawn.tell(asked=max_samples is not None)
    return replace(drawn, source=str(source), asked=max_samples, drawn_with=seed)


def _media(path: Path, count: int, seed: int | None, wanted: Kind | None) -> Drawn | None:
    """The images or sounds that are files at a path; None where it names something else, or files of texts."""
    if path.is_file():
        found = [Medium(kind, path) for kind in KINDS if path.suffix.lower() in kind.suffixes]
        return Drawn(found, 1, 1) if found else None
    if not path.is_dir() or _is_saved(path):
        return None
    rows = any(file.suffix in (".txt", *_BUILDERS) for file in path.rglob("*"))
    if wanted is not None and (media := files_in(path, wanted)):
        return choose(media, count, seed)
    if wanted is None and not rows:  # so that a model of texts can say that these are none
        return next((choose(media, count, seed) for kind in KINDS if (media := files_in(path, kind))), None)
    if wanted is not None and not rows:
        raise CalibrationError(f"{path} holds no {wanted.name}: no {', '.join(wanted.suffixes)} file, and no dataset")
    return None


def _is_saved(path: Path) -> bool:
    """Whether `datasets` has written a folder by `save_to_disk`."""
    return (path / "state.json").exists() or (path / "dataset_dict.json").exists()


def _load(
    source: str,
    text_column: str | None,
    count: int | None,
    seed: int | None,
    wanted: Kind | None = None,
    splits: Sequence[str] = TO_LEARN,
) -> Drawn:
    path = Path(source)
    if not source:
        raise FileNotFoundError("texts come from a file, a folder or a dataset on the Hub; got ''")
    if path.is_file() and path.suffix == ".txt":
        paragraphs = [part.strip() for part in re.split(r"\n\s*\n", _read(path))]
        drawn = reservoir(paragraphs, count or len(paragraphs), seed, len(paragraphs))
    else:
        rows = read_rows(source, count, splits)
        try:
            drawn = _of_rows(rows, source, text_column, count, seed, wanted)
        except (OSError, ValueError, TypeError) as error:  # files are parsed as they are read
            raise unreadable(source, error) from error
    if not drawn.items:
        what = "texts" if wanted is None else wanted.name
        raise CalibrationError(f"{source} holds no {what}; calibration needs at least a few dozen")
    return drawn


def _of_rows(
    rows: Any, source: str, text_column: str | None, count: int | None, seed: int | None, wanted: Kind | None
) -> Drawn:
    """`count` samples of rows, or all of them."""
    rows = encoded(rows)
    if (first := next(iter(rows), None)) is None:
        return Drawn([], 0, 0)
    local = os.path.exists(source)
    if wanted is not None and any(kind_of(v, wanted) for n, v in first.items() if text_column in (None, n)):
        return _media_of_rows(rows, text_column, count or BOUND, seed, wanted, local)
    column = _column(first, source, text_column)
    checked = partial(_checked, source, column, ", ".join(first))
    if hasattr(rows, "__len__"):
        return choose(rows[column], count or len(rows), seed, lambda value: one(checked(value)))
    texts = partial(_texts, column, checked)
    if count is None or local:
        return reservoir(texts(rows), count or 2**63, seed, 2**63 if seed is None else ROWS)
    return from_stream(rows, count, seed, texts)


def _media_of_rows(rows: Any, column: str | None, count: int, seed: int | None, wanted: Kind, local: bool) -> Drawn:
    """`count` images or sounds of rows, with their classes."""
    if (table := table_of(rows)) is not None:
        return table.sample(count, seed, column, wanted)
    drawn = reservoir(rows, count, seed, ROWS) if local else from_stream(rows, count, seed)
    return replace(drawn, items=table_of_rows(drawn.items).sample(count, seed, column, wanted).items)


def _texts(column: str, checked: Callable[[Any, int], Any], rows: Any) -> Iterator[Any]:
    """The texts or conversations of rows that stream, with those that are empty."""
    values = (value for batch in rows.iter(_AT_ONCE) for value in batch[column])
    return (checked(value, number) for number, value in enumerate(values))


def _checked(source: str, column: str, columns: str, value: Any, number: int | None = None) -> Any:
    """A text or a conversation; an empty text where there is none."""
    if value and not isinstance(value, str) and not is_conversation(value):
        row = "a row" if number is None else f"row {number}"
        raise CalibrationError(
            f"{source}: {row} has a {type(value).__name__} in the column {column!r}, not a text; name another column "
            f"of {columns}"
        )
    return value or ""


def is_source(data: Any) -> bool:
    """Whether something names a file, a folder or a dataset for `load`, and is no text."""
    if isinstance(data, Path):
        return True
    if not isinstance(data, str) or not 0 < len(data) < _LONGEST or "\n" in data:
        return False
    return bool(_HUB_NAME.match(data)) or data.endswith((".txt", *_BUILDERS)) or os.path.exists(data)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CalibrationError(f"{path} is not UTF-8 text ({error}): convert it, for instance by iconv") from None


def read_rows(source: str, limit: int | None = None, splits: Sequence[str] = TO_LEARN) -> Any:
    """The rows of a file (read as they are asked for), a folder, or a dataset on the Hub, all but a `.txt` file.

    Args:
        source: as for `load_texts`.
        limit: of a dataset on the Hub no more than this is read.
        splits: which of several is read, where none is named: the first of these that there is.

    Raises:
        FileNotFoundError: no such file or folder.
        CalibrationError: a kind of file that is not known, or a dataset that cannot be read.
    """
    from datasets import load_dataset, load_from_disk

    path = Path(source)
    if path.is_file():
        if path.suffix not in _BUILDERS:
            known = ", ".join([".txt", *_BUILDERS])
            raise CalibrationError(f"{source}: texts are read from {known} files and folders; not from {path.suffix!r}")
        try:
            return _one_split(load_dataset(_BUILDERS[path.suffix], data_files=source, streaming=True), source, splits)
        except StopIteration:  # it asks for the first row, and there is none
            return []
    try:
        if path.is_dir():
            saved = _is_saved(path)
            return _one_split(load_from_disk(source) if saved else load_dataset(source, streaming=True), source, splits)
        return _from_hub(source, limit, splits)
    except FileNotFoundError as error:
        raise FileNotFoundError(_nothing_there(source)) from error
    except (OSError, ValueError) as error:
        raise unreadable(source, error) from error


def _from_hub(source: str, limit: int | None, splits: Sequence[str]) -> Any:
    from datasets import load_dataset

    if not _HUB_NAME.match(source) or Path(source).suffix in (".txt", *_BUILDERS):
        raise FileNotFoundError(_nothing_there(source))
    name, configuration, split = [*source.split(":"), None, None][:3]
    return _one_split(load_dataset(name, configuration, split=split, streaming=limit is not None), source, splits)


def _nothing_there(source: str) -> str:
    return f"{source}: no such file or folder, nor a dataset on the Hub that can be reached"


def unreadable(source: str, error: Exception) -> CalibrationError:
    """The error to raise where rows could not be read; files are parsed as they are iterated over."""
    if isinstance(error, CalibrationError):
        return error
    cause = error.__cause__ or error  # datasets wraps what the parser says
    return CalibrationError(f"{source} cannot be read: {type(cause).__name__}: {' '.join(str(cause).split())[:300]}")


def _one_split(data: Any, source: str, wanted: Sequence[str]) -> Any:
    """The only split of a dataset, or the first of several that is called as is wanted."""
    if not isinstance(data, Mapping):
        return data
    if len(data) == 1:
        return next(iter(data.values()))
    found = next((name for name in wanted if name in data), None)
    if found is None:
        raise CalibrationError(
            f"{source} has the splits {', '.join(map(str, data))} and none called {' or '.join(wanted)}: name one, as "
            f"in name:configuration:{next(iter(data))}"
        )
    return data[found]


def _column(row: Mapping[str, Any], source: str, column: str | None) -> str:
    """The column to take the texts from."""
    strings = [name for name, value in row.items() if isinstance(value, str)]
    if column is None:
        column = likely_column("text" in row, is_conversation(row.get(COLUMN)), strings)
    if column not in row:
        raise CalibrationError(
            f"{source} has the columns {', '.join(row)}: name the one with the texts by text_column="
            + (f"; there is no {column!r}" if column else "")
        )
    return str(column)
