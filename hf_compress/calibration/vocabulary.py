"""What inputs, token ids and positions a model knows."""

from __future__ import annotations

import inspect

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from hf_compress.errors import CalibrationError

_POSITIONS = (
    "max_position_embeddings",
    "n_positions",
    "max_seq_len",
    "max_sequence_length",
    "max_target_positions",
    "max_decoder_position_embeddings",
)


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


def accepts(model: PreTrainedModel, name: str) -> bool:
    """Whether a model's forward knows an input by its name."""
    return name in inspect.signature(model.forward).parameters


def beyond(ids: Tensor, model: PreTrainedModel) -> bool:
    vocabulary = getattr(model.config.get_text_config(), "vocab_size", None)
    return bool(ids.numel()) and isinstance(vocabulary, int) and int(ids.max()) >= vocabulary


def check_ids(ids: Tensor, config: PreTrainedConfig) -> None:
    """Ids outside the vocabulary would otherwise fail deep inside the embedding."""
    vocabulary = getattr(config, "vocab_size", None)
    if ids.is_floating_point():
        raise CalibrationError(f"token ids must be whole numbers; got a tensor of {ids.dtype}")
    if ids.numel() and isinstance(vocabulary, int) and (int(ids.max()) >= vocabulary or int(ids.min()) < 0):
        raise CalibrationError(
            f"token ids run from {int(ids.min())} to {int(ids.max())}, but the model knows 0 to {vocabulary - 1}; "
            "is this the model's own tokenizer?"
        )
