"""Calibration data in, padded and masked batches out."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from hf_compress.errors import CalibrationError

logger = logging.getLogger(__name__)

_INPUTS = ("input_ids", "pixel_values", "input_values", "input_features", "inputs_embeds")
_POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length")


@dataclass(frozen=True)
class Batch:
    """Inputs of one forward pass.

    Attributes:
        inputs: keyword arguments of the model's forward, on the CPU.
        real: bool, (samples, positions): tokens that may enter a statistic; None where every position does (images).
        labels: the class of each sample, (samples), where the data says it.
    """

    inputs: dict[str, Tensor]
    real: Tensor | None
    labels: Tensor | None = None

    @property
    def samples(self) -> int:
        """Number of texts or images."""
        return len(next(iter(self.inputs.values())))


@dataclass(frozen=True)
class Calibration:
    """Batches that can be iterated over as often as a method needs.

    Token ids are kept, as 32-bit integers; activations never are.
    """

    batches: Sequence[Batch]
    truncated: int = 0

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)

    @property
    def samples(self) -> int:
        """Number of texts or images."""
        return sum(batch.samples for batch in self.batches)

    @property
    def tokens(self) -> int:
        """Number of tokens that enter statistics; 0 for data that is no text."""
        return sum(int(batch.real.sum()) for batch in self.batches if batch.real is not None)

    def spread(self, count: int) -> list[Batch]:
        """At most `count` batches, at equal distances."""
        count = min(count, len(self))
        return [self.batches[i * len(self) // count] for i in range(count)]

    def some(self, samples: int, least: int = 1) -> list[Batch]:
        """Batches that hold about `samples` samples, evenly spread over the data, `least` at least."""
        return self.spread(max(least, -(-samples * len(self) // self.samples)))

    def with_special_tokens(self) -> Calibration:
        """The same, but that all tokens count which the model attends to."""
        return replace(self, batches=[_attended(batch) for batch in self.batches])

    def describe(self) -> dict[str, int]:
        """What a report says of the data."""
        return {"samples": self.samples, "tokens": self.tokens, "truncated": self.truncated}


@dataclass(frozen=True)
class DataOptions:
    """How calibration data is read.

    Attributes:
        batch_size: samples in a forward pass.
        max_length: tokens kept of a text; at most, and by default, the model's positions (2,048 where it has no limit).
        text_column: the column of a `datasets.Dataset` that holds the texts; found when there is only one of strings.
    """

    batch_size: int = 8
    max_length: int | None = None
    text_column: str | None = None

    def __post_init__(self) -> None:
        for name in ("batch_size", "max_length"):
            value = getattr(self, name)
            if value is None and name == "max_length":
                continue
            if type(value) is not int or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1; got {value!r}")


def prepare(
    data: Any, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, options: DataOptions | None = None
) -> Calibration:
    """Batches of `data` for `model`.

    Args:
        data: a list of strings, a `datasets.Dataset`, a DataLoader or other iterable of batches (mappings, tensors, or
            (inputs, ...) tuples), a LongTensor of token ids (samples, positions), a float tensor of pixel values
            (samples, channels, height, width) or of other values (samples, features), or a mapping of such tensors, as
            a tokenizer gives it. NumPy arrays are taken for tensors.
        model: whose positions limit the texts' length and whose device the batches will go to.
        tokenizer: needed for texts; its special tokens are kept out of statistics.
        options: batch size, length, text column.

    Raises:
        CalibrationError: the data is missing, empty, or of a kind that is not known; or texts came without a tokenizer.
    """
    if data is None:
        raise CalibrationError("no calibration data: pass calibration=, such as a list of texts with tokenizer=")
    if isinstance(data, Calibration):
        return data
    options = options or DataOptions()
    limit = position_limit(model.config)
    length = min(options.max_length or limit or 2048, limit or 2**31)
    raw, truncated = _raw_batches(data, model, tokenizer, options, length)
    special = special_ids(model.config, tokenizer)
    batches = [_batch(item, special, length, model) for item in raw]
    if not any(batch.samples for batch in batches):
        raise CalibrationError("the calibration data is empty; pass at least a few dozen texts or images")
    if not any(batch.real is None or batch.real.any() for batch in batches):
        raise CalibrationError(
            "the calibration data has no token that counts: all are padding or special tokens; pass longer texts"
        )
    if truncated:
        logger.warning("%d calibration samples are longer than %d positions and were truncated", truncated, length)
    return Calibration(batches, truncated)


def _raw_batches(
    data: Any, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, options: DataOptions, length: int
) -> tuple[list[Any], int]:
    """The data cut into batches of whatever kind it is of, and how many samples are longer than `length`."""
    if _is_dataset(data):
        data = _from_dataset(data, options.text_column)
    data = _as_tensor(data)
    if isinstance(data, str):
        raise CalibrationError(f"calibration must be a list of texts, not one string ({data[:40]!r}...)")
    if isinstance(data, Mapping):
        data = _from_mapping(data, options.batch_size)
    elif isinstance(data, Tensor):
        _check_dimensions(data)
        data = data.split(options.batch_size)
    data = list(_iterate(data))
    if any(isinstance(item, str) for item in data):
        data = _tokenize(data, tokenizer, length)
    if data and all(map(_is_sample, data)):
        data = [item for item in data if item]
        cut = [list(item)[:length] for item in data]
        padded = _pad(cut, _pad_id(model.config, tokenizer), options.batch_size)
        return list(padded), sum(len(item) > length for item in data)
    return data, sum(samples for samples, positions in map(_shape, data) if positions > length)


def position_limit(config: PreTrainedConfig) -> int | None:
    """How many positions the text model has, or None where it says no limit."""
    text = config.get_text_config()
    limits = [value for name in _POSITIONS if isinstance(value := getattr(text, name, None), int) and value > 0]
    # RoBERTa-like models count positions from the padding index on, and so lose as many.
    lost = (getattr(text, "pad_token_id", None) or 0) + 1 if "roberta" in str(text.model_type) else 0
    return min(limits) - lost if limits else None


def special_ids(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase | None) -> Tensor:
    """Ids of beginning, end, padding and other special tokens: the tokenizer's, or else the config's."""
    if tokenizer is not None:
        ids = set(tokenizer.all_special_ids)
    else:
        text = config.get_text_config()
        values = [getattr(text, f"{name}_token_id", None) for name in ("bos", "eos", "pad", "sep", "cls")]
        ids = {i for value in values for i in (value if isinstance(value, list) else [value]) if i is not None}
    return torch.tensor(sorted(ids), dtype=torch.long)


def _iterate(data: Any) -> Iterator[Any]:
    try:
        return iter(data)
    except TypeError:
        raise CalibrationError(
            f"calibration cannot be a {type(data).__name__}; pass texts, a Dataset, a DataLoader or a tensor"
        ) from None


def _is_dataset(data: Any) -> bool:
    return hasattr(data, "column_names") and hasattr(data, "features")


def _from_dataset(data: Any, text_column: str | None) -> Any:
    """The texts, token ids, or pixel or other values of a `datasets.Dataset`."""
    columns = list(data.column_names)
    if text_column is None and "input_ids" in columns:
        plain = data.with_format(None)
        return _unpadded(plain["input_ids"], plain["attention_mask"] if "attention_mask" in columns else None)
    for name in ("pixel_values", "input_values"):
        if text_column is None and name in columns:
            return _stacked(name, [torch.as_tensor(values) for values in data.with_format("torch")[name]])
    strings = [name for name in columns if getattr(data.features[name], "dtype", None) in ("string", "large_string")]
    if text_column is None and "text" in strings:
        text_column = "text"
    if text_column is None and len(strings) == 1:
        text_column = strings[0]
    if text_column not in columns:
        raise CalibrationError(
            f"the dataset has the columns {columns}; name the one with the texts by text_column= (got {text_column!r})"
        )
    return list(data[text_column])


def _stacked(name: str, samples: list[Tensor]) -> dict[str, Tensor]:
    """All samples of a column in one tensor."""
    if len(shapes := {tuple(sample.shape) for sample in samples}) > 1:
        raise CalibrationError(
            f"the samples of the column {name} have different shapes, such as {sorted(shapes)[:2]}: pad them, or "
            "pass a DataLoader of padded batches"
        )
    return {name: torch.stack(samples) if samples else torch.empty(0)}


def _as_tensor(value: Any) -> Any:
    """An array of numbers as a tensor; all else as it is."""
    is_numbers = isinstance(value, np.ndarray) and np.issubdtype(value.dtype, np.number)
    return torch.as_tensor(value) if is_numbers else value


def _from_mapping(data: Mapping[str, Any], batch_size: int) -> list[Any]:
    """What a tokenizer gives for all texts at once, as batches, or as lists of token ids where it is not padded."""
    data = {name: _as_tensor(value) for name, value in data.items()}
    ids = data.get("input_ids")
    if isinstance(ids, list) and all(map(_is_sample, ids)):
        return _unpadded(ids, data.get("attention_mask"))
    tensors = {name: value for name, value in data.items() if isinstance(value, Tensor) and value.ndim}
    sizes = {len(value) for value in tensors.values()}
    if len(tensors) < len(data) or len(sizes) != 1:
        return [data]
    starts = range(0, sizes.pop(), batch_size)
    return [{name: value[start : start + batch_size] for name, value in tensors.items()} for start in starts]


def _unpadded(samples: Any, masks: Any) -> list[list[int]]:
    """Token ids of texts without those that the masks leave out."""
    if masks is None:
        return [list(ids) for ids in samples]
    pairs = zip(samples, masks, strict=True)
    return [[token for token, counts in zip(ids, mask, strict=True) if counts] for ids, mask in pairs]


def _is_sample(item: Any) -> bool:
    """Whether an item is the token ids of one text."""
    return isinstance(item, (list, tuple)) and all(isinstance(token, int) for token in item)


def _tokenize(texts: list[str], tokenizer: PreTrainedTokenizerBase | None, length: int) -> list[list[int]]:
    if other := next(((i, item) for i, item in enumerate(texts) if not isinstance(item, str)), None):
        raise CalibrationError(
            f"calibration must be all texts or none; entry {other[0]} is a {type(other[1]).__name__}: leave it out"
        )
    if tokenizer is None:
        raise CalibrationError("calibration is text: pass tokenizer= as well")
    # One token more than fits, so that truncation can be seen and told.
    encoded = tokenizer(texts, truncation=True, max_length=length + 1)["input_ids"]
    return [ids for ids in encoded if ids]


def _pad_id(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase | None) -> int:
    """Any valid id does, since padding is masked; the model's own is taken where there is one."""
    ids = (getattr(tokenizer, "pad_token_id", None), getattr(config.get_text_config(), "pad_token_id", None))
    return next((i for i in ids if isinstance(i, int)), 0)


