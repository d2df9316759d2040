"""Settings of LRP-guided pruning and mixed precision."""

from __future__ import annotations

from dataclasses import dataclass, field

from hf_compress.attribution.composites import COMPOSITES
from hf_compress.methods.base.checks import check_at_least, check_choice, check_positive, check_ratio, is_number
from hf_compress.methods.base.settings import CompressionConfig

VARIANTS = ("default", "paper")
GRANULARITIES = ("weight", "n:m", "row", "neuron", "head", "block")
STRUCTURED = ("neuron", "head", "block")
SCORE_NAMES = ("relevance", "signed", "wanda", "magnitude", "random")
SCOPES = ("row", "layer", "model")
COMPENSATIONS = ("auto", "none")
ALLOCATIONS = ("fisher", "relevance", "error", "uniform")
ROUNDINGS = ("compensated", "nearest")
BITS = (2, 3, 4, 5, 6, 8)  # what groups of weights may get
PERS = ("group", "module")
MODULE_BITS = (4, 8)  # what whole modules may get: what vLLM's kernels for compressed-tensors have always been for


@dataclass(frozen=True)
class LRPConfig(CompressionConfig, method="lrp", paper="https://arxiv.org/abs/2507.05286"):
    """Prune by relevance, store the rest in mixed precision, or both.

    Pruning: `sparsity` is the share that goes, of single weights ("weight", or 2 of 4 with "n:m"), of output channels
    ("row"), hidden units ("neuron"), key and value heads with their queries ("head") or blocks. Units, heads and blocks
    leave smaller matrices; the others are stored as a mask and what is left.

    Mixed precision: `bits` a weight in the mean, or `target_bytes` for the linear maps of the blocks, all that is
    stored counted: groups of `group_size` weights get 2 to 8 bits each, more where errors cost the outputs more, by
    their Fisher information. With per="module" all groups of a linear map get as many, 4 or 8, and so do maps that read
    the same input, such as queries, keys and values: what `save_compressed_tensors` can write for stock Transformers
    and vLLM.

    variant="paper": what has a mean relevance of 0 or less goes, weights or neurons, and `split` gives the more
    relevant half of a layer's weights more bits than the other, at the cost of a bit a weight to tell them apart.

    `score`, `allocation` and `rounding` can be set apart: for controls.
    """

    sparsity: float | None = field(default=None, metadata={"help": "share to leave out, in (0, 1)"})
    granularity: str = field(default="weight", metadata={"help": f"what is left out: {', '.join(GRANULARITIES)}"})
    pattern: tuple[int, int] = field(default=(2, 4), metadata={"help": "how many stay of how many, with n:m"})
    variant: str = field(default="default", metadata={"help": f"one of {', '.join(VARIANTS)}"})
    prune: bool = field(default=True, metadata={"help": "in the paper's variant: leave out what has relevance <= 0"})
    score: str | None = field(
        default=None,
        metadata={"help": f"one of {', '.join(SCORE_NAMES)}; relevance when not given, signed in the paper's variant"},
    )
    temper: float = field(
        default=0.25,
        metadata={"help": "with score=relevance, |w| · (E |R| / |w|) to this power: 1 is E |R|, 0 the magnitude"},
    )
    scope: str = field(default="layer", metadata={"help": "among what weights are compared: row, layer or model"})
    compensation: str = field(
        default="auto", metadata={"help": "auto: what is left makes up for what went, by least squares; or none"}
    )
    bits: float | None = field(default=None, metadata={"help": "bits a weight in the mean, with all that is stored"})
    target_bytes: int | None = field(default=None, metadata={"help": "bytes of the linear maps, instead of bits"})
    split: tuple[int, int] | None = field(
        default=None, metadata={"help": "in the paper's variant: bits of the more and of the less relevant half"}
    )
    per: str = field(
        default="group",
        metadata={"help": "who gets a number of bits of its own: each group of weights, or each module (4 or 8)"},
    )
    group_size: int = field(default=64, metadata={"help": "neighbouring weights that share their bits and their step"})
    symmetric: bool | None = field(
        default=None,
        metadata={
            "help": "lay grids evenly around 0, which needs no stored zeros; when not given, with per=module alone"
        },
    )
    allocation: str = field(
        default="fisher",
        metadata={"help": "who gets bits: fisher (what the outputs feel), relevance, error, or uniform, all the same"},
    )
    rounding: str = field(
        default="compensated", metadata={"help": f"one of {', '.join(ROUNDINGS)}; of pruned maps always nearest"}
    )
    target: str = field(
        default="auto",
        metadata={"help": "what is explained: label (of texts: next words), predicted, or auto: what there is"},
    )
    composite: str = field(
        default="attnlrp",
        metadata={"help": "rules of relevance: attnlrp, cp (without queries and keys), or one that is registered"},
    )
    tokens: int = field(default=32768, metadata={"help": "calibration tokens that weights are scored and solved on"})
    seed: int = field(default=0, metadata={"help": "of score=random, and of the outputs drawn for allocation=fisher"})
    stack: str | None = field(default=None, metadata={"help": "path of the residual stack; found when not given"})

    def __post_init__(self) -> None:
        check_choice("variant", self.variant, VARIANTS)
        check_choice("granularity", self.granularity, GRANULARITIES)
        check_choice("score", self.score_name, SCORE_NAMES)
        check_choice("scope", self.scope, SCOPES)
        check_choice("compensation", self.compensation, COMPENSATIONS)
        check_choice("allocation", self.allocation, ALLOCATIONS)
        check_choice("per", self.per, PERS)
        check_choice("rounding", self.rounding, ROUNDINGS)
        check_choice("target", self.target, ("auto", "label", "predicted"))
        COMPOSITES.resolve(self.composite)
        check_ratio("sparsity", self.sparsity)
        for name in ("tokens", "group_size"):
            check_at_least(name, getattr(self, name), 1)
        if self.symmetric is not None and type(self.symmetric) is not bool:
            raise ValueError(f"symmetric must be true or false, or not given; got {self.symmetric!r}")
        check_at_least("seed", self.seed, 0)
        if not (is_number(self.temper) and 0 <= self.temper <= 1):
            raise ValueError(f"temper must be a number from 0, the magnitude, to 1, E |R|; got {self.temper!r}")
        if self.group_size % 8:
            raise ValueError(f"group_size must be a multiple of 8, so that groups fill bytes; got {self.group_size}")
        self._check_pattern()
        self._check_size()
        self._check_per()
        self._check_variant()

    def _check_pattern(self) -> None:
        values = tuple(self.pattern) if isinstance(self.pattern, (list, tuple)) else ()
        if len(values) != 2 or any(type(value) is not int for value in values) or not 0 < values[0] < values[1]:
            raise ValueError(f"pattern must be two whole numbers n < m, such as (2, 4); got {self.pattern!r}")
        object.__setattr__(self, "pattern", values)
        if self.granularity == "n:m" and self.sparsity is not None:
            raise ValueError(f"granularity='n:m' keeps {values[0]} of {values[1]}: leave out sparsity={self.sparsity}")

    def _check_size(self) -> None:
        if self.bits is not None and self.target_bytes is not None:
            raise ValueError(f"give bits or target_bytes, not both; got {self.bits} and {self.target_bytes}")
        if self.bits is not None and not (is_number(self.bits) and BITS[0] <= self.bits <= 16):
            raise ValueError(f"bits must be a number from {BITS[0]} to 16; got {self.bits!r}")
        if self.target_bytes is not None:
            check_positive("target_bytes", self.target_bytes)

    def _check_per(self) -> None:
        if self.per == "group":
            return
        if self.bits is None and self.target_bytes is None:
            raise ValueError("per='module' says who shares a number of bits: give bits= or target_bytes= with it")
        if self.prunes and self.granularity not in STRUCTURED:
            raise ValueError(
                f"per='module' is for maps that are whole, and granularity={self.granularity!r} stores what is left of "
                "them: prune neurons or heads, or none"
            )

    def _check_variant(self) -> None:
        if self.variant == "paper":
            self._check_paper()
        elif self.split is not None:
            raise ValueError("split is the paper's: give variant='paper', or bits= for groups of weights")
        elif not self.prunes and not self.quantizes:
            raise ValueError("say what to do: sparsity= to prune, bits= or target_bytes= for mixed precision, or both")

    def _check_paper(self) -> None:
        if self.split is not None:
            values = tuple(self.split) if isinstance(self.split, (list, tuple)) else ()
            if len(values) != 2 or any(type(v) is not int for v in values) or not 2 <= values[1] < values[0] <= 16:
                raise ValueError(f"split must be two numbers of bits, 2 to 16, the larger first; got {self.split!r}")
            object.__setattr__(self, "split", values)
        if self.granularity not in ("weight", "neuron"):
            raise ValueError(f"variant='paper' leaves out weights or neurons; got granularity={self.granularity!r}")
        if self.sparsity is not None or self.bits is not None or self.target_bytes is not None:
            raise ValueError(
                "variant='paper' leaves out what has no relevance, however much that is, and splits by the median: "
                "leave out sparsity, bits and target_bytes; for a precision, give split=(8, 4)"
            )
        if self.prune and self.split and self.granularity == "weight":
            raise ValueError("split weights are told apart by a mask, as pruned ones are: prune neurons, or none")
        if not self.prune and self.split is None:
            raise ValueError("prune=False leaves nothing to do without split=")

    @property
    def score_name(self) -> str:
        """The score, given or by the variant."""
        return self.score or ("signed" if self.variant == "paper" else "relevance")

    @property
    def prunes(self) -> bool:
        """Whether something is left out."""
        return self.sparsity is not None or self.granularity == "n:m" or (self.variant == "paper" and self.prune)

    @property
    def solves(self) -> bool:
        """Whether what is left makes up for what went."""
        return self.compensation == "auto" and self.variant != "paper"

    @property
    def quantizes(self) -> bool:
        """Whether weights are rounded."""
        return self.bits is not None or self.target_bytes is not None or self.split is not None

    def is_symmetric(self, bits: int) -> bool:
        """Whether groups of so many bits have grids evenly around 0.

        Those of whole modules have, unless asked otherwise: from its version 0.18 on, compressed-tensors does not load
        stored zeros into Transformers. And with 8 bits always: there vLLM's Marlin kernels know no zeros.
        """
        whole = self.per == "module"
        return (whole if self.symmetric is None else self.symmetric) or (whole and bits == MODULE_BITS[-1])
