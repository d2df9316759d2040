"""Bottlenecks that are trained while the model is: in it, or beside it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from hf_compress.anatomy.anatomy import Anatomy, Block
from hf_compress.anatomy.stacks import Stack
from hf_compress.calibration.capture import inference, stream_of_output, stream_tokens
from hf_compress.calibration.data import Batch
from hf_compress.calibration.decoder import has_decoder, read_before
from hf_compress.calibration.processes import here, sharing, summed
from hf_compress.calibration.vocabulary import special_ids
from hf_compress.methods.adaptive_compress.config import AdaptiveCompressConfig
from hf_compress.methods.adaptive_compress.fit import LEARNERS, layers_of, ordinary, stream_moments
from hf_compress.methods.adaptive_compress.learner_run import LearnerRun
from hf_compress.methods.base.context import CalibrationContext
from hf_compress.methods.base.schedule import TrainingSchedule
from hf_compress.modules.bottleneck import BOTTLENECK, Bottleneck
from hf_compress.plan.plan import Plan
from hf_compress.rewrite.bottlenecks import Bottlenecks, FittedBottleneck
from hf_compress.rewrite.builders import insert_bottleneck


class Joint(TrainingSchedule):
    """Every micro-batch, each bottleneck learns to rebuild the stream that it is given.

    mode="splice": it stands in the model from the start, gated, and learns from the model's loss too; when training
    ends, features without a gate are cut off. Its loss reaches its own weights alone: the model is not drawn to
    streams that are easily rebuilt. mode="observe": it stands beside the model, with an Adam of its own, and the model
    learns as it would without; `found` has the bottlenecks at the end.

    Attributes:
        found: of mode="observe", once training has ended.
    """

    config: AdaptiveCompressConfig

    def __init__(self, config: AdaptiveCompressConfig) -> None:
        super().__init__(config)
        self.found: Bottlenecks | None = None
        self.runs: dict[int, LearnerRun] = {}
        self.losses: dict[int, Tensor] = {}  # of this micro-batch
        self.told: dict[int, list[Tensor]] = {}  # error, active features and energy, of each micro-batch of a step
        self.hooks: list[RemovableHandle] = []
        self.stack_path = ""
        self.tokens = self.now = 0
        self._real: Batch | None = None

    @property
    def splices(self) -> bool:
        """Whether the bottlenecks stand in the model."""
        return self.config.mode == "splice"

    def prepare(self, context: CalibrationContext) -> Plan:
        """Bottlenecks that start from the calibration data; in the model where they are to be spliced."""
        config, model = self.config, context.model
        if config.tie_weights and self.splices:
            raise ValueError("tied weights cannot be trained inside a model: leave tie_weights out, or observe")
        stack = context.stack(config.stack)
        layers = layers_of(config, stack)
        with inference(model), context.step("principal directions"):
            moments = stream_moments(model, stack, layers, context.calibration, config)
        self.stack_path = stack.path
        plan = Plan()
        for layer in layers:
            run = LearnerRun(LEARNERS[config.variant](config, moments[layer], config.seed + layer))
            run.learner.retain(config.retention_init)
            self.runs[layer] = run
            if self.splices:
                plan += insert_bottleneck(Block(model, stack, layer), run.learner.module)
        return plan

    def begin(self, model: PreTrainedModel, progress: float) -> None:
        if model.is_gradient_checkpointing:
            raise ValueError("bottlenecks learn from streams that gradient checkpointing throws away: switch it off")
        self._remove_hooks()
        self.now = round(progress * self.steps)
        special = special_ids(model.config, None)
        stack = Anatomy(model).stack(self.stack_path)
        self.hooks.append(model.register_forward_pre_hook(_keeper(self, special), with_kwargs=True))
        for layer, run in self.runs.items():
            watch = _watcher(self, layer, stack)
            block = stack.blocks[layer]
            if self.splices:
                run.learner.module = _bottleneck_of(block)
                if run.learner.module.form.select == "above":
                    run.learner.module.threshold.requires_grad_(False)
                self.hooks.append(run.learner.module.register_forward_pre_hook(watch))
            else:
                run.learner.module.to(model.device)
                self.hooks.append(block.register_forward_hook(watch))

    def learn(self, layer: int, stack: Stack, stream: Tensor) -> None:
        """Take in a stream (samples, positions, hidden) that one of the bottlenecks is given."""
        run = self.runs[layer]
        if self._real is None or not run.learner.trains:
            return
        rows = stream.detach()[stream_tokens(stack, self._real, stream)]
        with torch.autocast(stream.device.type, enabled=False):
            rows = ordinary(rows.to(run.learner.module.encoder.dtype), self.config.outliers)
            self.tokens += len(rows)
            if not self.splices:
                with sharing():
                    run.learn(rows, self.now * self.config.updates, self.steps * self.config.updates)
            elif len(rows):
                terms = run.learner.terms(rows)
                self.losses[layer] = terms.loss
                self.told.setdefault(layer, []).append(terms.told.float())

    def penalty(self, progress: float) -> Tensor | None:
        """The losses of the bottlenecks that stand in the model."""
        losses, self.losses = self.losses, {}
        return torch.stack(list(losses.values())).sum() if losses else None

    def step(self, progress: float, loss_scale: float) -> None:
        self.now = round(progress * self.steps)
        if not self.splices:
            return
        for layer, parts in self.told.items():
            run, told = self.runs[layer], torch.stack(parts).mean(0)
            with sharing():
                summed([told])
                told /= here()[1]
            run.learner.constrain_gradients()
            run.learner.after_step(told[2:])
            retention = self.config.retention(self.now, self.steps)
            run.learner.retain(retention)
            run.note(self.now, retention, told)
        self.told = {}

    def finish(self, context: CalibrationContext) -> Plan | None:
        """The features that are left; nothing is solved for, which would undo what the model's loss has taught."""
        self._remove_hooks()
        places = {}
        for layer, run in self.runs.items():
            if self.splices and run.learner.module.form.gated:
                run.learner.retain(self.config.kept)
                module, kept = run.learner.cut()
            else:
                module, kept = run.finished()
            places[layer] = FittedBottleneck(module, run.learner.importance, kept, run.curve, run.stopped)
        found = Bottlenecks(self.stack_path, places, self.config.to_dict(), self.tokens // max(1, len(places)))
        if not self.splices:
            self.found = found
            return None
        plan = found.plan(context.model)
        changed = any(run.learner.module.form.gated for run in self.runs.values())
        return plan if changed else Plan(notes=plan.notes)

    def logs(self) -> dict[str, float]:
        return {
            f"{name}_{layer}": run.curve[name][-1]
            for layer, run in self.runs.items()
            for name in ("error", "active", "retention")
            if run.curve[name]
        }

    def state(self) -> dict[str, Tensor]:
        """Importance, and what stands beside the model; what stands in it is in the checkpoint."""
        found: dict[str, Tensor] = {}
        for layer, run in self.runs.items():
            own = run.learner.module.state_dict().keys() if self.splices else ()
            state = run.learner.state() if self.splices else run.state()
            found |= {f"{layer}.{name}": tensor.cpu() for name, tensor in state.items() if name not in own}
        return found

    def restore(self, state: dict[str, Tensor]) -> None:
        for layer, run in self.runs.items():
            own = {n.partition(".")[2]: t for n, t in state.items() if n.partition(".")[0] == str(layer)}
            if self.splices:
                run.learner.restore(own | run.learner.module.state_dict())
            else:
                run.restore(own)

    def _remove_hooks(self) -> None:
        while self.hooks:
            self.hooks.pop().remove()


def _keeper(joint: Joint, special: Tensor) -> Any:
    """A hook on the model that notes which of its tokens are real."""

    def keep(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs = {name: value for name, value in kwargs.items() if isinstance(value, Tensor)}
        ids, mask = inputs.get("input_ids"), inputs.get("attention_mask")
        real = mask.bool() if mask is not None and mask.ndim == 2 else None
        if ids is not None and ids.ndim == 2:
            ordinary_ids = ~torch.isin(ids, special.to(ids.device))
            real = ordinary_ids if real is None else real & ordinary_ids
        joint._real = Batch(inputs, real, decoded=_decoded(model, inputs, special)) if model.training else None

    return keep


def _decoded(model: Any, inputs: dict[str, Tensor], special: Tensor) -> Tensor | None:
    """Which of the tokens that a decoder reads are real, where it does not read the text itself."""
    ids, labels = inputs.get("decoder_input_ids"), inputs.get("labels")
    if ids is None and labels is not None and labels.ndim == 2 and has_decoder(model):
        ids = read_before(model, labels)
    return None if ids is None else ~torch.isin(ids, special.to(ids.device))


def _watcher(joint: Joint, layer: int, stack: Stack) -> Any:
    """A hook by which a bottleneck's input, or a block's output, is learnt from."""

    def watch(module: nn.Module, args: tuple[Any, ...], output: Any = None) -> None:
        if module.training:
            joint.learn(layer, stack, args[0] if output is None else stream_of_output(output))

    return watch


def _bottleneck_of(block: nn.Module) -> Bottleneck:
    module = block._modules[BOTTLENECK]
    assert isinstance(module, Bottleneck)
    return module
