"""Settings of LayerCollapse in closed form."""

from __future__ import annotations

from dataclasses import dataclass, field

from hf_compress.config import CompressionConfig, check_at_least, check_choice, is_number
from hf_compress.methods.layer_collapse.closed_form import CRITERIA, plan_closed_form
from hf_compress.methods.sizing import check_amount
from hf_compress.plan import Plan
from hf_compress.workbench import Workbench


@dataclass(frozen=True)
class LayerCollapseConfig(CompressionConfig, method="layer_collapse", paper="https://arxiv.org/abs/2311.17943"):
    """Put one linear map in the place of FFNs, solved by ridge regression from what each reads to what it writes.

    One FFN after another, each solved on the activations of the model with the earlier ones collapsed, so that it sees
    their errors. Which is next: "stream", whose unexplained output is least beside the residual stream that it is added
    to; "loss", whose collapse costs the model least on calibration samples; "linearity", whose R² is highest.
    """

    ratio: float | None = field(default=None, metadata={"help": "share of the FFNs to collapse, in (0, 1)"})
    num_layers: int | None = field(default=None, metadata={"help": "number of FFNs to collapse, instead of ratio"})
    target_r2: float | None = field(
        default=None, metadata={"help": "collapse FFNs as long as R² of the next is at least this, instead of ratio"}
    )
    criterion: str = field(default="stream", metadata={"help": f"one of {', '.join(CRITERIA)}"})
    rank: int | None = field(default=None, metadata={"help": "of the linear maps; full when not given"})
    penalty: float = field(default=1e-3, metadata={"help": "of the ridge, relative to the mean variance of the inputs"})
    choice_samples: int = field(default=32, metadata={"help": "criterion=loss: samples that candidates are tried on"})
    stack: str | None = field(default=None, metadata={"help": "path of the residual stack; found when not given"})

    def __post_init__(self) -> None:
        check_choice("criterion", self.criterion, CRITERIA)
        check_amount(self.ratio, self.num_layers, "num_layers")
        given = [name for name in ("ratio", "num_layers", "target_r2") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"say how much to collapse by ratio=, num_layers= or target_r2=; got {given or 'none'}")
        if self.target_r2 is not None and not (is_number(self.target_r2) and self.target_r2 < 1):
            raise ValueError(f"target_r2 must be a number below 1, R² of a linear FFN; got {self.target_r2!r}")
        check_at_least("rank", self.rank, 1)
        check_at_least("penalty", self.penalty, 0.0)
        check_at_least("choice_samples", self.choice_samples, 1)

    def plan(self, bench: Workbench) -> Plan:
        return plan_closed_form(self, bench)
