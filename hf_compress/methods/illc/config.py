"""Settings of ILLC."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hf_compress.checks import setting
from hf_compress.methods.base.amounts import AMOUNT
from hf_compress.methods.base.settings import CompressionConfig

Reduction = Literal["elimination", "average", "representative", "magnitude", "variance", "random"]
Compensation = Literal["ridge", "bias", "none"]


@dataclass(frozen=True)
class ILLCConfig(CompressionConfig, method="illc", paper="https://arxiv.org/abs/2503.03693"):
    """Narrow FFNs to fewer hidden units, layer by layer, each layer on the activations of the compressed ones below.

    How many stay: `gamma`, the share of the hidden units that is *kept*, or `width`, their number; or how many go:
    `ratio`, 1 − gamma. Shares are rounded to multiples of `align`, since kernels compute with whole tiles, of 64 units
    at best; when it is not given, in FFNs of 1,024 units or more, to multiples of the power of two that is at most a
    64th of their width. With `head_gamma` attention keeps only a share of its key and value heads, each with the
    queries that read them.

    variant="compensated", the default: units are left out one after another, each time the one that the rest can stand
    in for best, and the output projection is solved anew by ridge regression, so that the block gives what the original
    block gave, errors from below included (`target="stream"`) or not (`target="ffn"`).

    variant="paper": units are clustered by their activations; a cluster becomes one unit that reads the mean of what
    its members read and writes the sum of what they wrote. `iterative=False` clusters every layer on the original
    model's activations, as SpArX does. With an `example`, samples count by how near they are to it.

    `reduction` and `compensation` can be set apart from the variant: for controls, and for what the variants leave out.
    """

    gamma: float | None = setting(None, "share of the hidden units to keep", "(0, 1]", group=AMOUNT, keeps=True)
    width: int | None = setting(
        None, "hidden units to keep in each FFN, instead of gamma", "[1, inf)", group=AMOUNT, keeps=True
    )
    ratio: float | None = setting(
        None, "share of the hidden units to take out, instead of gamma, which is 1 − ratio", "(0, 1)", group=AMOUNT
    )
    head_gamma: float | None = setting(
        None, "share of the key and value heads to keep, with the queries that read them", "(0, 1]"
    )
    variant: Literal["compensated", "paper"] = setting("compensated", "how units are chosen and made up for")
    iterative: bool = setting(True, "let each layer see the compressed layers below; without: SpArX")
    reduction: Reduction | None = setting(None, "elimination when not given, average in the paper's variant")
    compensation: Compensation | None = setting(None, "ridge when not given, none in the paper's variant")
    target: Literal["stream", "ffn"] = setting(
        "stream", "what the ridge aims at: the original stream after the block, or what the original ffn wrote"
    )
    bias: bool = setting(
        False, "give output projections without a bias one (then loads with hf_compress installed only)"
    )
    clustering: Literal["kmeans", "agglomerative", "minibatch_kmeans", "neighbors"] = setting(
        "kmeans", "how the paper's variant finds units that are alike"
    )
    allocation: Literal["uniform", "adaptive"] = setting(
        "uniform", "uniform, one width for all FFNs, or adaptive (then loads with hf_compress installed only)"
    )
    align: int | None = setting(
        None,
        "keep hidden units in multiples of it; when not given, of 16 to 64 in FFNs of 1,024 or more",
        "[1, inf)",
    )
    plain: bool = setting(False, "refuse what stock Transformers could not load")
    tokens: int = setting(32768, "calibration tokens that layers are solved from", "[1, inf)")
    cluster_tokens: int = setting(4096, "calibration tokens that units are clustered by", "[1, inf)")
    example: tuple[float, ...] | None = setting(
        None, "the numbers of one sample: be faithful around it; for models that read vectors", "(-inf, inf)"
    )
    kernel_width: float | None = setting(
        None, "how far around the example, 0.75 · √features when not given", "(0, inf]"
    )
    seed: int = setting(0, "of clusterings that draw, and of reduction=random", "[0, inf)")
    stack: str | None = setting(None, "path of the residual stack; found when not given")

    def __post_init__(self) -> None:
        if self.amount is None and self.head_gamma is None:
            raise ValueError("say how much: ratio=, or gamma= or width= to keep; for attention, head_gamma=")
        if self.head_gamma is not None and self.clusters:
            raise ValueError(
                f"head_gamma keeps whole heads, and reduction={self.reduction_name!r} clusters; averaged queries and "
                "keys would not attend alike: take elimination, magnitude, variance or random"
            )
        if self.width is not None and self.width % (self.align or 1):
            raise ValueError(f"width={self.width} is no multiple of align={self.align}: change one of them")
        if self.kernel_width is not None and self.example is None:
            raise ValueError("kernel_width says how far around the example to look: give example= too")
        if self.plain and (self.allocation == "adaptive" or self.bias or self.compensation == "bias"):
            given = {"allocation": self.allocation, "bias": self.bias, "compensation": self.compensation}
            raise ValueError(
                f"plain=True keeps one width for all FFNs and the biases that there are; got {given}: leave out plain, "
                "or these"
            )
        if self.allocation == "adaptive" and self.reduction_name == "average":
            raise ValueError(
                "allocation='adaptive' measures what units that are kept can do; reduction='average' keeps none: "
                "take representative"
            )

    @property
    def kept(self) -> float:
        """The share of the hidden units that stays, where no `width` says how many."""
        return 1.0 if self.amount is None or self.width is not None else self.amount.kept

    @property
    def reduction_name(self) -> Reduction:
        """The reduction, given or by the variant."""
        return self.reduction or ("average" if self.variant == "paper" else "elimination")

    @property
    def compensation_name(self) -> Compensation:
        """The compensation, given or by the variant."""
        return self.compensation or ("none" if self.variant == "paper" else "ridge")

    @property
    def clusters(self) -> bool:
        """Whether units are clustered."""
        return self.reduction_name in ("average", "representative")

    def rows_of_a_batch(self, batches: int) -> int:
        """How many tokens of each of so many batches units are clustered by."""
        return -(-self.cluster_tokens // batches)
