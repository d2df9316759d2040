"""Tiny random classifiers of the sixty words, and of pictures, with labelled data for them."""

import numpy as np
import torch
from PIL import Image
from transformers import BertConfig, BertForSequenceClassification, ViTConfig, ViTForImageClassification

from tests.helpers.language import WORDS, words

NAMES = ("no", "yes", "perhaps")


def tiny_classifier(classes: int = 2, seed: int = 0) -> BertForSequenceClassification:
    """A BERT of two blocks that reads up to 16 words; its second class is "yes"."""
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        initializer_range=0.5,
        id2label=dict(enumerate(NAMES[:classes])),
        label2id={name: number for number, name in enumerate(NAMES[:classes])},
    )
    return BertForSequenceClassification(config).eval()


def tiny_picture_classifier() -> ViTForImageClassification:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = ViTConfig(image_size=8, patch_size=4, num_labels=3, initializer_range=0.5, **sizes)
    return ViTForImageClassification(config).eval()


def labelled_rows(count: int = 24, classes: int = 2) -> list[dict]:
    """Rows of a text of a few words and the name of a class."""
    return [{"text": words(3 + number % 9, seed=number), "label": NAMES[number % classes]} for number in range(count)]


def pictures(count: int) -> list[Image.Image]:
    """Pictures of noise."""
    noise = np.random.default_rng(0).integers(0, 256, size=(count, 8, 8, 3), dtype=np.uint8)
    return [Image.fromarray(pixels) for pixels in noise]
