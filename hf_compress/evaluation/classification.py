"""Accuracy and F1 of classifiers of texts and of images on labelled data, with standard errors."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_compress.calibration.capture import forward, inference
from hf_compress.calibration.data import Batch
from hf_compress.calibration.images import mode_read, pixels
from hf_compress.calibration.media import IMAGES, Medium
from hf_compress.calibration.padding import pad_id, padded
from hf_compress.calibration.progress import meter
from hf_compress.calibration.vocabulary import position_limit
from hf_compress.checks import check
from hf_compress.evaluation.kinds import check_classifies
from hf_compress.evaluation.labelled import Examples, Labelled, read_labelled
from hf_compress.evaluation.scores import ByDocument, TaskScore

MACRO = "macro"
_LONGEST = 10**9  # a tokenizer that does not know its model's length says more


@dataclass(frozen=True)
class Classification:
    """How well a classifier does on labelled data.

    Attributes:
        name: What the data is called.
        accuracy: The share of documents whose label the model gives the highest logit.
        accuracy_standard_error: s / sqrt(n) of the hits; NaN for a single document.
        f1: Of two classes the F1 of the second (id 1), the positive one; of more, macro F1: the mean over the classes
            that occur among labels or predictions.
        f1_standard_error: By a bootstrap of 1,000 draws of the documents with a fixed seed.
        f1_of: Which F1 it is: "macro", or the name of the positive class.
        documents: Number of documents.
        truncated: How many of them were longer than the model's positions, and cut.
        by_document: The label and the prediction of each document, by name, in the order of the data.
    """

    name: str
    accuracy: float
    accuracy_standard_error: float
    f1: float
    f1_standard_error: float
    f1_of: str
    documents: int
    truncated: int = 0
    by_document: tuple[tuple[str, str], ...] = field(default=(), repr=False)

    @property
    def hits(self) -> tuple[bool, ...]:
        """For each document whether the model gives its label."""
        return tuple(label == predicted for label, predicted in self.by_document)

    def scores(self) -> tuple[TaskScore, TaskScore]:
        """Accuracy and F1 in the form of the scores of tasks, to be compared document by document."""
        keys = [(number, label) for number, (label, _) in enumerate(self.by_document)]
        hits = ByDocument(dict(zip(keys, self.hits, strict=True)))
        pairs = ByDocument(dict(zip(keys, self.by_document, strict=True)), _F1(self.f1_of))
        f1 = "macro F1" if self.f1_of == MACRO else f"F1 of {self.f1_of}"
        return (
            TaskScore(self.name, "accuracy", self.accuracy, self.accuracy_standard_error, True, self.documents, hits),
            TaskScore(self.name, f1, self.f1, self.f1_standard_error, True, self.documents, pairs),
        )

    def to_dict(self) -> dict[str, Any]:
        """As plain data, without the documents."""
        return {name: value for name, value in vars(self).items() if name != "by_document"}

    def __str__(self) -> str:
        return f"accuracy {self.accuracy:.4f} ± {self.accuracy_standard_error:.4f} on {self.documents:,} documents"


def classify(
    model: PreTrainedModel,
    data: Any,
    processor: Any = None,
    *,
    label_column: str | None = None,
    text_columns: str | Sequence[str] | None = None,
    batch_size: int = 8,
    limit: int | float | None = None,
) -> Classification:
    """Measure how often a classifier of texts, of pairs of texts, or of images is right.

    Args:
        model: An `…ForSequenceClassification` or `…ForImageClassification`, in memory, run on its device and in its
            dtype; left as it is.
        data: Labelled documents, which the model must not have been trained or calibrated on: a `Dataset`, a list of
            rows, a file, a folder of images, or a `Labelled`.
        processor: The tokenizer, or the image processor.
        label_column: The column of the labels: ids, or names that the config's `label2id` knows.
        text_columns: The column of the texts, or the two columns of pairs.
        batch_size: Documents that go through the model at once.
        limit: The first so many documents, or a share of them below 1.

    Raises:
        UnsupportedModelError: the model is no classifier, or reads something else than the data holds.
        TypeError: no data, or a processor of another kind.
        ValueError: a column that is not there, a label that the model does not have, a missing processor.
    """
    check("batch_size", batch_size, int, "[1, inf)")
    check("limit", limit, float | None, "(0, inf)")
    reads = check_classifies(type(model), model.config)
    if not isinstance(data, (Labelled, Examples)):
        data = Labelled(data, label_column, text_columns)
    examples = read_labelled(data, limit)
    if examples.images != (reads == "images"):
        raise ValueError(
            f"{examples.name} holds {'images' if examples.images else 'texts'}, but {type(model).__name__} reads "
            f"{reads}: name the column by text_columns=, or give other data"
        )
    if processor is None:
        kind = "image processor" if examples.images else "tokenizer"
        raise ValueError(f"labelled data needs the model's {kind}, and none was given or found: pass it")
    labels = examples.ids(model.config)
    predicted, truncated = _predictions(model, examples, processor, batch_size)
    return _summarise(model, examples, labels, predicted, truncated)


def _predictions(model: PreTrainedModel, examples: Examples, processor: Any, batch_size: int) -> tuple[list[int], int]:
    """The class with the highest logit for each document, and how many documents were cut."""
    truncated = 0
    if examples.images:
        batches = _image_batches(model, examples.inputs, processor, batch_size)
    else:
        rows, truncated = _token_rows(model, examples.inputs, processor)
        if _pad_token(model) is None:
            batch_size = 1  # a decoder finds a text's last token by its padding
        batches = _text_batches(model, rows, processor, batch_size)
    found: dict[int, int] = {}
    with inference(model), meter(len(examples.inputs), examples.name, "doc") as shown:
        for numbers, inputs in batches:
            logits = forward(model, Batch(inputs, None)).logits.float()
            if not bool(torch.isfinite(logits).all()):
                raise ValueError(
                    f"the logits on {examples.name} are not finite: load the model in float32 or bfloat16, or check "
                    "what was done to its weights"
                )
            found.update(zip(numbers, logits.argmax(-1).tolist(), strict=True))
            shown.update(len(numbers))
    return [found[number] for number in range(len(found))], truncated


def _token_rows(model: PreTrainedModel, inputs: Sequence[Any], tokenizer: Any) -> tuple[list[dict[str, Any]], int]:
    """What the tokenizer makes of each text or pair, cut to the model's positions, and how many were cut."""
    if not hasattr(tokenizer, "all_special_ids"):
        raise TypeError(f"processor is a {type(tokenizer).__name__}; expected the model's tokenizer for texts")
    limits = [position_limit(model.config), tokenizer.model_max_length]
    longest = min((limit for limit in limits if limit is not None and limit < _LONGEST), default=None)
    wanted = inspect.signature(model.forward).parameters
    rows, truncated = [], 0
    for one in inputs:
        texts = (one,) if isinstance(one, str) else one
        row = tokenizer(*texts, truncation=False, padding=False, verbose=False)
        if longest is not None and len(row["input_ids"]) > longest:
            row = tokenizer(*texts, truncation=True, max_length=longest, padding=False, verbose=False)
            truncated += 1
        rows.append({name: ids for name, ids in row.items() if name in wanted})
    return rows, truncated


