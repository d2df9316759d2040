"""Settings of LayerCollapse, in closed form and in training."""

from __future__ import annotations

from dataclasses import dataclass, field

from hf_compress.methods.base.amounts import check_amount
from hf_compress.methods.base.checks import (
    check_at_least,
    check_choice,
    check_not_negative,
    check_positive,
    check_share,
    is_number,
)
from hf_compress.methods.base.settings import CompressionConfig
from hf_compress.modules.activation import BLENDS, Blend

VARIANTS = ("closed_form", "paper")
CRITERIA = ("stream", "loss", "linearity")


@dataclass(frozen=True)
class LayerCollapseConfig(CompressionConfig, method="layer_collapse", paper="https://arxiv.org/abs/2311.17943"):
    """Put one linear map in the place of FFNs.

    variant="closed_form", the default: solved by ridge regression from what an FFN reads to what it writes. One FFN
    after another, each solved on the activations of the model with the earlier ones collapsed, so that it sees their
    errors. Which is next: "stream", whose unexplained output is least beside the residual stream that it is added to;
    "loss", whose collapse costs the model least on calibration samples; "linearity", whose R² is highest. Given to a
    `CompressionCallback`, it collapses before the first step and training heals; with `gradual=True` the activations
    of the chosen FFNs are blended away over the first part of the training, and the FFNs collapse at the end.

    variant="paper": activations become PReLU with a learned slope α, the loss gets lc · Σ(1 − α)², and at the end every
    FFN with |1 − α| below the tolerance becomes the product of its two projections. It needs training, by
    `CompressionCallback`. Without an amount all FFNs take part, with one the last ones.
    """

    ratio: float | None = field(default=None, metadata={"help": "share of the FFNs to collapse, in (0, 1)"})
    num_layers: int | None = field(default=None, metadata={"help": "number of FFNs to collapse, instead of ratio"})
    target_r2: float | None = field(
        default=None, metadata={"help": "collapse FFNs as long as R² of the next is at least this, instead of ratio"}
    )
    variant: str = field(default="closed_form", metadata={"help": f"one of {', '.join(VARIANTS)}"})
    criterion: str = field(default="stream", metadata={"help": f"one of {', '.join(CRITERIA)}"})
    rank: int | None = field(default=None, metadata={"help": "of the linear maps; full when not given"})
    penalty: float = field(default=1e-3, metadata={"help": "of the ridge, relative to the mean variance of the inputs"})
    choice_samples: int = field(default=32, metadata={"help": "criterion=loss: samples that candidates are tried on"})
    gradual: bool = field(
        default=False, metadata={"help": "in training: blend the activations away instead of collapsing at once"}
    )
    blend: Blend | None = field(
        default=None,
        metadata={
            "help": f"in training: what activations are driven to, one of {', '.join(BLENDS)}; by the kind of FFN when "
            "not given: PReLU for ReLU, identity for smooth ones, constant for gates"
        },
    )
    alpha: str | None = field(
        default=None, metadata={"help": "in training: learned (as in the paper) or scheduled (as when gradual)"}
    )
    alpha_init: float = field(default=0.01, metadata={"help": "a learned α before training"})
    alpha_lr: float = field(default=0.02, metadata={"help": "learning rate of α under its own Adam"})
    lc: float = field(default=10.0, metadata={"help": "weight of the penalty on a learned α"})
    ramp: float | None = field(
        default=None,
        metadata={"help": "share of the steps over which lc (default 0) or a scheduled α (0.5) rises to its full size"},
    )
    tolerance: float = field(default=0.05, metadata={"help": "after training: an FFN is linear where |1 − α| is less"})
    stack: str | None = field(default=None, metadata={"help": "path of the residual stack; found when not given"})

    def __post_init__(self) -> None:
        check_choice("variant", self.variant, VARIANTS)
        check_choice("criterion", self.criterion, CRITERIA)
        self._check_amount()
        check_at_least("rank", self.rank, 1)
        check_at_least("choice_samples", self.choice_samples, 1)
        check_not_negative("penalty", self.penalty)
        check_not_negative("lc", self.lc)
        check_positive("alpha_lr", self.alpha_lr)
        check_positive("tolerance", self.tolerance)
        check_share("alpha_init", self.alpha_init)
        check_share("ramp", 0.5 if self.ramp is None else self.ramp)
        if self.blend is not None:
            check_choice("blend", self.blend, BLENDS)
        if self.alpha is not None:
            check_choice("alpha", self.alpha, ("learned", "scheduled"))
        if self.ramp == 0 and (self.alpha == "scheduled" or (self.gradual and self.alpha is None)):
            raise ValueError("a scheduled α needs steps to rise in: give a ramp above 0")
        if self.variant == "paper" and self.gradual:
            raise ValueError("gradual=True is for variant='closed_form'; the paper's variant is gradual in any case")

    def _check_amount(self) -> None:
        check_amount(self.ratio, self.num_layers, "num_layers")
        given = [name for name in ("ratio", "num_layers", "target_r2") if getattr(self, name) is not None]
        if self.variant == "paper" and self.target_r2 is not None:
            raise ValueError("target_r2 is for variant='closed_form'; the paper's variant collapses by its tolerance")
        if len(given) != 1 and not (self.variant == "paper" and not given):
            raise ValueError(f"say how much to collapse by ratio=, num_layers= or target_r2=; got {given or 'none'}")
        if self.target_r2 is not None and not (is_number(self.target_r2) and self.target_r2 < 1):
            raise ValueError(f"target_r2 must be a number below 1, R² of a linear FFN; got {self.target_r2!r}")
