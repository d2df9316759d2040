"""MKA: merging whole residual blocks whose activations carry the same information (arXiv 2406.16330)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hf_compress.checks import setting
from hf_compress.methods.base.amounts import AMOUNT
from hf_compress.methods.base.settings import CompressionConfig

Similarity = Literal["information", "cka", "cosine", "angular", "block_influence"]


@dataclass(frozen=True)
class MKAConfig(CompressionConfig, method="mka", paper="https://arxiv.org/abs/2406.16330"):
    """Merge neighbouring blocks.

    variant="refit", the default: the pair whose merging costs least becomes one block, the earlier of the two, whose
    output projections are solved for anew so that it gives what both gave; then every later block is corrected for what
    is left of the error. `similarity` and what belongs to it play no part; `analyze` shows them.

    variant="paper": the pair of the highest similarity becomes one block by averaging all parameters,
    alpha * earlier + (1 - alpha) * later.
    """

    ratio: float | None = setting(None, "share of the blocks to merge away", "(0, 1)", group=AMOUNT)
    num_merges: int | None = setting(None, "number of merges, instead of ratio", "[1, inf)", group=AMOUNT)
    threshold: float | None = setting(None, "paper variant: merge no pair that is less similar than this", "[0, 1]")
    variant: Literal["refit", "paper"] = setting("refit", "refit solves for what both blocks gave; paper averages")
    similarity: Similarity = setting("information", "of two blocks' activations, in the paper variant and in analyze")
    manifold: Literal["diffusion", "pca", "none"] = setting("diffusion", "embedding that information is measured in")
    components: int = setting(8, "dimensions of the embedding", "[1, inf)")
    bandwidth: float | None = setting(None, "of the kernel; the median distance when not given", "(0, inf]")
    time: float = setting(1.0, "diffusion time: eigenvectors are scaled by eigenvalue ** time", "[0, inf]")
    neighbors: int = setting(3, "of the nearest-neighbour estimate of information", "[1, inf)")
    pooling: Literal["mean", "last"] = setting("mean", "of a sample's tokens")
    alpha: float | None = setting(
        None, "paper variant: weight of the earlier block; the similarity when not given", "[0, 1]"
    )
    iterative: bool = setting(True, "paper variant: measure the similarity anew after every merge")
    choice_samples: int = setting(32, "refit variant: calibration samples that candidates are compared on", "[1, inf)")
    refit_tokens: int = setting(32768, "refit variant: calibration tokens that projections are solved from", "[1, inf)")
    stack: str | None = setting(None, "path of the residual stack; found when not given")

    def __post_init__(self) -> None:
        if self.amount is None and (self.threshold is None or self.variant != "paper"):
            raise ValueError("say how much to merge: ratio=, num_merges=, or, in the paper variant, threshold=")
        if self.variant != "paper" and (self.threshold is not None or self.alpha is not None):
            raise ValueError(
                "threshold and alpha belong to variant='paper'; the refit chooses by loss and averages nothing"
            )
