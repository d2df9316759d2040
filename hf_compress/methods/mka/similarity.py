"""How alike the blocks of a stack are, by what they make of the calibration samples."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_compress.anatomy.stacks import Stack
from hf_compress.calibration.data import Calibration
from hf_compress.calibration.processes import from_one
from hf_compress.calibration.statistics import BlockStatistics, Earlier, block_statistics
from hf_compress.errors import CalibrationError
from hf_compress.methods.mka.config import MKAConfig
from hf_compress.numerics.manifold import embed
from hf_compress.numerics.similarity import similarity_matrix


def block_similarity(
    config: MKAConfig,
    model: PreTrainedModel,
    stack: Stack,
    calibration: Calibration,
    earlier: Earlier | None = None,
) -> Tensor:
    """S, (blocks, blocks) float64, symmetric with ones on the diagonal, from one pass over the calibration data.

    Args:
        earlier: what the last pass has left, where there are to be several.

    Raises:
        CalibrationError: fewer samples than the embedding and the estimate need; activations that are not finite.
    """
    check_samples(config, calibration)
    pooling: Any = config.pooling
    statistics = block_statistics(model, stack, calibration, pooling, earlier=earlier)
    return from_one(lambda: similarity_of(config, statistics))


def similarity_of(config: MKAConfig, statistics: BlockStatistics) -> Tensor:
    """S from what one pass gathered: embedding of every block's pooled states, then the pairwise measure."""
    if config.similarity == "block_influence":
        return _from_influence(statistics.influence)
    if config.similarity != "information":
        return similarity_matrix(statistics.pooled, config.similarity)
    options = {"bandwidth": config.bandwidth, "time": config.time} if config.manifold == "diffusion" else {}
    embeddings = [embed(states, config.manifold, config.components, **options) for states in statistics.pooled]
    return similarity_matrix(embeddings, "information", neighbors=config.neighbors)


def _from_influence(influence: Tensor) -> Tensor:
    """Neighbours l, l + 1 are as alike as block l + 1 turns the stream little. Others are not compared."""
    matrix = torch.eye(len(influence), dtype=torch.float64)
    for later in range(1, len(influence)):
        matrix[later - 1, later] = matrix[later, later - 1] = 1 - influence[later]
    return matrix


def check_samples(config: MKAConfig, calibration: Calibration) -> None:
    """CalibrationError where there are fewer samples than the embedding and the estimate need."""
    embedding = config.components + 2 if config.manifold != "none" else 1
    needed = max(embedding, config.neighbors + 2, 4) if config.similarity == "information" else 4
    if calibration.samples < needed:
        raise CalibrationError(
            f"{calibration.samples} calibration samples are too few for similarity={config.similarity!r} with "
            f"components={config.components} and neighbors={config.neighbors}: at least {needed} are needed, "
            "some hundreds are better"
        )