def _pad(samples: list[list[int]], pad: int, batch_size: int) -> list[dict[str, Tensor]]:
    """Token ids of texts as right-padded batches with their masks."""
    batches = []
    for start in range(0, len(samples), batch_size):
        rows = [torch.tensor(ids, dtype=torch.int32) for ids in samples[start : start + batch_size]]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad)
        lengths = torch.tensor([len(row) for row in rows])
        mask = (torch.arange(ids.shape[1]) < lengths[:, None]).to(torch.int32)
        batches.append({"input_ids": ids, "attention_mask": mask})
    return batches


def _shape(item: Any) -> tuple[int, int]:
    """Samples and positions of a batch as the user gave it; no positions where it holds no token ids."""
    ids = item.get("input_ids") if isinstance(item, Mapping) else item
    return (ids.shape[0], ids.shape[1]) if isinstance(ids, Tensor) and ids.ndim == 2 else (0, 0)


def _attended(batch: Batch) -> Batch:
    if batch.real is None:
        return batch
    mask = batch.inputs.get("attention_mask", torch.ones_like(batch.real))
    return replace(batch, real=mask.bool()) if mask.shape == batch.real.shape else batch


def _batch(item: Any, special: Tensor, length: int, model: PreTrainedModel) -> Batch:
    """One batch of the user's as keyword arguments and a mask of the tokens that count."""
    labels = None
    if isinstance(item, (list, tuple)) and item and isinstance(item[0], (Tensor, Mapping)):
        item, labels = item[0], item[1] if len(item) == 2 else None  # (inputs, labels), as a TensorDataset gives
    if isinstance(item, Mapping):
        labels = item.get("labels", labels)
    if isinstance(item, Tensor):
        item = {_input_name(item, model): item}
    if not isinstance(item, Mapping) or not any(name in item for name in _INPUTS):
        kind = f"a mapping of {sorted(item)}" if isinstance(item, Mapping) else f"a {type(item).__name__}"
        raise CalibrationError(f"a calibration batch must be a tensor or hold one of {', '.join(_INPUTS)}; got {kind}")
    inputs = _accepted(item, model)
    labels = _classes(labels)
    if "input_ids" not in inputs:
        mask = inputs.get("attention_mask")
        return Batch(inputs, None if mask is None else mask.bool(), labels)
    inputs = {
        n: v[:, :length] if v.ndim == 2 and v.shape == inputs["input_ids"].shape else v for n, v in inputs.items()
    }
    ids = inputs["input_ids"]
    _check_ids(ids, model.config)
    mask = inputs.get("attention_mask", torch.ones_like(ids)).bool()
    if mask.shape != ids.shape:  # MusicGen's ids have a row for every codebook
        return Batch(inputs, mask, labels)
    return Batch(inputs, mask & ~torch.isin(ids.long(), special), labels)


