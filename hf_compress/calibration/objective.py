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


def reference_for(model: PreTrainedModel, output: Any, batch: Batch) -> Tensor | None:
    """What of the unchanged model's output on a batch has to be kept for `batch_loss`; nothing for a language model."""
    return None if _is_language_model(model, batch) else first_tensor(output)


def _is_language_model(model: PreTrainedModel, batch: Batch) -> bool:
    return model.can_generate() and "input_ids" in batch.inputs


def batch_loss(model: PreTrainedModel, output: Any, batch: Batch, reference: Tensor | None) -> tuple[float, float]:
    """Sum of the loss over a batch, and the weight to divide it by.

    A language model's loss is the cross-entropy, in nats, of every real token that follows another; its weight is their
    number. Any other model's is the squared distance of its output from `reference`, the unchanged model's output (see
    `reference_for`); its weight is the squared size of `reference`.
    """
    value = first_tensor(output)
    if reference is None:
        ids = batch.inputs["input_ids"].to(value.device).long()
        return _next_token_loss(value, ids, real_tokens(batch, value), model)
    distance = (value.float() - reference.float()).square()
    size = reference.float().square()
    if value.ndim == 3:
        real = real_tokens(batch, value)
        distance, size = distance[real], size[real]
    return distance.double().sum().item(), size.double().sum().item()


def mean_loss(loss: float, weight: float) -> float:
    """Their quotient, infinite where the loss is no number: such a candidate is never the best."""
    mean = loss / max(weight, 1e-300)
    return mean if mean == mean else float("inf")


def _next_token_loss(logits: Tensor, ids: Tensor, real: Tensor, model: PreTrainedModel) -> tuple[float, float]:
    if not model.config.is_encoder_decoder:  # there the decoder's input is shifted already
        logits, ids, real = logits[:, :-1], ids[:, 1:], real[:, 1:]
    loss = F.cross_entropy(logits[real].float(), ids[real], reduction="sum")
    return loss.item(), float(real.sum())
