"""What the decoder of an encoder-decoder reads."""

from __future__ import annotations

import inspect
from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_compress.errors import CalibrationError


def has_decoder(model: PreTrainedModel) -> bool:
    """Whether a decoder reads tokens of its own, besides what the model's encoder reads."""
    return bool(model.config.is_encoder_decoder) and "decoder_input_ids" in inspect.signature(model.forward).parameters


def read_before(model: PreTrainedModel, labels: Tensor) -> Tensor:
    """What a decoder reads that is to say `labels` (samples, positions): they, one place to the right.

    By the model's own rule where it has one; mBART's, for instance, puts the language before the text.
    """
    own = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    if own is None:
        pad = getattr(model.config, "pad_token_id", None)
        return _shifted(labels.masked_fill(labels == -100, pad or 0), start_id(model))
    try:
        return own(labels=labels.long()).to(labels.dtype)
    except (ValueError, AssertionError, AttributeError, TypeError) as error:
        raise CalibrationError(
            f"{type(model).__name__} cannot tell what its decoder reads from labels of shape {tuple(labels.shape)} "
            f"({' '.join(str(error).split())[:200]}): give batches with decoder_input_ids"
        ) from error


def default_input(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> Tensor:
    """The text, one place to the right, as when an encoder-decoder learns to repeat it; without one, the start."""
    ids = inputs.get("input_ids")
    if ids is not None:
        return _shifted(ids, start_id(model))
    first = next(iter(inputs.values()))
    return torch.full((len(first), 1), start_id(model), dtype=torch.long, device=first.device)


def one_later(real: Tensor) -> Tensor:
    """The mask of a text (samples, positions) as it fits `default_input`; the start does not count."""
    return torch.cat([torch.zeros_like(real[:, :1]), real[:, :-1]], dim=1)


def start_id(model: PreTrainedModel) -> int:
    """The token that a decoder begins with."""
    config = model.config
    start = getattr(config, "decoder_start_token_id", None)
    return start if start is not None else (getattr(config, "bos_token_id", None) or 0)


def _shifted(ids: Tensor, start: int) -> Tensor:
    return torch.cat([torch.full_like(ids[:, :1], start), ids[:, :-1]], dim=1)