def _classes(labels: Any) -> Tensor | None:
    """The class of each sample; None where the labels are something else, or there are none."""
    labels = None if labels is None else _own(labels)
    return labels if labels is not None and labels.ndim == 1 and not labels.is_floating_point() else None


def _input_name(values: Tensor, model: PreTrainedModel) -> str:
    """Which of the model's inputs a bare tensor is: token ids, or pixel values and the like."""
    if not values.is_floating_point():
        return "input_ids"
    if model.main_input_name != "input_ids":
        return model.main_input_name
    if values.ndim < 3:
        raise CalibrationError(
            f"token ids must be whole numbers; got a tensor of {values.dtype} and shape {tuple(values.shape)}: "
            "convert it by .long()"
        )
    return "pixel_values"


def _accepted(item: Mapping[str, Any], model: PreTrainedModel) -> dict[str, Tensor]:
    """The entries of a batch that the model's forward knows by name, as tensors; labels are not among its inputs."""
    known = inspect.signature(model.forward).parameters
    inputs = {n: _own(v) for n, v in item.items() if n in known and n != "labels" and v is not None}
    if not any(name in inputs for name in _INPUTS):
        raise CalibrationError(
            f"{type(model).__name__} takes none of {', '.join(sorted(map(str, item)))}; its main input is "
            f"{model.main_input_name}"
        )
    return inputs


def _own(values: Any) -> Tensor:
    """A tensor of ours: the user's gets no gradient, and autograd refuses one that was made under inference_mode."""
    tensor = torch.as_tensor(values)
    return tensor.clone() if tensor.is_inference() else tensor.detach()


def _check_dimensions(values: Tensor) -> None:
    if values.ndim < 2:
        raise CalibrationError(
            f"calibration tensors must have the dimensions (samples, positions), or more; got the shape "
            f"{tuple(values.shape)}: add the missing one by .unsqueeze(0)"
        )


def _check_ids(ids: Tensor, config: PreTrainedConfig) -> None:
    """Ids outside the vocabulary would otherwise fail deep inside the embedding."""
    vocabulary = getattr(config.get_text_config(), "vocab_size", None)
    _check_dimensions(ids)
    if ids.is_floating_point():
        raise CalibrationError(f"token ids must be whole numbers; got a tensor of {ids.dtype}")
    if ids.numel() and isinstance(vocabulary, int) and (int(ids.max()) >= vocabulary or int(ids.min()) < 0):
        raise CalibrationError(
            f"token ids run from {int(ids.min())} to {int(ids.max())}, but the model knows 0 to {vocabulary - 1}; "
            "is this the model's own tokenizer?"
        )
