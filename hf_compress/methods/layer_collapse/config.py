"""Settings of LayerCollapse, in closed form and in training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hf_compress.checks import setting
from hf_compress.methods.base.amounts import AMOUNT
from hf_compress.methods.base.settings import CompressionConfig
from hf_compress.modules.activation import Blend


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

    ratio: float | None = setting(None, "share of the FFNs to collapse", "(0, 1)", group=AMOUNT)
    num_layers: int | None = setting(None, "number of FFNs to collapse, instead of ratio", "[1, inf)", group=AMOUNT)
    target_r2: float | None = setting(
        None, "collapse FFNs as long as R² of the next is at least this, instead of ratio", "(-inf, 1)", group=AMOUNT
    )
    variant: Literal["closed_form", "paper"] = setting("closed_form", "paper: by training alone")
    criterion: Literal["stream", "loss", "linearity"] = setting("stream", "which FFN is next")
    rank: int | None = setting(None, "of the linear maps; full when not given", "[1, inf)")
    penalty: float = setting(1e-3, "of the ridge, relative to the mean variance of the inputs", "[0, inf]")
    choice_samples: int = setting(32, "criterion=loss: samples that candidates are tried on", "[1, inf)")
    gradual: bool = setting(False, "in training: blend the activations away instead of collapsing at once")
    blend: Blend | None = setting(
        None,
        "in training: what activations are driven to; by the kind of FFN when not given: PReLU (leaky) for ReLU, "
        "identity for smooth ones, constant for gates",
    )
    alpha: Literal["learned", "scheduled"] | None = setting(
        None, "in training: learned (as in the paper) or scheduled (as when gradual)"
    )
    alpha_init: float = setting(0.01, "a learned α before training", "[0, 1]")
    alpha_lr: float = setting(0.02, "learning rate of α under its own Adam", "(0, inf]")
    lc: float = setting(10.0, "weight of the penalty on a learned α", "[0, inf]")
    ramp: float | None = setting(
        None, "share of the steps over which lc (default 0) or a scheduled α (0.5) rises to its full size", "[0, 1]"
    )
    tolerance: float = setting(0.05, "after training: an FFN is linear where |1 − α| is less", "(0, inf]")
    stack: str | None = setting(None, "path of the residual stack; found when not given")

    def __post_init__(self) -> None:
        if self.variant == "paper" and self.target_r2 is not None:
            raise ValueError("target_r2 is for variant='closed_form'; the paper's variant collapses by its tolerance")
        if self.amount is None and self.variant != "paper":
            raise ValueError("say how much to collapse by ratio=, num_layers= or target_r2=; got none")
        if self.ramp == 0 and (self.alpha == "scheduled" or (self.gradual and self.alpha is None)):
            raise ValueError("a scheduled α needs steps to rise in: give a ramp above 0")
        if self.variant == "paper" and self.gradual:
            raise ValueError("gradual=True is for variant='closed_form'; the paper's variant is gradual in any case")
