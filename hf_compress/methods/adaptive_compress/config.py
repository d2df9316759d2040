"""Settings of AdaptiveCompress and of the peers in its interface."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from hf_compress.methods.base.checks import (
    check_at_least,
    check_choice,
    check_not_negative,
    check_positive,
    check_share,
    is_number,
)
from hf_compress.methods.base.settings import CompressionConfig

SCHEDULED = ("default", "paper")
PEERS = ("pca", "linear", "topk", "batchtopk")
IMPORTANCES = ("energy", "sign")
MODES = ("splice", "observe")


@dataclass(frozen=True)
class AdaptiveCompressConfig(CompressionConfig, method="adaptive_compress"):
    """Bottlenecks behind blocks: what leaves the block passes through features, of which fewer and fewer are kept.

    Where: `layers`, indices of blocks, or `fractions` of the depth in (0, 1]; a quarter, half and three quarters when
    neither is given. How many features: `retention_final` of the stream's width, rounded up, after `retention_init`
    during the warm-up and a linear decay.

    variant="paper": its equations (2) to (6). The peers: "pca", "linear" (an autoencoder), "topk" and "batchtopk"
    (dictionaries of `expansion` times the width, of which as many are active as the others keep features).

    mode="splice": `compress` leaves the bottlenecks in the model. mode="observe": the model stays as it is, and
    `hf_compress.fit`, or the callback, gives them apart.
    """

    variant: str = field(default="default", metadata={"help": f"one of {', '.join(SCHEDULED + PEERS)}"})
    layers: Sequence[int] | None = field(default=None, metadata={"help": "blocks to put a bottleneck behind, from 0"})
    fractions: Sequence[float] | None = field(
        default=None, metadata={"help": "of the depth, in (0, 1], instead of layers; 0.25, 0.5, 0.75 when not given"}
    )
    mode: str = field(default="splice", metadata={"help": "splice, into the model; or observe, and leave it as it is"})
    retention_init: float = field(default=0.999, metadata={"help": "share of the width kept in the warm-up"})
    retention_final: float = field(default=0.95, metadata={"help": "share of the width kept at the end"})
    warmup_steps: int | None = field(default=None, metadata={"help": "a fifth of all steps when not given"})
    decay_steps: int | None = field(default=None, metadata={"help": "three fifths of all steps when not given"})
    ema: float = field(default=0.99, metadata={"help": "share of the old importance in the new, a step"})
    l1: float = field(default=0.04, metadata={"help": "weight of the codes' size in the loss"})
    contrastive: float = field(default=0.1, metadata={"help": "weight of the codes' correlations in the loss"})
    skip: float | None = field(
        default=None, metadata={"help": "share of the stream that passes by; 0.1 when not given, for peers 0"}
    )
    importance: str | None = field(
        default=None, metadata={"help": "energy, or sign as in the paper; by the variant when not given"}
    )
    tie_weights: bool = field(default=False, metadata={"help": "whether the decoder is the encoder, transposed"})
    expansion: int = field(default=4, metadata={"help": "of dictionaries: features as a multiple of the width"})
    aux: float = field(default=1 / 32, metadata={"help": "of dictionaries: weight of the loss that revives features"})
    dead_steps: int = field(default=100, metadata={"help": "of dictionaries: steps without activity that make it dead"})
    learning_rate: float | None = field(default=None, metadata={"help": "3e-4 when not given, 1e-3 for others"})
    updates: int = field(default=4, metadata={"help": "optimizer steps a batch, each with a part of its tokens"})
    epochs: int = field(default=1, metadata={"help": "how often the data is gone through"})
    outliers: float = field(default=10.0, metadata={"help": "tokens of so many times the median norm are left out"})
    seed: int = field(default=0, metadata={"help": "of the order of tokens, and of what starts at random"})
    stack: str | None = field(default=None, metadata={"help": "path of the residual stack; found when not given"})

    def __post_init__(self) -> None:
        check_choice("variant", self.variant, SCHEDULED + PEERS)
        check_choice("mode", self.mode, MODES)
        if self.importance is not None:
            check_choice("importance", self.importance, IMPORTANCES)
        self._check_places()
        self._check_schedule()
        for name in ("l1", "contrastive", "aux"):
            check_not_negative(name, getattr(self, name))
        for name in ("expansion", "dead_steps", "updates", "epochs"):
            check_at_least(name, getattr(self, name), 1)
        check_share("skip", self.passing)
        if self.passing == 1:
            raise ValueError("skip=1 passes all of the stream by; give a share below 1")
        if self.learning_rate is not None:
            check_positive("learning_rate", self.learning_rate)
        if not (is_number(self.ema) and 0 <= self.ema < 1):
            raise ValueError(f"ema must lie in [0, 1): at 1 the importance would never change; got {self.ema!r}")
        if not (is_number(self.outliers) and self.outliers > 1):
            raise ValueError(f"outliers must be a multiple of the median norm above 1; got {self.outliers!r}")
        check_at_least("seed", self.seed, 0)
        if type(self.tie_weights) is not bool:
            raise ValueError(f"tie_weights must be True or False; got {self.tie_weights!r}")
        if not (self.stack is None or isinstance(self.stack, str)):
            raise ValueError(f"stack must be the path of a residual stack, such as 'model.layers'; got {self.stack!r}")

    def _check_places(self) -> None:
        if self.layers is not None and self.fractions is not None:
            raise ValueError("say where by layers= or by fractions=, not by both")
        for name in ("layers", "fractions"):
            values = getattr(self, name)
            if values is None:
                continue
            if isinstance(values, str) or not isinstance(values, Sequence) or not values:
                raise ValueError(f"{name} must be a list of at least one; got {values!r}")
            object.__setattr__(self, name, tuple(values))
        if wrong := [layer for layer in self.layers or () if type(layer) is not int or layer < 0]:
            raise ValueError(f"layers must be indices of blocks, counted from 0; got {wrong[0]!r}")
        if outside := [share for share in self.fractions or () if not (is_number(share) and 0 < share <= 1)]:
            raise ValueError(f"fractions must lie in (0, 1], 1 being the last block; got {outside[0]!r}")
        for name, values in (("layers", self.layers or ()), ("fractions", self.fractions or ())):
            if len(set(values)) < len(values):
                raise ValueError(f"{name} names a place twice: {list(values)}")

    def _check_schedule(self) -> None:
        for name in ("retention_init", "retention_final"):
            share = getattr(self, name)
            if not (is_number(share) and 0 < share <= 1):
                raise ValueError(f"{name} must lie in (0, 1], a share of the stream's width; got {share!r}")
        if self.retention_final > self.retention_init and self.variant in SCHEDULED:
            raise ValueError(
                f"retention must not increase: retention_init={self.retention_init}, "
                f"retention_final={self.retention_final}; raise the one or lower the other"
            )
        for name in ("warmup_steps", "decay_steps"):
            check_at_least(name, getattr(self, name), 0)

    @property
    def passing(self) -> float:
        """s, the share of the stream that passes by."""
        return self.skip if self.skip is not None else 0.1 if self.variant in SCHEDULED else 0.0

    @property
    def tracked(self) -> str:
        """By what importance is measured."""
        return self.importance or ("sign" if self.variant == "paper" else "energy")

    @property
    def rate(self) -> float:
        """The learning rate."""
        return self.learning_rate or (3e-4 if self.variant == "default" else 1e-3)

    def features(self, hidden: int, retention: float | None = None) -> int:
        """How many features a stream of width `hidden` keeps; at the end when no retention is given."""
        share = self.retention_final if retention is None else retention
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
        share = self.retention_init - (self.retention_init - self.retention_final) * gone
        return min(self.retention_init, max(self.retention_final, share))
