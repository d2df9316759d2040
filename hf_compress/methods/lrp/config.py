"""Settings of LRP-guided pruning and mixed precision."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hf_compress.attribution.composites import COMPOSITES
from hf_compress.checks import setting
from hf_compress.methods.base.amounts import AMOUNT, SIZE
from hf_compress.methods.base.settings import CompressionConfig

Score = Literal["relevance", "signed", "wanda", "magnitude", "random"]
STRUCTURED = ("neuron", "head", "block")
BITS = (2, 3, 4, 5, 6, 8)  # what groups of weights may get
MODULE_BITS = (4, 8)  # what whole modules may get: what vLLM's kernels for compressed-tensors have always been for


@dataclass(frozen=True)
class LRPConfig(CompressionConfig, method="lrp", paper="https://arxiv.org/abs/2507.05286"):
    """Prune by relevance, store the rest in mixed precision, or both.

    Pruning: `sparsity`, or `ratio`, is the share that goes: of single weights ("weight", or 2 of 4 with "n:m"), output
    channels ("row"), hidden units ("neuron"), key and value heads with their queries ("head") or blocks. Units, heads
    and blocks leave smaller matrices; the others are stored as a mask and what is left.

    Mixed precision: `bits` a weight in the mean, or `target_bytes` for the linear maps of the blocks, all that is
    stored counted: groups of `group_size` weights get 2 to 8 bits each, more where errors cost the outputs more, by
    their Fisher information. With per="module" all groups of a linear map get as many, 4 or 8, and so do maps that read
    the same input, such as queries, keys and values: what `save_compressed_tensors` can write for stock Transformers
    and vLLM.

    variant="paper": what has a mean relevance of 0 or less goes, weights or neurons, and `split` gives the more
    relevant half of a layer's weights more bits than the other, at the cost of a bit a weight to tell them apart.

    `score`, `allocation` and `rounding` can be set apart: for controls.
    """

    sparsity: float | None = setting(None, "share to leave out", "(0, 1)", group=AMOUNT)
    ratio: float | None = setting(None, "the same as sparsity", "(0, 1)", group=AMOUNT)
    granularity: Literal["weight", "n:m", "row", "neuron", "head", "block"] = setting("weight", "what is left out")
    pattern: tuple[int, int] = setting((2, 4), "how many stay of how many, with n:m", "[1, inf)")
    variant: Literal["default", "paper"] = setting("default", "paper: what has no relevance goes, however much that is")
    prune: bool = setting(True, "in the paper's variant: leave out what has relevance <= 0")
    score: Score | None = setting(None, "relevance when not given, signed in the paper's variant")
    temper: float = setting(
        0.25, "with score=relevance, |w| · (E |R| / |w|) to this power: 1 is E |R|, 0 the magnitude", "[0, 1]"
    )
    scope: Literal["row", "layer", "model"] = setting("layer", "among what weights are compared")
    compensation: Literal["auto", "none"] = setting(
        "auto", "auto: what is left makes up for what went, by least squares; or none"
    )
    bits: float | None = setting(None, "bits a weight in the mean, with all that is stored", "[2, 16]", group=SIZE)
    target_bytes: int | None = setting(None, "bytes of the linear maps, instead of bits", "[1, inf)", group=SIZE)
    split: tuple[int, int] | None = setting(
        None, "in the paper's variant: bits of the more and of the less relevant half", "[2, 16]"
    )
    per: Literal["group", "module"] = setting(
        "group", "who gets a number of bits of its own: each group of weights, or each module (4 or 8)"
    )
    group_size: int = setting(64, "neighbouring weights that share their bits and their step", "[1, inf)")
    symmetric: bool | None = setting(
        None, "lay grids evenly around 0, which needs no stored zeros; when not given, with per=module alone"
    )
    allocation: Literal["fisher", "relevance", "error", "uniform"] = setting(
        "fisher", "who gets bits: fisher (what the outputs feel), relevance, error, or uniform, all the same"
    )
    rounding: Literal["compensated", "nearest"] = setting("compensated", "of pruned maps always nearest")
    target: Literal["auto", "label", "predicted"] = setting(
        "auto", "what is explained: label (of texts: next words), predicted, or auto: what there is"
    )
    composite: str = setting(
        "attnlrp", "rules of relevance: attnlrp, cp (without queries and keys), or one that is registered"
    )
    tokens: int = setting(
        32768, "calibration tokens that weights are scored and solved on; bits are given by half of them", "[1, inf)"
    )
    seed: int = setting(0, "of score=random, and of the outputs drawn for allocation=fisher", "[0, inf)")
    stack: str | None = setting(None, "path of the residual stack; found when not given")

    def __post_init__(self) -> None:
        COMPOSITES.resolve(self.composite)
        if self.group_size % 8:
            raise ValueError(f"group_size must be a multiple of 8, so that groups fill bytes; got {self.group_size}")
        if self.pattern[0] >= self.pattern[1]:
            raise ValueError(f"pattern must be two whole numbers n < m, such as (2, 4); got {self.pattern}")
        if self.granularity == "n:m" and self.amount is not None:
            kept, given = "{} of {}".format(*self.pattern), f"{self.amount.word}={self.amount.value}"
            raise ValueError(f"granularity='n:m' keeps {kept}: leave out {given}")
        self._check_per()
        self._check_variant()

    def _check_per(self) -> None:
        if self.per == "group":
            return
        if not self.sized:
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
        elif self.prunes and not self.prune:
            raise ValueError("prune=False is the paper's: leave out what says how much to prune, or prune=False")
        elif not self.prunes and not self.quantizes:
            raise ValueError(
                "say what to do: sparsity= or ratio= to prune, bits= or target_bytes= for precision, or both"
            )

    def _check_paper(self) -> None:
        if self.split is not None and self.split[0] <= self.split[1]:
            raise ValueError(f"split must be two numbers of bits, 2 to 16, the larger first; got {self.split}")
        if self.granularity not in ("weight", "neuron"):
            raise ValueError(f"variant='paper' leaves out weights or neurons; got granularity={self.granularity!r}")
        if self.amount is not None or self.sized:
            raise ValueError(
                "variant='paper' leaves out what has no relevance, however much that is, and splits by the median: "
                "leave out sparsity, ratio, bits and target_bytes; for a precision, give split=(8, 4)"
            )
        if self.prune and self.split and self.granularity == "weight":
            raise ValueError("split weights are told apart by a mask, as pruned ones are: prune neurons, or none")
        if not self.prune and self.split is None:
            raise ValueError("prune=False leaves nothing to do without split=")

    @property
    def removed(self) -> float:
        """The share that is left out; 0 where the paper's rule or a pattern says what is."""
        return self.sparsity or self.ratio or 0.0

    @property
    def sized(self) -> bool:
        """Whether a size is given that weights are rounded to."""
        return self.bits is not None or self.target_bytes is not None

    @property
    def score_name(self) -> Score:
        """The score, given or by the variant."""
        return self.score or ("signed" if self.variant == "paper" else "relevance")

    @property
    def prunes(self) -> bool:
        """Whether something is left out."""
        return self.amount is not None or self.granularity == "n:m" or (self.variant == "paper" and self.prune)

    @property
    def solves(self) -> bool:
        """Whether what is left makes up for what went."""
        return self.compensation == "auto" and self.variant != "paper"

    @property
    def quantizes(self) -> bool:
        """Whether weights are rounded."""
        return self.sized or self.split is not None

    def is_symmetric(self, bits: int) -> bool:
        """Whether groups of so many bits have grids evenly around 0.

        Those of whole modules have, unless asked otherwise: from its version 0.18 on, compressed-tensors does not load
        stored zeros into Transformers. And with 8 bits always: there vLLM's Marlin kernels know no zeros.
        """
        whole = self.per == "module"
        return (whole if self.symmetric is None else self.symmetric) or (whole and bits == MODULE_BITS[-1])


def left_by(config: LRPConfig) -> str:
    """In what form the weights are stored that are left."""
    if config.quantizes:
        return "packed"
    return "sparse" if config.prunes and config.granularity not in STRUCTURED else ""


def common_results(config: LRPConfig) -> tuple[str, ...]:
    """Results that are the same however many units go, or however many bits weights get: those of the whole model."""
    if config.prunes:
        return ("scores",) if config.granularity in STRUCTURED else ()
    return ("energies", "unexplained inputs ")
