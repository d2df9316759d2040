"""Calibration data in, padded and masked batches out."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_compress.calibration.audio import SECONDS
from hf_compress.calibration.conversations import is_conversation
from hf_compress.calibration.decoder import has_decoder, one_later, read_before, start_id
from hf_compress.calibration.encoding import raw_batches
from hf_compress.calibration.files import is_source, load
from hf_compress.calibration.media import SOUNDS, Kind, Processor, kind_read, tokenizer_of
from hf_compress.calibration.padding import pad_id
from hf_compress.calibration.reading import check_dimensions, read
from hf_compress.calibration.sampling import Drawn
from hf_compress.calibration.tables import PER_TOKEN
from hf_compress.calibration.vocabulary import accepts, beyond, check_ids, position_limit, special_ids
from hf_compress.checks import check_fields, setting
from hf_compress.errors import CalibrationError

logger = logging.getLogger(__name__)

_INPUTS = ("input_ids", "pixel_values", "input_values", "input_features", "inputs_embeds")


@dataclass(frozen=True)
class Batch:
    """Inputs of one forward pass.

    Attributes:
        inputs: keyword arguments of the model's forward, on the CPU.
        real: bool, (samples, positions): tokens that may enter a statistic; None where every position does (images).
        labels: the class of each sample, (samples), where the data says it.
        targets: the labels of a language model's tokens, (samples, positions), where the data has any: -100 for what
            is not to be learned. Losses and what relevance explains are of them alone; statistics of all real tokens.
        decoded: `real` of what the decoder of an encoder-decoder reads, (samples, positions of the decoder).
    """

    inputs: dict[str, Tensor]
    real: Tensor | None
    labels: Tensor | None = None
    targets: Tensor | None = None
    decoded: Tensor | None = None

    @property
    def samples(self) -> int:
        """Number of texts or images."""
        return len(next(iter(self.inputs.values())))

    def first(self, count: int) -> Batch:
        """The first samples, whole: what is tied together across positions, as an image's tokens, stays so.

        All of them, where a tensor has no entry for each sample (patches of pictures in one row): nothing tells whose
        is what.
        """
        fields = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        if any(not value.ndim or len(value) != self.samples for value in (*self.inputs.values(), *fields.values())):
            return self
        inputs = {name: value[:count] for name, value in self.inputs.items()}
        return replace(self, inputs=inputs, **{name: value[:count] for name, value in fields.items()})

    def few(self, positions: int, least: int, most: int) -> Batch:
        """The first samples, as many as have about so many positions together: `least` to `most` of them."""
        counts = [value.shape[1:].numel() for value in self.inputs.values() if not value.is_floating_point()]
        return self.first(max(least, min(most, positions // max([1, *counts]))))


@dataclass(frozen=True)
class Calibration:
    """Batches that can be iterated over as often as a method needs.

    Token ids are kept, as 32-bit integers; activations never are.

    Attributes:
        batches: what there is, in order.
        truncated: how many samples were cut: texts at the model's positions, sounds after 30 seconds.
        origin: where the samples are from and how they were drawn, as a report says it (see `Drawn.facts`).
    """

    batches: Sequence[Batch]
    truncated: int = 0
    origin: Mapping[str, int | str] = field(default_factory=dict)

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
        return self.about(samples, self.samples, least)

    def about(
        self, amount: int, total: int, least: int = 1, rounded: Callable[[float], int] = math.ceil
    ) -> list[Batch]:
        """As many batches, evenly spread, as hold about `amount` of the `total` tokens or samples; `least` at least."""
        return self.spread(max(least, rounded(amount * len(self) / max(1, total))))

    def with_special_tokens(self) -> Calibration:
        """The same, but that all tokens count which the model attends to."""
        return replace(self, batches=[_attended(batch) for batch in self.batches])

    def describe(self) -> dict[str, int | str]:
        """What a report says of the data: `source`, `of` and `seed` where there is such a thing, and the amounts."""
        return {**self.origin, "samples": self.samples, "tokens": self.tokens, "truncated": self.truncated}


@dataclass(frozen=True)
class DataOptions:
    """How calibration data is read.

    Attributes:
        batch_size: samples in a forward pass.
        max_length: tokens kept of a text; at most, and by default, the model's positions (2,048 where it has no limit).
        text_column: the column of a table (a Dataset, a DataFrame) that holds the texts or conversations; found when it
            is called "text" or "messages", or there is only one of strings. Or that of images or sounds.
        max_samples: how many are used; all when not given, but 4,096 of images and sounds, and of what has no length,
            such as a generator, a streaming dataset, or one on the Hub. A batch of the user's is not cut.
        seed: with which they are drawn, each as likely as any other, where there are more; None for the first ones.
            They stay in their order. Of what has no length they are drawn from the first 10,000 (or `max_samples`, if
            that is more), of a file from its first 1,000,000 rows. A streaming dataset is shuffled by its own means,
            in a buffer of 10,000. Batches of a DataLoader or a generator are the first ones: who makes batches says
            what comes first.
    """

    batch_size: int = setting(8, within="[1, inf)")
    max_length: int | None = setting(None, within="[1, inf)")
    text_column: str | None = None
    max_samples: int | None = setting(None, within="[1, inf)")
    seed: int | None = setting(0, within="[0, inf)")

    def __post_init__(self) -> None:
        check_fields(self)

    def facts(self) -> dict[str, int | str]:
        """What a report says of how data was read that came by name, so that it can be read so again."""
        given = {"batch_size": self.batch_size, "max_length": self.max_length, "text_column": self.text_column}
        return {name: value for name, value in given.items() if value is not None}


def prepare(
    data: Any, model: PreTrainedModel, tokenizer: Processor | None, options: DataOptions | None = None
) -> Calibration:
    """Batches of `data` for `model`.

    Args:
        data: a list of strings, or of conversations (lists of messages with role and content), a table (a
            `datasets.Dataset`, streaming or not, a DataFrame), a DataLoader or other iterable of batches (mappings,
            tensors, or (inputs, ...) tuples), a LongTensor of token ids (samples, positions), a float tensor of pixel
            values (samples, channels, height, width) or of other values (samples, features), or a mapping of such
            tensors, as a tokenizer gives it. NumPy arrays are taken for tensors. For a model that reads images, a list
            of `PIL.Image`s or of file names, or a table with a column of images; for one that reads sounds, a list of
            arrays (positions) at the rate of its feature extractor, of mappings of `array` and `sampling_rate`, or of
            file names, or a table with a column of them. Or the name of a file, a folder or a dataset on the Hub that
            holds texts, images or sounds (see `load`).
            An encoder-decoder is given its labels, or what its decoder reads, with the inputs; where there are
            neither, it is to repeat its text.
        model: whose positions limit the texts' length and whose device the batches will go to.
        tokenizer: needed for texts; its special tokens are kept out of statistics. For images the model's image
            processor, for sounds its feature extractor; a processor that has several of these serves for all.
        options: batch size, length, text column, how many samples to draw.

    Raises:
        CalibrationError: the data is missing, empty, or of a kind that is not known; or texts came without a tokenizer.
    """
    if data is None:
        raise CalibrationError("no calibration data: pass calibration=, such as a list of texts with tokenizer=")
    if isinstance(data, Calibration):
        return data
    options = options or DataOptions()
    if is_conversation(data):
        raise CalibrationError("the data is a single conversation: pass a list of them, [conversation]")
    wanted = kind_read(model, tokenizer)
    drawn = draw(data, options, wanted)
    limit = position_limit(model.config)
    length = min(options.max_length or limit or 2048, limit or 2**31)
    raw, truncated = raw_batches(drawn.items, model, tokenizer, options.batch_size, length)
    special = special_ids(model.config, tokenizer_of(tokenizer))
    batches = [_batch(item, special, length, model) for item in raw]
    if not any(batch.samples for batch in batches):
        raise CalibrationError("the calibration data is empty; pass at least a few dozen texts or images")
    if not any(batch.real is None or batch.real.any() for batch in batches):
        raise CalibrationError(
            "the calibration data has no token that counts: all are padding or special tokens; pass longer texts"
        )
    labelled = [batch.targets for batch in batches if batch.targets is not None]
    if labelled and not any(bool((targets != -100).any()) for targets in labelled):
        raise CalibrationError(
            "the labels of all tokens are -100, so nothing is to be learned: give some, or leave them out"
        )
    if truncated:
        most = f"{SECONDS} seconds" if wanted is SOUNDS else f"{length} positions"
        logger.warning("%d calibration samples are longer than %s and were truncated", truncated, most)
    read_as = options.facts() if drawn.source else {}
    return Calibration(batches, truncated, {**drawn.facts(), **read_as})


def draw(data: Any, options: DataOptions, wanted: Kind | None = None) -> Drawn:
    """Samples of whatever `prepare` takes, as they are; what was drawn already stays as it is.

    `wanted` is what a model reads in place of texts.
    """
    if isinstance(data, Drawn):
        return data
    if is_source(data):
        return load(data, options.text_column, options.max_samples, options.seed, wanted)
    return read(data, options.text_column, options.max_samples, options.batch_size, options.seed, wanted)


def _attended(batch: Batch) -> Batch:
    real = _all_of(batch.real, batch.inputs.get("attention_mask"))
    if batch.decoded is None or "decoder_input_ids" in batch.inputs:
        return replace(batch, real=real, decoded=_all_of(batch.decoded, batch.inputs.get("decoder_attention_mask")))
    return replace(batch, real=real, decoded=None if real is None else one_later(real))


def _all_of(real: Tensor | None, mask: Tensor | None) -> Tensor | None:
    """What the model attends to, of tokens of which some are special."""
    if real is None or (mask is not None and mask.shape != real.shape):
        return real
    return torch.ones_like(real) if mask is None else mask.bool()


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
    classes, targets = _labels(labels, model)
    batch = Batch(inputs, _mask_of(inputs), classes, targets)
    if "input_ids" in inputs:
        batch = _with_text(batch, special, length, model)
    return _with_decoder(batch, special, length, model) if has_decoder(model) else batch


def _mask_of(inputs: Mapping[str, Tensor]) -> Tensor | None:
    mask = inputs.get("attention_mask")
    return None if mask is None else mask.bool()


def _with_text(batch: Batch, special: Tensor, length: int, model: PreTrainedModel) -> Batch:
    """A batch whose text is checked, cut to `length`, and masked."""
    shape, targets = batch.inputs["input_ids"].shape, batch.targets
    inputs = {n: v[:, :length] if v.ndim == 2 and v.shape == shape else v for n, v in batch.inputs.items()}
    ids = inputs["input_ids"]
    check_dimensions(ids)
    mask = inputs.get("attention_mask", torch.ones_like(ids)).bool()
    if mask.shape != ids.shape:  # MusicGen's ids have a row for every codebook
        check_ids(ids, model.config.get_text_config())
        return replace(batch, inputs=inputs, real=mask)
    # At padding any token does: one that was added to the tokenizer alone has no embedding.
    inputs["input_ids"] = ids = ids.masked_fill(~mask, pad_id(model.config, None)) if beyond(ids, model) else ids
    check_ids(ids, model.config.get_text_config())
    if targets is not None and not has_decoder(model):
        if targets.shape != shape:
            raise CalibrationError(
                f"labels of tokens must be of the shape of the token ids, {tuple(shape)}; got {tuple(targets.shape)}"
            )
        targets = targets[:, :length].masked_fill(~mask, -100)
        check_ids(targets.masked_fill(targets == -100, 0), model.config.get_text_config())
    return replace(batch, inputs=inputs, real=mask & ~torch.isin(ids.long(), special), targets=targets)


def _with_decoder(batch: Batch, special: Tensor, length: int, model: PreTrainedModel) -> Batch:
    """A batch that says what the decoder reads, if the data does: its ids, or labels, which it reads shifted."""
    inputs, targets = dict(batch.inputs), batch.targets
    if "decoder_input_ids" not in inputs and targets is not None:
        inputs["decoder_input_ids"] = read_before(model, targets)
    ids = inputs.get("decoder_input_ids")
    if ids is None and batch.real is not None:
        return replace(batch, decoded=one_later(batch.real))
    if ids is None or ids.ndim != 2:
        return batch
    mask = inputs.get("decoder_attention_mask", torch.ones_like(ids)).bool()
    if mask.shape != ids.shape or (targets is not None and targets.shape != ids.shape):
        raise CalibrationError(
            f"the decoder reads ids of shape {tuple(ids.shape)}; its mask and labels must be as many: "
            f"got {tuple(mask.shape)} and {tuple(ids.shape if targets is None else targets.shape)}"
        )
    cut = {name: inputs[name][:, :length] for name in PER_TOKEN if name in inputs}
    ids, mask = cut["decoder_input_ids"], mask[:, :length]
    check_ids(ids, model.config.get_text_config(decoder=True))
    pad = getattr(model.config, "pad_token_id", None)
    own = torch.tensor([start_id(model), *([] if pad is None else [pad])])
    if targets is not None:
        targets = targets[:, :length].masked_fill(~mask, -100)
        if pad is not None and pad != getattr(model.config, "eos_token_id", None):
            targets = targets.masked_fill(targets == pad, -100)  # of whom did not put -100 there
        check_ids(targets.masked_fill(targets == -100, 0), model.config.get_text_config(decoder=True))
    decoded = mask & ~torch.isin(ids.long(), torch.cat([special, own]))
    return replace(batch, inputs=inputs | cut, targets=targets, decoded=decoded)


def _labels(labels: Any, model: PreTrainedModel) -> tuple[Tensor | None, Tensor | None]:
    """The class of each sample, or the labels of a language model's tokens; neither where labels are something else."""
    labels = None if labels is None else _own(labels)
    if labels is None or labels.is_floating_point():
        return None, None
    return labels if labels.ndim == 1 else None, labels if labels.ndim == 2 and model.can_generate() else None


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
    inputs = {n: _own(v) for n, v in item.items() if accepts(model, n) and n != "labels" and v is not None}
    if not any(name in inputs for name in _INPUTS):
        raise CalibrationError(
            f"{type(model).__name__} takes none of {', '.join(sorted(map(str, item)))}; its main input is "
            f"{model.main_input_name}"
        )
    return inputs


def _own(values: Any) -> Tensor:
    """A tensor of ours, on the CPU: the user's gets no gradient, and autograd refuses one made under inference_mode."""
    tensor = torch.as_tensor(values).cpu()
    return tensor.clone() if tensor.is_inference() else tensor.detach()
