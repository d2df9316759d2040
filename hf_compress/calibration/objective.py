"""How bad a model's output is on a calibration batch: what candidates for a change are compared by."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from hf_compress.calibration.capture import real_tokens
from hf_compress.calibration.data import Batch


def first_tensor(output: Any) -> Tensor:
    """The logits, or else the first tensor of a model's output."""
    logits = getattr(output, "logits", None)
    value = logits if logits is not None else next(v for v in output.to_tuple() if isinstance(v, Tensor))
    assert isinstance(value, Tensor)
    return value


def batch_loss(model: PreTrainedModel, output: Any, batch: Batch, reference: Tensor | None) -> tuple[float, float]:
    """Sum of the loss over a batch, and the weight to divide it by.

    A language model's loss is the cross-entropy, in nats, of every real token that follows another; its weight is their
    number. Any other model's is the squared distance of its output from `reference`, the unchanged model's output; its
    weight is the squared size of `reference`.
    """
    value = first_tensor(output)
    ids = batch.inputs.get("input_ids")
    if model.can_generate() and ids is not None and value.ndim == 3 and value.shape[:2] == ids.shape:
        return _next_token_loss(value, ids.to(value.device).long(), real_tokens(batch, value), model)
    if reference is None:
        return 0.0, 1.0
    distance = (value.float() - reference.float()).square()
    size = reference.float().square()
    if value.ndim == 3:
        real = real_tokens(batch, value)
        distance, size = distance[real], size[real]
    return distance.double().sum().item(), size.double().sum().item()


def _next_token_loss(logits: Tensor, ids: Tensor, real: Tensor, model: PreTrainedModel) -> tuple[float, float]:
    if not model.config.is_encoder_decoder:  # there the decoder's input is shifted already
        logits, ids, real = logits[:, :-1], ids[:, 1:], real[:, 1:]
    loss = F.cross_entropy(logits[real].float(), ids[real], reduction="sum")
    return loss.item(), float(real.sum())
