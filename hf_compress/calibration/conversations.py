"""Conversations, as datasets for chat models have them, written out by the tokenizer's template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from hf_compress.errors import CalibrationError, one_line

COLUMN = "messages"


def is_conversation(item: Any) -> bool:
    """Whether something is a list (or a DataFrame's array) of messages, each of which says whose it is."""
    if not isinstance(item, (list, tuple, np.ndarray)) or not len(item):
        return False
    return all(isinstance(message, Mapping) and "role" in message for message in item)


def written_out(conversations: Sequence[Any], tokenizer: PreTrainedTokenizerBase | None) -> list[str]:
    """Conversations as the texts that a chat model reads, special tokens included.

    Raises:
        CalibrationError: there is no tokenizer, or it has no template; something is no conversation, or none that the
            template takes.
    """
    if tokenizer is None:
        raise CalibrationError("calibration is conversations: pass tokenizer= as well")
    if not getattr(tokenizer, "chat_template", None):
        raise CalibrationError(
            f"calibration is conversations, and {type(tokenizer).__name__} has no chat template: pass texts, or set "
            "tokenizer.chat_template"
        )
    texts: list[str] = []
    for number, item in enumerate(conversations):
        if not is_conversation(item):
            raise CalibrationError(
                f"calibration must be all conversations or none; entry {number} is a {type(item).__name__} without "
                "messages that have a role: leave it out"
            )
        try:
            texts.append(str(tokenizer.apply_chat_template(list(item), tokenize=False)))
        except Exception as error:  # templates raise what they like
            raise CalibrationError(
                f"the tokenizer's chat template does not take conversation {number}: {one_line(error)}"
            ) from error
    return texts
