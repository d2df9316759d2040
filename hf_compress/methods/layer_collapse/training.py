"""LayerCollapse while a model is trained: activations are blended away, then their FFNs collapse."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from hf_compress.anatomy.anatomy import Anatomy, Block
from hf_compress.anatomy.stacks import Stack
from hf_compress.calibration.capture import inference
from hf_compress.calibration.processes import here, sharing, summed
from hf_compress.errors import NotLinearError
from hf_compress.methods.base.context import CalibrationContext
from hf_compress.methods.base.schedule import TrainingSchedule
from hf_compress.methods.layer_collapse.blend import blended, ffn_of, fitting_blend, gated_module, mean_gates
from hf_compress.methods.layer_collapse.closed_form import collapsible, count_of, plan_closed_form, projections
from hf_compress.methods.layer_collapse.config import LayerCollapseConfig
from hf_compress.methods.layer_collapse.linear import fit_ffns
from hf_compress.methods.layer_collapse.product import plan_by_product, product
from hf_compress.modules.activation import Blend, BlendedActivation
from hf_compress.plan.plan import Plan
from hf_compress.rewrite.apply import carry_out
from hf_compress.rewrite.builders import replace_activation

logger = logging.getLogger(__name__)


class ClosedForm(TrainingSchedule):
    """FFNs collapse before the first step, and training heals."""

    config: LayerCollapseConfig

    def __init__(self, config: LayerCollapseConfig) -> None:
        super().__init__(config)
        self.r2: dict[int, float] = {}

    def prepare(self, context: CalibrationContext) -> Plan:
        plan = plan_closed_form(self.config, context)
        self.r2 = {step["block"]: step["r2"][str(step["block"])] for step in plan.notes["collapsed"]}
        return plan

    def logs(self) -> dict[str, float]:
        return {f"r2_{index}": r2 for index, r2 in self.r2.items()}


class Blending(TrainingSchedule):
    """Every chosen FFN gets a share α of something linear, which is learned or scheduled.

    A learned α has an optimizer of its own here, not a group of the Trainer's. Under the weights' learning rate it
    would stand still (0.2 after a run in which it should have come to 1); the Trainer makes its groups before a
    callback can ask for another, and a resumed run would not fit them; and α's gradient, mostly the penalty's, has no
    business in the clipping of the weights'. So the gradients of α are taken out of the model as they come; those of a
    scheduled α too, which the Trainer's optimizer would move.
    """

    config: LayerCollapseConfig

    def __init__(self, config: LayerCollapseConfig) -> None:
        super().__init__(config)
        self.learned = config.alpha == "learned" or (config.alpha is None and config.variant == "paper")
        self.ramp = config.ramp if config.ramp is not None else (0.0 if self.learned else 0.5)
        self.modules: dict[int, BlendedActivation] = {}
        self.alpha = torch.zeros(0, dtype=torch.float32)  # in float32 and on the CPU, whatever the model is in
        self.gradient = torch.zeros(0, dtype=torch.float32)
        self.last_penalty = torch.zeros((), dtype=torch.float32)
        self.hooks: list[RemovableHandle] = []
        self.r2: dict[int, float] = {}

    def prepare(self, context: CalibrationContext) -> Plan:
        """Blended activations for the FFNs to collapse; a learned α of an earlier run goes on from where it is."""
        config, model = self.config, context.model
        stack = context.stack(config.stack)
        blocks = _chosen(config, context)
        _check_trained(model, stack, blocks)
        there = blended(model, stack)
        blends = {index: _blend(config, Block(model, stack, index)) for index in blocks}
        gated = [index for index in blocks if blends[index] == "constant" and index not in there]
        constants = {}
        if gated:
            with context.step("mean gates"):
                constants = mean_gates(model, stack, context.calibration, gated)
        start = config.alpha_init if self.learned else 0.0
        for module in there.values():  # new parameters: a run that was interrupted has left hooks on the old ones
            module.alpha = nn.Parameter(module.alpha.detach())
        plan = Plan()
        for index in blocks:
            if index not in there:
                constant = constants[index].float() if index in constants else None
                plan += replace_activation(Block(model, stack, index), blends[index], start, constant)
        return plan

    def begin(self, model: PreTrainedModel, progress: float) -> None:
        self._remove_hooks()
        self.modules = blended(model, Anatomy(model).stack(self.config.stack))
        if not self.learned:
            self._schedule(progress)
        alphas = [module.alpha for module in self.modules.values()]
        self.alpha = torch.cat([alpha.detach().float().cpu() for alpha in alphas]).requires_grad_()
        self.gradient = torch.zeros(len(alphas), dtype=torch.float32, device=model.device)
        self.optimizer = torch.optim.Adam([self.alpha], lr=self.config.alpha_lr)
        for place, alpha in enumerate(alphas):
            alpha.requires_grad_()

            def take(parameter: Tensor, place: int = place) -> None:
                assert parameter.grad is not None
                self.gradient[place] += parameter.grad.squeeze()
                parameter.grad = None

            self.hooks.append(alpha.register_post_accumulate_grad_hook(take))

    def penalty(self, progress: float) -> Tensor | None:
        """lc · Σ(1 − α)² (arXiv 2311.17943, equation 4)."""
        if not self.learned:
            return None
        away = torch.stack([(1 - module.alpha.float()).square().sum() for module in self.modules.values()]).sum()
        term = self.config.lc * self._risen(progress) * away
        self.last_penalty = term.detach()
        return term

    def step(self, progress: float, loss_scale: float) -> None:
        if not self.learned:
            self._schedule(progress)
            return
        gradient = self.gradient / loss_scale
        self.gradient = torch.zeros_like(self.gradient)
        with sharing():  # as DDP does with those that are left in the model
            summed([gradient])
            gradient /= here()[1]
        if torch.isfinite(gradient).all():  # in float16 a step may overflow; the Trainer leaves it out too
            self.alpha.grad = gradient.cpu()
            self.optimizer.step()
        self._write(self.alpha)

    def finish(self, context: CalibrationContext) -> Plan:
        """The products of projections where α is 1 within the tolerance; in closed form, unless paper, the others."""
        config = self.config
        self._remove_hooks()
        if config.variant == "paper":
            try:
                return plan_by_product(config, context)
            except NotLinearError as error:  # the run is not lost for that: the model stays as it was trained
                logger.warning("%s", error)
                return Plan(notes={"not_collapsed": str(error)})
        model, stack = context.model, context.stack(config.stack)
        plan, steps = Plan(), list[dict[str, Any]]()
        with inference(model), context.trial() as undo:
            for index, module in sorted(blended(model, stack).items(), reverse=True):
                if abs(1 - module.alpha.item()) < config.tolerance:
                    draft = product(Block(model, stack, index), config.rank)
                    steps.append({"block": index, "alpha": module.alpha.item()})
                else:
                    fit = fit_ffns(model, stack, context.calibration, [index], config.penalty, config.rank)[index]
                    draft = fit.draft(Block(model, stack, index))
                    self.r2[index] = fit.r2
                    steps.append({"block": index, "alpha": module.alpha.item(), "r2": fit.r2})
                carry_out(draft, model, undo)
                plan += draft
        return Plan(plan.edits, plan.tensors, {"criterion": config.criterion, "collapsed": steps})

    def logs(self) -> dict[str, float]:
        figures = {f"alpha_{index}": module.alpha.item() for index, module in self.modules.items()}
        if self.learned:
            figures["penalty"] = self.last_penalty.item()
        return figures | {f"r2_{index}": r2 for index, r2 in self.r2.items()}

    def state(self) -> dict[str, Tensor]:
        if not self.learned:
            return {}
        moments = self.optimizer.state[self.alpha]
        return {"alpha": self.alpha.detach().clone(), **{name: value.clone() for name, value in moments.items()}}

    def restore(self, state: dict[str, Tensor]) -> None:
        if not self.learned:
            return
        with torch.no_grad():
            self.alpha.copy_(state["alpha"])
        if moments := {name: value.clone() for name, value in state.items() if name != "alpha"}:
            self.optimizer.state[self.alpha] = moments
        self._write(self.alpha)

    def _remove_hooks(self) -> None:
        while self.hooks:
            self.hooks.pop().remove()

    def _risen(self, progress: float) -> float:
        return min(1.0, progress / self.ramp) if self.ramp else 1.0

    def _schedule(self, progress: float) -> None:
        self._write(torch.full((len(self.modules),), self._risen(progress), dtype=torch.float32))

    @torch.no_grad()
    def _write(self, alphas: Tensor) -> None:
        for module, alpha in zip(self.modules.values(), alphas, strict=True):
            module.alpha.fill_(alpha.item())
            module.alpha.grad = None  # DDP leaves a zero, which lets the Trainer's optimizer decay α


def _chosen(config: LayerCollapseConfig, context: CalibrationContext) -> list[int]:
    """The paper's: as many as asked for, the last ones, or all. Else those that the closed form would collapse."""
    stack = context.stack(config.stack)
    if config.variant != "paper":
        return sorted(step["block"] for step in plan_closed_form(config, context).notes["collapsed"])
    able = collapsible(context, stack, config.rank)
    return able if config.amount is None else able[-count_of(config, len(able)) :]