def _text_batches(
    model: PreTrainedModel, rows: list[dict[str, Any]], tokenizer: Any, batch_size: int
) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
    """Numbers of documents and their inputs, the longest first: little padding in a batch."""
    order = sorted(range(len(rows)), key=lambda number: -len(rows[number]["input_ids"]))
    own = _pad_token(model)
    pad = own if own is not None else pad_id(model.config, tokenizer)
    for start in range(0, len(order), batch_size):
        numbers = order[start : start + batch_size]
        yield numbers, padded([rows[number] for number in numbers], pad)


def _pad_token(model: PreTrainedModel) -> int | None:
    return getattr(model.config.get_text_config(), "pad_token_id", None)


def _image_batches(
    model: PreTrainedModel, images: Sequence[Any], processor: Any, batch_size: int
) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
    mode = mode_read(model.config)
    for start in range(0, len(images), batch_size):
        numbers = list(range(start, min(start + batch_size, len(images))))
        media = [Medium(IMAGES, images[number]) for number in numbers]
        yield numbers, dict(pixels(mode, media, processor))


def _summarise(
    model: PreTrainedModel, examples: Examples, labels: list[int], predicted: list[int], truncated: int
) -> Classification:
    names = {int(number): str(name) for number, name in (model.config.id2label or {}).items()}
    if len(set(names.values())) < len(names):
        names = {}  # two classes of one name: their numbers tell them apart
    pairs = tuple(
        (names.get(label, str(label)), names.get(guess, str(guess)))
        for label, guess in zip(labels, predicted, strict=True)
    )
    hits = ByDocument(dict(enumerate(label == guess for label, guess in pairs)))
    positive = names.get(1, "1") if model.config.num_labels == 2 else MACRO
    f1 = _F1(positive)
    return Classification(
        name=examples.name,
        accuracy=sum(hits.values.values()) / len(pairs),
        accuracy_standard_error=hits.standard_error(),
        f1=f1(pairs),
        f1_standard_error=ByDocument(dict(enumerate(pairs)), f1).standard_error(),
        f1_of=positive,
        documents=len(pairs),
        truncated=truncated,
        by_document=pairs,
    )


@dataclass(frozen=True)
class _F1:
    """F1 of pairs of label and prediction: of one class, or the mean over all that occur."""

    of: str

    def __call__(self, pairs: Sequence[tuple[str, str]]) -> float:
        numbers = {name: number for number, name in enumerate({name: None for pair in pairs for name in pair})}
        labels = np.array([numbers[label] for label, _ in pairs])
        guesses = np.array([numbers[guess] for _, guess in pairs])
        right = np.bincount(labels[labels == guesses], minlength=len(numbers))
        occurred = np.bincount(labels, minlength=len(numbers)) + np.bincount(guesses, minlength=len(numbers))
        by_class = 2 * right / occurred  # 2 TP / (2 TP + FP + FN)
        if self.of == MACRO:
            return math.fsum(by_class) / len(by_class)
        return float(by_class[numbers[self.of]]) if self.of in numbers else 0.0
