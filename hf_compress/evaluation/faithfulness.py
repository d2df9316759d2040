"""How faithful a compressed network is to the one it was made of: in what it gives, and in how it gets there.

Source: ILLC (arXiv 2503.03693) and SpArX (arXiv 2301.09559), where hidden neurons are merged by clusters.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_compress.anatomy.anatomy import Anatomy
from hf_compress.calibration.capture import forward, inference, watch_module
from hf_compress.calibration.data import DataOptions, prepare
from hf_compress.calibration.objective import first_tensor
from hf_compress.errors import UnsupportedModelError


@dataclass(frozen=True)
class Faithfulness:
    """Distances from the original network, 0 for none.

    Attributes:
        input_output: mean over samples of the squared distance of the outputs.
        structural: mean absolute difference over samples, clusters and outputs; a cluster of the original stands for
            the mean activation of its members.
        layers: the same over the clusters of each hidden layer alone.
    """

    input_output: float
    structural: float
    layers: tuple[float, ...]


def faithfulness(
    original: PreTrainedModel,
    compressed: PreTrainedModel,
    clusters: Sequence[Sequence[int]],
    data: Any,
    example: Sequence[float] | None = None,
    kernel_width: float | None = None,
) -> Faithfulness:
    """Compare two networks that classify vectors, such as `DenseForClassification`, by probabilities and activations.

    Args:
        original, compressed: networks of as many hidden layers.
        clusters: of each hidden layer, the compressed unit that each original one is part of; ILLC's report has them:
            `[block["clusters"] for block in compressed.compression_report.notes["blocks"]]`.
        data: samples (samples, features) that neither training nor compression has seen.
        example: weigh samples by how near they are to this one (see `similarity`): the local forms.
        kernel_width: for `similarity`.

    Raises:
        ValueError: clusters that fit the networks not.
        UnsupportedModelError: a network whose hidden layers cannot be found.
    """
    before, after = activations(original, data), activations(compressed, data)
    merged = [_means(layer, labels) for layer, labels in zip(before[:-1], clusters, strict=True)]
    weights = None
    if example is not None:
        weights = similarity(torch.as_tensor(data).double(), torch.tensor(example).double(), kernel_width)
    layers = [structural_unfaithfulness([new], [old], weights) for new, old in zip(after[:-1], merged, strict=True)]
    return Faithfulness(
        input_output_unfaithfulness(after[-1], before[-1], weights),
        structural_unfaithfulness(after, [*merged, before[-1]], weights),
        tuple(layers),
    )


def input_output_unfaithfulness(compressed: Tensor, original: Tensor, weights: Tensor | None = None) -> float:
    """mean over x of Σ_k (ŷ_k(x) − y_k(x))², or its mean weighted by `weights` (samples).

    Args:
        compressed, original: ŷ and y, (samples, outputs).

    Raises:
        ValueError: shapes that differ; weights that are not one for each sample, negative, or all 0.

    Source: SpArX (arXiv 2301.09559), definition 7, and its local form, with weights π(x).
    """
    _check_alike([compressed], [original])
    return _mean((compressed.double() - original.double()).square().sum(dim=1), weights)


def structural_unfaithfulness(
    compressed: Sequence[Tensor], original: Sequence[Tensor], weights: Tensor | None = None
) -> float:
    """1 / (N (Σ_l |C_l| + n_out)) Σ_x [Σ_l Σ_c |mean_{j∈c} a_j(x) − ĥ_c(x)| + Σ_k |ŷ_k(x) − y_k(x)|].

    Args:
        compressed: ĥ of each hidden layer, (samples, clusters), and at last ŷ, (samples, outputs).
        original: the mean activations of each cluster's members, and y; of the same shapes.
        weights: of the samples: then their weighted mean takes the place of 1 / N Σ_x.

    Raises:
        ValueError: as `input_output_unfaithfulness`.

    Source: SpArX (arXiv 2301.09559), definition 8, as ILLC measures it.
    """
    _check_alike(compressed, original)
    pairs = zip(compressed, original, strict=True)
    distances = torch.cat([(new.double() - old.double()).abs() for new, old in pairs], dim=1)
    return _mean(distances.mean(dim=1), weights)


def similarity(samples: Tensor, example: Tensor, kernel_width: float | None = None) -> Tensor:
    """π(x) = exp(−|x − e|² / width²) of each sample (samples, features), as in LIME (arXiv 1602.04938): (samples).

    The width is 0.75 · √features when not given.
    """
    if samples.ndim != 2 or example.shape != samples.shape[1:]:
        raise ValueError(
            f"the example must be one sample of {list(samples.shape[1:])} numbers, like the others; "
            f"got {list(example.shape)}"
        )
    width = kernel_width or 0.75 * samples.shape[1] ** 0.5
    return (-(samples - example).square().sum(dim=1) / width**2).exp()


def activations(model: PreTrainedModel, data: Any) -> list[Tensor]:
    """Each hidden layer's activations, (samples, width), and at last the class probabilities (samples, classes).

    In float64, for networks that see a sample as one position. Of a single output the value itself is given.
    """
    anatomy = Anatomy(model)
    stack = anatomy.stack()
    ffns = [anatomy.parts(stack, index).ffn for index in range(len(stack))]
    outputs = [ffn.output for ffn in ffns if ffn is not None and ffn.output is not None]
    if len(outputs) != len(stack):
        raise UnsupportedModelError(f"not every block of {stack.path} has hidden units that could be compared")
    parts: list[list[Tensor]] = [[] for _ in range(len(stack) + 1)]
    with inference(model), ExitStack() as hooks:
        modules = [block.get_submodule(path) for block, path in zip(stack.blocks, outputs, strict=True)]
        seen = [hooks.enter_context(watch_module(module)) for module in modules]
        for batch in prepare(data, model, None, DataOptions(batch_size=256)):
            logits = first_tensor(forward(model, batch)).double()
            for layer, one in zip(parts, seen, strict=False):
                if one.given is None or one.given.numel() != batch.samples * one.given.shape[-1]:
                    raise UnsupportedModelError("faithfulness compares networks that see a sample as one position")
                layer.append(one.given.reshape(batch.samples, -1))
            parts[-1].append(logits.softmax(dim=-1) if logits.shape[-1] > 1 else logits)
    return [torch.cat(part).double().cpu() for part in parts]


def _means(layer: Tensor, labels: Sequence[int]) -> Tensor:
    """(samples, clusters): the mean activation of each cluster's members."""
    of = torch.as_tensor(labels)
    if of.shape != layer.shape[1:]:
        raise ValueError(f"clusters must name one for each of {layer.shape[1]} hidden units; got {list(of.shape)}")
    sums = layer.new_zeros(len(layer), int(of.max()) + 1).index_add_(1, of, layer)
    return sums / torch.bincount(of)


def _mean(values: Tensor, weights: Tensor | None) -> float:
    if weights is None:
        return float(values.mean())
    if weights.shape != values.shape or bool((weights < 0).any()) or not float(weights.sum()) > 0:
        raise ValueError(f"weights must be {len(values)} numbers, one a sample, none negative and not all 0")
    return float(weights.double() @ values / weights.double().sum())


def _check_alike(compressed: Sequence[Tensor], original: Sequence[Tensor]) -> None:
    shapes = [[list(one.shape) for one in side] for side in (compressed, original)]
    if shapes[0] != shapes[1] or any(len(shape) != 2 or 0 in shape for shape in shapes[0]):
        raise ValueError(f"compressed and original must be (samples, values), alike; got {shapes[0]} and {shapes[1]}")
