"""Settings of AdaptiveCompress and of the peers in its interface."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from hf_compress.checks import setting
from hf_compress.methods.base.amounts import AMOUNT
from hf_compress.methods.base.settings import CompressionConfig

Variant = Literal["default", "paper", "pca", "linear", "topk", "batchtopk"]


@dataclass(frozen=True)
class AdaptiveCompressConfig(CompressionConfig, method="adaptive_compress"):
    """Bottlenecks behind blocks: what leaves the block passes through features, of which fewer and fewer are kept.

    Where: `layers`, indices of blocks, or `fractions` of the depth in (0, 1]; a quarter, half and three quarters when
    neither is given. How many features: `retention_final` of the stream's width (or all but `ratio` of it), rounded up,
    after `retention_init` during the warm-up and a linear decay.

    variant="paper": its equations (2) to (6). The peers: "pca", "linear" (an autoencoder), "topk" and "batchtopk"
    (dictionaries of `expansion` times the width, of which as many are active as the others keep features).

    mode="splice": `compress` leaves the bottlenecks in the model. mode="observe": the model stays as it is, and
    `hf_compress.fit`, or the callback, gives them apart.
    """

    variant: Variant = setting("default", "paper: its equations; the others are its peers")
    layers: Sequence[int] | None = setting(None, "blocks with a bottleneck behind, from 0", "[0, inf)", group="places")
    fractions: Sequence[float] | None = setting(
        None,
        "of the depth, 1 being the last block, instead of layers; 0.25, 0.5, 0.75 when not given",
        "(0, 1]",
        group="places",
    )
    mode: Literal["splice", "observe"] = setting("splice", "splice, into the model; or observe, and leave it as it is")
    retention_init: float = setting(0.999, "share of the width kept in the warm-up", "(0, 1]")
    retention_final: float | None = setting(
        None, "share of the width kept at the end; 0.95 when not given", "(0, 1]", group=AMOUNT, keeps=True
    )
    ratio: float | None = setting(
        None, "share of the width taken out in the end: 1 − retention_final", "(0, 1)", group=AMOUNT
    )
    warmup_steps: int | None = setting(None, "a fifth of all steps when not given", "[0, inf)")
    decay_steps: int | None = setting(None, "three fifths of all steps when not given", "[0, inf)")
    ema: float = setting(0.99, "share of the old importance in the new, a step; at 1 it would never change", "[0, 1)")
    l1: float = setting(0.04, "weight of the codes' size in the loss", "[0, inf]")
    contrastive: float = setting(0.1, "weight of the codes' correlations in the loss", "[0, inf]")
    skip: float | None = setting(None, "share of the stream that passes by; 0.1 when not given, for peers 0", "[0, 1)")
    importance: Literal["energy", "sign"] | None = setting(
        None, "energy, or sign as in the paper; by the variant when not given"
    )
    tie_weights: bool = setting(False, "whether the decoder is the encoder, transposed")
    expansion: int = setting(4, "of dictionaries: features as a multiple of the width", "[1, inf)")
    aux: float = setting(1 / 32, "of dictionaries: weight of the loss that revives features", "[0, inf]")
    dead_steps: int = setting(100, "of dictionaries: steps without activity that make it dead", "[1, inf)")
    learning_rate: float | None = setting(None, "3e-4 when not given, 1e-3 for others", "(0, inf]")
    updates: int = setting(4, "optimizer steps a batch, each with a part of its tokens", "[1, inf)")
    epochs: int = setting(1, "how often the data is gone through", "[1, inf)")
    outliers: float = setting(10.0, "tokens of so many times the median norm are left out", "(1, inf]")
    seed: int = setting(0, "of the order of tokens, and of what starts at random", "[0, inf)")
    stack: str | None = setting(None, "path of the residual stack; found when not given")

    def __post_init__(self) -> None:
        for name in ("layers", "fractions"):
            places = getattr(self, name) or ()
            if len(set(places)) < len(places):
                raise ValueError(f"{name} names a place twice: {list(places)}")
        if self.kept > self.retention_init and self.scheduled:
            raise ValueError(
                f"retention must not increase: retention_init={self.retention_init}, and {self.kept} at the end; raise "
                "the one or lower the other"
            )

    @property
    def kept(self) -> float:
        """The share of the width that is kept at the end."""
        return 0.95 if self.amount is None else self.amount.kept

    @property
    def scheduled(self) -> bool:
        """Whether retention falls while it learns; the peers have theirs from the start."""
        return self.variant in ("default", "paper")

    @property
    def passing(self) -> float:
        """s, the share of the stream that passes by."""
        return self.skip if self.skip is not None else 0.1 if self.scheduled else 0.0

    @property
    def tracked(self) -> Literal["energy", "sign"]:
        """By what importance is measured."""
        return self.importance or ("sign" if self.variant == "paper" else "energy")

    @property
    def rate(self) -> float:
        """The learning rate."""
        return self.learning_rate or (3e-4 if self.variant == "default" else 1e-3)

    def features(self, hidden: int, retention: float | None = None) -> int:
        """How many features a stream of width `hidden` keeps; at the end when no retention is given."""
        share = self.kept if retention is None else retention
        return min(hidden, max(1, math.ceil(share * hidden - 1e-9)))  # 0.95 · 20 is 19.000…, not 20

    def phases(self, steps: int) -> tuple[int, int]:
        """Steps of warm-up and of decay, of `steps` in all."""
        warmup = steps // 5 if self.warmup_steps is None else self.warmup_steps
        decay = steps * 3 // 5 if self.decay_steps is None else self.decay_steps
        return warmup, decay

    def retention(self, step: int, steps: int) -> float:
        """r(t), kept between its two ends (AdaptiveCompress, equation 6)."""
        warmup, decay = self.phases(steps)
        gone = (step - warmup) / decay if decay else float(step >= warmup)
        share = self.retention_init - (self.retention_init - self.kept) * gone
        return min(self.retention_init, max(self.kept, share))
