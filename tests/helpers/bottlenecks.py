"""Bottlenecks as fitting leaves them, made of random maps."""

import torch

from hf_compress.modules.bottleneck import Bottleneck, Form
from hf_compress.rewrite.bottlenecks import Bottlenecks, FittedBottleneck

LINEAR, TOP = Form(), Form(skip=0.0, select="top", active=3)
CURVE = {"step": [0.0, 1.0, 2.0], "retention": [1.0, 0.9, 0.8], "error": [0.3, 0.2, 0.25]}


def fitted(layer: int = 1, hidden: int = 16, width: int = 6, form: Form = LINEAR, stack: str = "model.layers"):
    """A bottleneck of random maps: of `width` + 2 features trained, the second and the last were cut."""
    generator = torch.Generator().manual_seed(layer)
    module = Bottleneck(hidden, width, form)
    for parameter in module.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
    kept = torch.tensor([0, *range(2, width + 1)])
    place = FittedBottleneck(module.requires_grad_(False), torch.arange(width + 2, 0.0, -1), kept, CURVE)
    return Bottlenecks(stack, {layer: place}, {})
