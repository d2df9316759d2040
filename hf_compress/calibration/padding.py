"""Samples of unequal lengths as one padded batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

_MASKS = {"input_ids": "attention_mask", "decoder_input_ids": "decoder_attention_mask"}


def pad_id(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase | None) -> int:
    """The token to pad with: the tokenizer's or the model's own, where the model has an embedding for it.

    Any does, since padding is masked. A token that was added to the tokenizer alone has no embedding.
    """
    text = config.get_text_config()
    vocabulary = getattr(text, "vocab_size", None)
    ids = (getattr(tokenizer, "pad_token_id", None), getattr(text, "pad_token_id", None))
    return next((i for i in ids if isinstance(i, int) and 0 <= i < (vocabulary or 2**63)), 0)


def padded(rows: Sequence[Mapping[str, Any]], pad: int) -> dict[str, Tensor]:
    """Rows as a batch: token ids padded on the right with `pad` and with their masks, labels with -100, others with 0.

    Args:
        rows: by name, values of one dimension and any length, or else of one shape.
        pad: an id that the model knows.
    """
    batch: dict[str, Tensor] = {}
    for name in rows[0]:
        values = [torch.as_tensor(row[name]) for row in rows]
        if any(value.ndim != 1 for value in values):
            batch[name] = torch.stack(values)
            continue
        fill = -100 if name == "labels" else pad if name in _MASKS else 0
        batch[name] = pad_sequence(values, batch_first=True, padding_value=fill)
        if name in _MASKS and _MASKS[name] not in rows[0]:
            ones = [torch.ones_like(value) for value in values]
            batch[_MASKS[name]] = pad_sequence(ones, batch_first=True)
    return batch
