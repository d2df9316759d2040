"""MKA: merging whole residual blocks whose activations carry the same information (arXiv 2406.16330)."""

from __future__ import annotations

from dataclasses import dataclass, field

from hf_compress.methods.base.amounts import check_amount
from hf_compress.methods.base.checks import (
    check_at_least,
    check_choice,
    check_not_negative,
    check_positive,
    check_share,
)
from hf_compress.methods.base.settings import CompressionConfig
from hf_compress.numerics.manifold import MANIFOLDS
from hf_compress.numerics.similarity import SIMILARITIES

VARIANTS = ("refit", "paper")
SIMILARITY_NAMES = (*sorted(SIMILARITIES), "block_influence")


@dataclass(frozen=True)
class MKAConfig(CompressionConfig, method="mka", paper="https://arxiv.org/abs/2406.16330"):
    """Merge neighbouring blocks.

    variant="refit", the default: the pair whose merging costs least becomes one block, the earlier of the two, whose
    output projections are solved for anew so that it gives what both gave; then every later block is corrected for what
    is left of the error. `similarity` and what belongs to it play no part; `analyze` shows them.

    variant="paper": the pair of the highest similarity becomes one block by averaging all parameters,
    alpha * earlier + (1 - alpha) * later.
    """

    ratio: float | None = field(default=None, metadata={"help": "share of the blocks to merge away, in (0, 1)"})
    num_merges: int | None = field(default=None, metadata={"help": "number of merges, instead of ratio"})
    threshold: float | None = field(
        default=None, metadata={"help": "paper variant: merge no pair that is less similar than this, in [0, 1]"}
    )
    variant: str = field(default="refit", metadata={"help": f"one of {', '.join(VARIANTS)}"})
    similarity: str = field(default="information", metadata={"help": f"one of {', '.join(SIMILARITY_NAMES)}"})
    manifold: str = field(default="diffusion", metadata={"help": "embedding: diffusion, pca or none"})
    components: int = field(default=8, metadata={"help": "dimensions of the embedding"})
    bandwidth: float | None = field(
        default=None, metadata={"help": "of the kernel; the median distance when not given"}
    )
    time: float = field(default=1.0, metadata={"help": "diffusion time: eigenvectors are scaled by eigenvalue ** time"})
    neighbors: int = field(default=3, metadata={"help": "of the nearest-neighbour estimate of information"})
    pooling: str = field(default="mean", metadata={"help": "of a sample's tokens: mean or last"})
    alpha: float | None = field(
        default=None, metadata={"help": "paper variant: weight of the earlier block; the similarity when not given"}
    )
    iterative: bool = field(
        default=True, metadata={"help": "paper variant: measure the similarity anew after every merge"}
    )
    choice_samples: int = field(
        default=32, metadata={"help": "refit variant: calibration samples that candidates are compared on"}
    )
    refit_tokens: int = field(
        default=32768, metadata={"help": "refit variant: calibration tokens that projections are solved from"}
    )
    stack: str | None = field(default=None, metadata={"help": "path of the residual stack; found when not given"})

    def __post_init__(self) -> None:
        check_amount(self.ratio, self.num_merges, "num_merges")
        check_choice("variant", self.variant, VARIANTS)
        check_choice("similarity", self.similarity, SIMILARITY_NAMES)
        check_choice("manifold", self.manifold, tuple(MANIFOLDS))
        check_choice("pooling", self.pooling, ("mean", "last"))
        for name, least in (("components", 1), ("neighbors", 1), ("choice_samples", 1), ("refit_tokens", 1)):
            check_at_least(name, getattr(self, name), least)
        for name in ("threshold", "alpha"):
            if (value := getattr(self, name)) is not None:
                check_share(name, value)
        check_not_negative("time", self.time)
        if self.bandwidth is not None:
            check_positive("bandwidth", self.bandwidth)
        if self.ratio is None and self.num_merges is None and (self.threshold is None or self.variant != "paper"):
            raise ValueError("say how much to merge: ratio=, num_merges=, or, in the paper variant, threshold=")
        if self.variant != "paper" and (self.threshold is not None or self.alpha is not None):
            raise ValueError(
                "threshold and alpha belong to variant='paper'; the refit chooses by loss and averages nothing"
            )
