"""How much of a stream bottlenecks keep: figures of their codes, and of the model that they are spliced into."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from hf_compress.anatomy.anatomy import Anatomy
from hf_compress.anatomy.dispatch import computing_device
from hf_compress.calibration.capture import forward, inference
from hf_compress.calibration.data import Batch, DataOptions, prepare
from hf_compress.calibration.media import Processor
from hf_compress.calibration.objective import first_tensor
from hf_compress.calibration.progress import bar
from hf_compress.modules.bottleneck import Bottleneck
from hf_compress.rewrite.bottlenecks import Bottlenecks, replaced_streams


@dataclass(frozen=True)
class Reconstruction:
    """A bottleneck on real tokens it was not trained on.

    Attributes:
        l0: features active (not 0) a token, in the mean.
        l1: mean of Σ_i |z_i|, absolute: in the units of the code.
        element_error: mean over tokens and coordinates of (x − x̂)².
        token_error: mean over tokens of ‖x − x̂‖².
        explained_variance: 1 − Σ‖x − x̂‖² / Σ‖x − μ‖², with both sums, and the mean μ, over all tokens at once. To
            give μ for every token comes to 0; means of the ratios of single tokens or batches would not.
        tokens: how many.
    """

    l0: float
    l1: float
    element_error: float
    token_error: float
    explained_variance: float
    tokens: int


class ReconstructionSums:
    """Streaming sums of `Reconstruction`, in float64.

    Means are taken around the first tokens' mean, so that a large common part of the stream costs no digits.
    """

    def __init__(self) -> None:
        self.tokens = 0
        self.l0 = self.l1 = self.error = self.energy = 0.0
        self.shift = self.total = torch.zeros(0)

    def update(self, stream: Tensor, rebuilt: Tensor, code: Tensor) -> None:
        """Add tokens: stream and rebuilt (tokens, hidden), code (tokens, features)."""
        stream, rebuilt = stream.double(), rebuilt.double()
        if not self.tokens:
            self.shift = stream.mean(0)
            self.total = torch.zeros_like(self.shift)
        moved = stream - self.shift
        self.tokens += len(stream)
        self.total += moved.sum(0)
        self.energy += float(moved.square().sum())
        self.error += float((stream - rebuilt).square().sum())
        self.l0 += float((code != 0).sum())
        self.l1 += float(code.double().abs().sum())

    def result(self) -> Reconstruction:
        """Of all tokens so far; ValueError where there were none, or all are alike."""
        if not self.tokens:
            raise ValueError("no tokens were seen: pass texts with some that are no special tokens")
        variance = self.energy - float(self.total.square().sum()) / self.tokens
        if not variance > 0:
            raise ValueError("all tokens have the same stream, so no share of its variance can be explained")
        return Reconstruction(
            self.l0 / self.tokens,
            self.l1 / self.tokens,
            self.error / self.tokens / len(self.total),
            self.error / self.tokens,
            1 - self.error / variance,
            self.tokens,
        )


@torch.no_grad()
def reconstruction(
    model: PreTrainedModel,
    bottlenecks: Bottlenecks,
    data: Any,
    tokenizer: Processor | None = None,
    options: DataOptions | None = None,
) -> dict[int, Reconstruction]:
    """Of each bottleneck by itself, on the streams of the model as it is; data as for `compress`.

    Raises:
        ValueError: no tokens.
    """
    sums = {layer: ReconstructionSums() for layer in bottlenecks.layers}
    for layer, stream, real in bottlenecks.read(model, prepare(data, model, tokenizer, options)):
        rows = stream[real]
        if len(rows):
            module: Bottleneck = bottlenecks.places[layer].module.to(rows.device)
            code, context = module.encode(rows)
            sums[layer].update(rows, module.decode(code, context), code)
    return {layer: one.result() for layer, one in sums.items()}


@dataclass(frozen=True)
class SpliceQuality:
    """What becomes of a language model when its streams pass through bottlenecks.

    Attributes:
        divergence: KL(clean ‖ spliced) of the next token's distribution, nats a token, in float32.
        clean, spliced, zeroed: loss, nats a token: of the model as it is, with its bottlenecks, and with zeros in the
            place of the streams they stand in.
        tokens: how many predictions.
    """

    divergence: float
    clean: float
    spliced: float
    zeroed: float
    tokens: int

    @property
    def recovered(self) -> float:
        """(zeroed − spliced) / (zeroed − clean): 1 where nothing is lost, 0 where zeros do as well."""
        return (self.zeroed - self.spliced) / (self.zeroed - self.clean)

    @property
    def perplexities(self) -> tuple[float, float]:
        """Clean and spliced."""
        return math.exp(self.clean), math.exp(self.spliced)


def splice_quality(
    model: PreTrainedModel,
    bottlenecks: Bottlenecks,
    data: Any,
    tokenizer: Processor | None = None,
    options: DataOptions | None = None,
) -> SpliceQuality:
    """Splice bottlenecks, all at once, into a causal language model for a while. Data as for `compress`.

    Raises:
        ValueError: a model that predicts no next token, or data without two tokens in a row.
    """
    return splice_qualities(model, [bottlenecks], data, tokenizer, options)[0]


@torch.no_grad()
def splice_qualities(
    model: PreTrainedModel,
    bottlenecks: Sequence[Bottlenecks],
    data: Any,
    tokenizer: Processor | None = None,
    options: DataOptions | None = None,
) -> list[SpliceQuality]:
    """`splice_quality` of one set of bottlenecks after another; the model as it is, and with zeros, is run but once."""
    if not model.can_generate() or model.config.is_encoder_decoder:
        raise ValueError(f"splice_quality compares next-token predictions; {type(model).__name__} makes none")
    sums = torch.zeros(len(bottlenecks), 4, dtype=torch.float64)
    tokens = 0
    with inference(model):
        for batch in bar(prepare(data, model, tokenizer, options).batches, "measuring splices"):
            targets, counts = _targets(batch, computing_device(model))
            clean = _predictions(model, batch)
            zeroed: dict[tuple[int, ...], float] = {}
            for row, found in zip(sums, bottlenecks, strict=True):
                places = tuple(found.layers)
                if places not in zeroed:
                    zeros = dict.fromkeys(places, torch.zeros_like)
                    with replaced_streams(Anatomy(model).stack(found.stack), zeros):
                        zeroed[places] = _loss(_predictions(model, batch), targets, counts)
                with found.spliced(model):
                    spliced = _predictions(model, batch)
                divergence = float(_divergence(clean, spliced)[counts].double().sum())
                losses = _loss(clean, targets, counts), _loss(spliced, targets, counts), zeroed[places]
                row += torch.tensor([divergence, *losses], dtype=torch.float64)
            tokens += int(counts.sum())
    if not tokens:
        raise ValueError("no text has two tokens in a row, so there is nothing to predict")
    means = (sums / tokens).tolist()
    return [SpliceQuality(divergence, clean, spliced, zeroed, tokens) for divergence, clean, spliced, zeroed in means]


def _divergence(clean: Tensor, spliced: Tensor) -> Tensor:
    """KL(clean ‖ spliced) at each position, (samples, positions), of log-probabilities."""
    return F.kl_div(spliced, clean, reduction="none", log_target=True).sum(-1)


def _loss(predictions: Tensor, targets: Tensor, counts: Tensor) -> float:
    """Summed over the positions that count."""
    return -float(predictions.gather(-1, targets[..., None])[..., 0][counts].double().sum())


def _predictions(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Log-probabilities of each next token, (samples, positions − 1, vocabulary) float32."""
    return F.log_softmax(first_tensor(forward(model, batch)).float()[:, :-1], dim=-1)


def _targets(batch: Batch, device: torch.device) -> tuple[Tensor, Tensor]:
    """The next tokens, (samples, positions − 1), and which count: those labelled, or real ones after real ones."""
    if batch.targets is not None:
        labels = batch.targets.long()[:, 1:].to(device)
        return labels.clamp(min=0), labels != -100
    assert batch.real is not None
    targets = batch.inputs["input_ids"].long()[:, 1:]
    return targets.to(device), (batch.real[:, 1:] & batch.real[:, :-1]).to(device)
