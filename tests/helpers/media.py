"""Tiny models that read images and sounds, with what reads these for them, and files of noise."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from scipy.io import wavfile
from transformers import ViTConfig, ViTForImageClassification, Wav2Vec2Config, Wav2Vec2ForSequenceClassification
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

RATE = 16_000
LABELS = [0, 1, 2, 0, 1, 2]


def tiny_vit(layers: int = 3) -> ViTForImageClassification:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, "image_size": 16, "patch_size": 8}
    return ViTForImageClassification(ViTConfig(num_hidden_layers=layers, num_labels=3, **sizes)).eval()


def image_processor() -> ViTImageProcessorPil:
    return ViTImageProcessorPil(size={"height": 16, "width": 16})


def images(count: int = 6) -> list[Image.Image]:
    """Noise of several sizes."""
    random = np.random.default_rng(0)
    return [Image.fromarray(random.integers(0, 256, (20 + n, 30, 3), dtype=np.uint8)) for n in range(count)]


def image_files(folder: Path, count: int = 6) -> list[Path]:
    """Some of them in folders of their own, as by classes."""
    paths = [folder / "ab"[2 * number // count] / f"{number}.png" for number in range(count)]
    for path, image in zip(paths, images(count), strict=True):
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)
    return paths


def tiny_wav2vec2() -> Wav2Vec2ForSequenceClassification:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, "classifier_proj_size": 8}
    convolutions = {"conv_dim": (16, 16), "conv_kernel": (10, 3), "conv_stride": (5, 2), "num_feat_extract_layers": 2}
    positions = {"num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2}
    config = Wav2Vec2Config(num_hidden_layers=3, num_labels=3, layerdrop=0.0, **sizes, **convolutions, **positions)
    return Wav2Vec2ForSequenceClassification(config).eval()


def sounds(count: int = 6) -> list[np.ndarray]:
    """Noise of several lengths, 16-bit."""
    random = np.random.default_rng(0)
    return [(random.standard_normal(600 - 40 * n) * 3000).astype(np.int16) for n in range(count)]


def sound_files(folder: Path, count: int = 6) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{number}.wav" for number in range(count)]
    for path, sound in zip(paths, sounds(count), strict=True):
        wavfile.write(path, RATE, sound)
    return paths
