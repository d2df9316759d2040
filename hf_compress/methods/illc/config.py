"""Settings of ILLC."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

from hf_compress.methods.base.checks import check_at_least, check_choice, check_positive, is_number
from hf_compress.methods.base.settings import CompressionConfig

VARIANTS = ("compensated", "paper")
REDUCTION_NAMES = ("elimination", "average", "representative", "magnitude", "variance", "random")
COMPENSATIONS = ("ridge", "bias", "none")
CLUSTERING_NAMES = ("kmeans", "agglomerative", "minibatch_kmeans", "neighbors")
ALLOCATIONS = ("uniform", "adaptive")
TARGETS = ("stream", "ffn")


@dataclass(frozen=True)
class ILLCConfig(CompressionConfig, method="illc", paper="https://arxiv.org/abs/2503.03693"):
    """Narrow FFNs to fewer hidden units, layer by layer, each layer on the activations of the compressed ones below.

    How many stay: `gamma`, the share of the hidden units that is *kept*, or `width`, their number. With `head_gamma`
    attention keeps only a share of its key and value heads, each with the queries that read it.

    variant="compensated", the default: units are left out one after another, each time the one that the rest can stand
    in for best, and the output projection is solved anew by ridge regression, so that the block gives what the original
    block gave, errors from below included (`target="stream"`) or not (`target="ffn"`).

    variant="paper": units are clustered by their activations; a cluster becomes one unit that reads the mean of what
    its members read and writes the sum of what they wrote. `iterative=False` clusters every layer on the original
    model's activations, as SpArX does. With an `example`, samples count by how near they are to it.

    `reduction` and `compensation` can be set apart from the variant: for controls, and for what the variants leave out.
    """

    gamma: float | None = field(default=None, metadata={"help": "share of the hidden units to keep, in (0, 1]"})
    width: int | None = field(default=None, metadata={"help": "hidden units to keep in each FFN, instead of gamma"})
    head_gamma: float | None = field(
        default=None,
        metadata={"help": "share of the key and value heads to keep, in (0, 1], with the queries that read them"},
    )
    variant: str = field(default="compensated", metadata={"help": f"one of {', '.join(VARIANTS)}"})
    iterative: bool = field(
        default=True, metadata={"help": "let each layer see the compressed layers below; without: SpArX"}
    )
    reduction: str | None = field(
        default=None,
        metadata={
            "help": f"one of {', '.join(REDUCTION_NAMES)}; elimination when not given, average in the paper's variant"
        },
    )
    compensation: str | None = field(
        default=None,
        metadata={"help": f"one of {', '.join(COMPENSATIONS)}; ridge when not given, none in the paper's variant"},
    )
    target: str = field(
        default="stream",
        metadata={
            "help": "what the ridge aims at: the original stream after the block, or what the original ffn wrote"
        },
    )
    bias: bool = field(
        default=False,
        metadata={"help": "give output projections without a bias one (then loads with hf_compress installed only)"},
    )
    clustering: str = field(default="kmeans", metadata={"help": f"one of {', '.join(CLUSTERING_NAMES)}"})
    allocation: str = field(
        default="uniform",
        metadata={"help": "uniform, one width for all FFNs, or adaptive (then loads with hf_compress installed only)"},
    )
    plain: bool = field(default=False, metadata={"help": "refuse what stock Transformers could not load"})
    tokens: int = field(default=32768, metadata={"help": "calibration tokens that layers are solved from"})
    cluster_tokens: int = field(default=4096, metadata={"help": "calibration tokens that units are clustered by"})
    example: tuple[float, ...] | None = field(
        default=None, metadata={"help": "be faithful around this sample; for models that read vectors"}
    )
    kernel_width: float | None = field(
        default=None, metadata={"help": "how far around the example, 0.75 · √features when not given"}
    )
    seed: int = field(default=0, metadata={"help": "of clusterings that draw, and of reduction=random"})
    stack: str | None = field(default=None, metadata={"help": "path of the residual stack; found when not given"})

    def __post_init__(self) -> None:
        check_choice("variant", self.variant, VARIANTS)
        check_choice("reduction", self.reduction_name, REDUCTION_NAMES)
        check_choice("compensation", self.compensation_name, COMPENSATIONS)
        check_choice("target", self.target, TARGETS)
        check_choice("clustering", self.clustering, CLUSTERING_NAMES)
        check_choice("allocation", self.allocation, ALLOCATIONS)
        for name in ("tokens", "cluster_tokens"):
            check_at_least(name, getattr(self, name), 1)
        check_at_least("seed", self.seed, 0)
        self._check_amount()
        self._check_example()
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

    def _check_amount(self) -> None:
        narrower = [self.gamma, self.width].count(None)
        if narrower == 0 or (narrower == 2 and self.head_gamma is None):
            raise ValueError(
                f"say how much to keep: gamma= or width=; got gamma={self.gamma}, width={self.width}; for attention, "
                "head_gamma="
            )
        for name, what in (("gamma", "hidden units"), ("head_gamma", "key and value heads")):
            value = getattr(self, name)
            if value is not None and not (is_number(value) and 0 < value <= 1):
                raise ValueError(f"{name} is the share of the {what} to keep, in (0, 1]; got {value!r}")
        if self.head_gamma is not None and self.reduction_name in ("average", "representative"):
            raise ValueError(
                f"head_gamma keeps whole heads, and reduction={self.reduction_name!r} clusters; averaged queries and "
                "keys would not attend alike: take elimination, magnitude, variance or random"
            )
        check_at_least("width", self.width, 1)

    def _check_example(self) -> None:
        if self.example is not None:
            values = tuple(self.example) if isinstance(self.example, Iterable) else ()
            if not values or not all(is_number(value) and math.isfinite(value) for value in values):
                raise ValueError(f"example must be the numbers of one sample; got {self.example!r}")
            object.__setattr__(self, "example", values)
        if self.kernel_width is not None:
            check_positive("kernel_width", self.kernel_width)
            if self.example is None:
                raise ValueError("kernel_width says how far around the example to look: give example= too")

    @property
    def reduction_name(self) -> str:
        """The reduction, given or by the variant."""
        return self.reduction or ("average" if self.variant == "paper" else "elimination")

    @property
    def compensation_name(self) -> str:
        """The compensation, given or by the variant."""
        return self.compensation or ("none" if self.variant == "paper" else "ridge")

    def rows_of_a_batch(self, batches: int) -> int:
        """How many tokens of each of so many batches units are clustered by."""
        return -(-self.cluster_tokens // batches)
