"""What the features of bottlenecks stand for: a page with the texts that move them and the logits that they move."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_compress.calibration.data import DataOptions, prepare
from hf_compress.checks import check
from hf_compress.features.logits import DirectPath, direct_path
from hf_compress.features.page import page
from hf_compress.features.subjects import given, spliced
from hf_compress.features.tallies import tallied
from hf_compress.features.words import Writer
from hf_compress.numerics.defaults import torch_defaults
from hf_compress.rewrite.bottlenecks import Bottlenecks


@torch_defaults()
def feature_report(
    model: PreTrainedModel,
    texts: Any,
    tokenizer: PreTrainedTokenizerBase,
    path: str | Path = "features.html",
    *,
    bottlenecks: Bottlenecks | None = None,
    options: DataOptions | None = None,
    features: int = 24,
    examples: int = 8,
) -> Path:
    """Write one self-contained page about the features of a model's bottlenecks. The model stays as it is.

    Of each bottleneck: how well it keeps the stream of these texts, how it was trained, which features are dead; and of
    the most important ones, by the mean of z²·‖W′_i‖² on these texts, where they are active and which logits they
    raise and lower by the direct path, W′_i · diag(g) · Uᵀ, with the gain g of the final norm and the output embeddings
    U (vocabulary, hidden). Memory does not grow with the texts, but for their token ids.

    Args:
        texts, options: as calibration data for `compress`; the data has to be of token ids.
        path: where to write it, an .html file.
        bottlenecks: what `hf_compress.fit` gave for this model; those spliced into the model when None. How those were
            trained is told as far as the model's `compression_report` does.
        features: cards a bottleneck.
        examples: tokens a card, for each sign; at most two of the same text.

    Raises:
        ValueError: no bottlenecks, or such as do not fit the model; data without token ids; a path or number that
            makes no sense.
        CalibrationError: data that cannot be read, or that gives NaN.
    """
    path = Path(path)
    if path.suffix.lower() not in (".html", ".htm"):
        raise ValueError(f"a feature report is a page: path must end in .html; got {str(path)!r}")
    for name, number in (("features", features), ("examples", examples)):
        check(name, number, int, "[1, inf)")
    if tokenizer is None:
        raise ValueError("tokenizer is None: pass the model's own, to show tokens as text")
    subjects = spliced(model) if bottlenecks is None else given(model, bottlenecks)
    data = prepare(texts, model, tokenizer, options)
    tallies = tallied(model, subjects, data, examples)
    paths: dict[str, DirectPath] = {}
    sections = []
    for subject, tally in zip(subjects, tallies, strict=True):
        if subject.stack.path not in paths:
            paths[subject.stack.path] = direct_path(model, subject.stack, data.batches[0])
        writer = Writer(subject, tally, data, tokenizer, paths[subject.stack.path])
        sections.append(writer.section(features))
    name = str(model.name_or_path or type(model).__name__)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page(f"Features of {name}", sections), encoding="utf-8")
    return path