def _blend(config: LayerCollapseConfig, block: Block) -> Blend:
    """What the activation of a block's FFN is driven to; ValueError for one that would leave it no linear map."""
    ffn = ffn_of(block)
    assert ffn.activation is not None
    fitting = fitting_blend(ffn, block.module.get_submodule(ffn.activation))
    if fitting == "constant" and config.blend not in (None, "constant"):
        raise ValueError(
            f"blend={config.blend!r} would make the gate of block {block.index} linear, and the FFN a product of two "
            "linear maps, which does not collapse; for gated FFNs leave blend out, or give 'constant'"
        )
    if fitting == "constant":
        gated_module(block)  # now, and not when the training is done
    return config.blend or fitting


def _check_trained(model: PreTrainedModel, stack: Stack, blocks: list[int]) -> None:
    """Raise where an FFN cannot learn to do without its activation."""
    for index in blocks:
        for path in projections(ffn_of(Block(model, stack, index))):
            weight = stack.blocks[index].get_submodule(path).weight
            if isinstance(weight, Tensor) and not weight.requires_grad:
                raise ValueError(
                    f"{stack.path}.{index}.{path} is frozen (requires_grad=False), so its FFN cannot learn to do "
                    "without an activation: unfreeze it, or collapse in closed form before training"
                )
