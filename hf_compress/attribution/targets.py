"""What relevance explains: one output of a model, or the sum of some."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_compress.attribution.word_logits import GivenLogits, WordLogits
from hf_compress.calibration.capture import decoder_tokens, real_tokens
from hf_compress.calibration.data import Batch
from hf_compress.calibration.decoder import has_decoder
from hf_compress.calibration.objective import next_tokens, speaks
from hf_compress.errors import CalibrationError, UnsupportedModelError

Target = Literal["predicted", "label"] | int | Tensor


def reads_words(model: PreTrainedModel, batch: Batch) -> bool:
    """Whether a batch is of words."""
    return "input_ids" in batch.inputs or has_decoder(model)


def explained_classes(
    model: PreTrainedModel, logits: Tensor, batch: Batch, target: Target
) -> tuple[Tensor, Tensor | None]:
    """The logits to explain, summed for each sample, (samples), and the class or word of each; None for all labels.

    Of a classifier, (samples, classes): the logit of the class predicted, of the batch's label, or of a class named. Of
    a language model, (samples, positions, words): after the last real token, the logit of the word predicted or of a
    word named; or, for "label", the logits of all labels that the data has for tokens, and without any, at every real
    token, of the real token that follows.

    Raises:
        CalibrationError: no labels where the target is one.
        ValueError: a class that the model does not have, or not one for each sample.
        UnsupportedModelError: outputs that are no logits of classes or of words.
    """
    if logits.ndim == 3 and reads_words(model, batch) and model.get_output_embeddings() is not None:
        return explained_words(model, GivenLogits(logits), batch, target)
    if logits.ndim != 2:
        raise UnsupportedModelError(
            f"{type(model).__name__} gives {tuple(logits.shape)}, no logits of classes or of words: load it with a head"
        )
    if isinstance(target, str) and target == "label" and batch.labels is None:
        raise CalibrationError(
            "target='label' explains the logit of each sample's label, and the data has none: give batches with "
            "'labels', or take target='predicted'"
        )
    return _of(logits, _chosen(logits, batch, target))


def in_words(
    model: PreTrainedModel, classes: Tensor | None, samples: int, tokenizer: PreTrainedTokenizerBase | None
) -> tuple[str, ...]:
    """What is explained of each of some samples, by the classes or words that `explained_classes` gave."""
    if classes is None:
        return ("all labels of the text",) * samples
    chosen = classes.tolist()
    if model.get_output_embeddings() is None:
        names = getattr(model.config, "id2label", None) or {}
        return tuple(f"the class {names.get(one, one)}" for one in chosen)
    where = "the next word" if model.can_generate() else "the word at the last token"
    words = [f"number {one}" if tokenizer is None else repr(str(tokenizer.decode([one]))) for one in chosen]
    return tuple(f"{where}, {word}" for word in words)


def _of(logits: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
    return logits.gather(1, classes[:, None])[:, 0], classes


def _chosen(logits: Tensor, batch: Batch, target: Any) -> Tensor:
    """The class to explain in each row of logits, (samples)."""
    if isinstance(target, str) and target == "predicted":
        return logits.detach().argmax(dim=-1)
    if isinstance(target, str) and target == "label":
        assert batch.labels is not None
        target = batch.labels
    if target is None or isinstance(target, str):
        raise ValueError(f"target must be 'predicted', 'label', a class, or one for each sample; got {target!r}")
    chosen = torch.as_tensor(target, device=logits.device)
    chosen = chosen.expand(len(logits)) if chosen.ndim == 0 else chosen
    if chosen.shape != logits.shape[:1] or chosen.is_floating_point() or chosen.dtype == torch.bool:
        raise ValueError(f"target must name one class for each of {len(logits)} samples; got {tuple(chosen.shape)}")
    if bool((chosen < 0).any() or (chosen >= logits.shape[-1]).any()):
        raise ValueError(f"target must be 0 to {logits.shape[-1] - 1}; got {chosen.min()} to {chosen.max()}")
    return chosen.long()


def explained_words(
    model: PreTrainedModel, logits: WordLogits, batch: Batch, target: Target
) -> tuple[Tensor, Tensor | None]:
    """`explained_classes` of a language model."""
    like = logits.like
    if isinstance(target, str) and target == "label":
        if not speaks(model, batch):
            raise CalibrationError("target='label' explains what is to be said, and the data has no text: give labels")
        said = next_tokens(model, batch, like)
        counts = said != -100
        if batch.targets is None and not has_decoder(model):
            counts &= real_tokens(batch, like)
        found = logits.of(said.clamp(min=0)) * counts
        return found.sum(dim=-1, dtype=torch.promote_types(found.dtype, torch.float32)), None  # beyond float16's range
    real = decoder_tokens(batch, like) if has_decoder(model) else real_tokens(batch, like)
    positions = torch.arange(real.shape[1], device=real.device)
    ends = logits.at(torch.where(real, positions, -1).amax(dim=1).clamp(min=0))
    return _of(ends, _chosen(ends, batch, target))
