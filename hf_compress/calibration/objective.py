"""How bad a model's output is on a calibration batch: what candidates for a change are compared by."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from hf_compress.calibration.capture import decoder_tokens, real_tokens
from hf_compress.calibration.data import Batch
from hf_compress.calibration.decoder import has_decoder
from hf_compress.errors import CalibrationError, UnsupportedModelError

_ROWS = 256  # of logits that are turned into probabilities at once: those of words are many


def first_tensor(output: Any) -> Tensor:
    """The logits, or else the first tensor of a model's output."""
    logits = getattr(output, "logits", None)
    value = logits if logits is not None else next(v for v in output.to_tuple() if isinstance(v, Tensor))
    assert isinstance(value, Tensor)
    return value


def speaks(model: PreTrainedModel, batch: Batch) -> bool:
    """Whether the model is a language model, and the batch says what it is to say."""
    given = "input_ids" in batch.inputs or "decoder_input_ids" in batch.inputs or batch.targets is not None
    return model.can_generate() and given


def batch_loss(model: PreTrainedModel, output: Any, batch: Batch, reference: Tensor | None) -> tuple[float, float]:
    """Sum of the loss over a batch, and the weight to divide it by.

    A language model's loss is the cross-entropy, in nats, of `next_tokens`; its weight is their number. Any other
    model's is the squared distance of its output from `reference`, the unchanged model's output;
    its weight is the squared size of `reference`.
    """
    value = first_tensor(output)
    if reference is None:
        said = next_tokens(model, batch, value)
        rows = zip(value.flatten(0, -2).split(_ROWS), said.flatten().split(_ROWS), strict=True)
        losses = [F.cross_entropy(part.float(), words, reduction="sum", ignore_index=-100) for part, words in rows]
        return float(torch.stack(losses).sum(dtype=torch.float64)), float((said != -100).sum())
    distance = (value.float() - reference.float()).square()
    size = reference.float().square()
    if value.ndim == 3:
        counts = output_tokens(model, batch, value)
        distance, size = distance[counts], size[counts]
    return distance.double().sum().item(), size.double().sum().item()


def next_tokens(model: PreTrainedModel, batch: Batch, logits: Tensor) -> Tensor:
    """What a language model is to say at each position of its logits, (samples, positions) int64; -100 for nothing.

    The labels, where the data has any for tokens. Else what its decoder reads, or, where that is not given or there is
    no decoder but the model itself, the text: of these the real tokens, so no special ones.
    """
    decodes = has_decoder(model)
    if batch.targets is not None:
        said, shifted = batch.targets.long(), decodes
    elif decodes and "decoder_input_ids" in batch.inputs:
        ids = batch.inputs["decoder_input_ids"].long()
        said, shifted = ids.masked_fill(~decoder_tokens(batch, ids).to(ids.device), -100), False
    else:
        ids = batch.inputs["input_ids"].long()
        said, shifted = ids.masked_fill(~real_tokens(batch, ids).to(ids.device), -100), decodes
    if not shifted:
        said = F.pad(said[:, 1:], (0, 1), value=-100)
    if said.shape != logits.shape[:2]:
        raise UnsupportedModelError(
            f"{type(model).__name__} gives logits {tuple(logits.shape)} for {tuple(said.shape)} tokens, not one for "
            "each: its loss is not known"
        )
    return said.to(logits.device)


def output_tokens(model: PreTrainedModel, batch: Batch, value: Tensor) -> Tensor:
    """Mask (samples, positions) of the positions of a model's output that count.

    Where the data labels tokens, or a decoder speaks, those that have something to say; else those at real tokens.
    """
    if batch.targets is not None or (has_decoder(model) and speaks(model, batch)):
        return next_tokens(model, batch, value) != -100
    return decoder_tokens(batch, value) if has_decoder(model) else real_tokens(batch, value)


def drawn_gradient(model: PreTrainedModel, output: Any, batch: Batch, generator: torch.Generator) -> Tensor:
    """The gradient, at a model's outputs, of the log-probability of an output that is drawn from them.

    Of logits of classes or words, for each sample or token: the class drawn less the probabilities of all, or of
    several labels each by itself. Of anything else, which is taken for the mean of a Gaussian, noise. 0 where
    nothing counts (see `output_tokens`).
    """
    value = first_tensor(output).detach()
    rows = value.reshape(-1, value.shape[-1])
    if not all(bool(torch.isfinite(part.abs().amax())) for part in rows.split(_ROWS) if part.numel()):
        raise CalibrationError(f"{type(model).__name__} gives NaN or infinite outputs on this data")
    problem = getattr(model.config, "problem_type", None)
    classes = getattr(output, "logits", None) is not None and value.ndim in (2, 3) and rows.shape[-1] > 1
    if not classes or problem == "regression":
        start = torch.randn(rows.shape, dtype=torch.float32, generator=generator).to(value)
    elif problem == "multi_label_classification":
        probabilities = rows.float().sigmoid().cpu()
        start = (torch.bernoulli(probabilities, generator=generator) - probabilities).to(value)
    else:
        chances = torch.rand(len(rows), 1, generator=generator).to(rows.device)
        start = torch.empty_like(rows)
        for logits, chance, out in zip(rows.split(_ROWS), chances.split(_ROWS), start.split(_ROWS), strict=True):
            probabilities = logits.float().softmax(dim=-1)
            drawn = class_at(probabilities, chance)
            ones = torch.ones_like(drawn, dtype=probabilities.dtype)
            out.copy_(probabilities.neg_().scatter_add_(1, drawn, ones))
    start = start.view(value.shape)
    return start.mul_(output_tokens(model, batch, start)[..., None]) if start.ndim == 3 else start


def draws(seed: int, number: int) -> torch.Generator:
    """For what is drawn for the batch of a number: the same whichever batches, and processes, there are besides."""
    return torch.Generator().manual_seed(seed + 1_000_003 * number)


def class_at(probabilities: Tensor, chances: Tensor) -> Tensor:
    """The class, (rows, 1), at which the sum of probabilities (rows, classes) passes a number in [0, 1), (rows, 1)."""
    sums = probabilities.cumsum(dim=-1)
    found = torch.searchsorted(sums, chances * sums[:, -1:], right=True)  # their sum is 1 but for rounding
    return found.clamp_(max=probabilities.shape[-1] - 1)


def mean_loss(loss: float, weight: float) -> float:
    """Their quotient, infinite where the loss is no number: such a candidate is never the best."""
    mean = loss / max(weight, 1e-300)
    return mean if mean == mean else float("inf")
