"""Conversations, as datasets for chat models have them, written out by the tokenizer's template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from transformers import ProcessorMixin

from hf_compress.errors import CalibrationError, one_line

COLUMN = "messages"


def is_conversation(item: Any) -> bool:
    """Whether something is a list (or a DataFrame's array) of messages, each of which says whose it is."""
    if not isinstance(item, (list, tuple, np.ndarray)) or not len(item):
        return False
    return all(isinstance(message, Mapping) and "role" in message for message in item)


def has_media(conversation: Sequence[Any]) -> bool:
    """Whether a message of a conversation holds an image, a sound or a video besides text."""
    contents = (message.get("content") for message in conversation)
    parts = (part for content in contents if isinstance(content, (list, tuple, np.ndarray)) for part in content)
    return any(isinstance(part, Mapping) and part.get("type", "text") != "text" for part in parts)


def written_with_media(conversations: Sequence[Any], processor: Any, batch_size: int, length: int) -> list[Any]:
    """Conversations with their images as batches of a model's inputs, by its processor's template.

    Raises:
        CalibrationError: there is no processor with a template, or it does not take them; one is longer than `length`
            tokens: what stands for an image cannot be cut.
    """
    if not isinstance(processor, ProcessorMixin) or not processor.chat_template:
        raise CalibrationError(
            "calibration is conversations with images or sounds: pass the model's processor, with its chat template, "
            f"as tokenizer=; got {type(processor).__name__}"
        )
    batches = []
    for start in range(0, len(conversations), batch_size):
        some = [list(conversation) for conversation in conversations[start : start + batch_size]]
        try:
            batch: Any = processor.apply_chat_template(
                some,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
                processor_kwargs={"padding": True, "padding_side": "right"},
            )
        except Exception as error:  # templates raise what they like
            raise CalibrationError(
                f"the processor does not take conversations {start} to {start + len(some) - 1}: {one_line(error)}"
            ) from error
        if (longest := batch["input_ids"].shape[1]) > length:
            raise CalibrationError(
                f"one of the conversations {start} to {start + len(some) - 1} has {longest} tokens with its images, "
                f"and at most {length} fit: leave it out, or give a larger max_length where the model has the positions"
            )
        batches.append(dict(batch))
    return batches


def written_out(conversations: Sequence[Any], tokenizer: Any) -> list[str]:
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
