"""CompressionCallback: any method, while a `transformers.Trainer` trains."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle
from transformers import (
    PreTrainedModel,
    Trainer,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from hf_compress.anatomy.compressible import check_model
from hf_compress.calibration.data import Calibration, DataOptions, prepare
from hf_compress.calibration.media import Processor
from hf_compress.calibration.processes import from_one, sharing, take_values_of_first
from hf_compress.checks import check
from hf_compress.methods.base.context import CalibrationContext
from hf_compress.methods.base.registry import plan_for, schedule_for, steps_for
from hf_compress.methods.base.schedule import TrainingSchedule
from hf_compress.methods.base.settings import CompressionConfig
from hf_compress.numerics.defaults import torch_defaults
from hf_compress.plan.plan import Plan
from hf_compress.report.edits import log_decisions
from hf_compress.report.history import add_stage, history_of, model_size, stage_of
from hf_compress.rewrite.apply import apply
from hf_compress.rewrite.edits import edit_from_dict
from hf_compress.rewrite.probe import Probe
from hf_compress.training.checkpoint import TrainingState, read_state, take_structure, write_state
from hf_compress.training.distillation import Distillation, check_teacher
from hf_compress.training.objective import Objective, ObjectiveCallback
from hf_compress.training.optimizer import check_trainable, following
from hf_compress.training.trainer import calling_trainer, resumed_checkpoint

_BATCHES = 64  # of the training data, where no calibration data is given


class CompressionCallback(ObjectiveCallback):
    """Compresses the model of a Trainer: `Trainer(model, args, callbacks=[CompressionCallback(config)])`.

    What happens when depends on the method; see docs/training.md. In general: when the Trainer is made, the model gets
    the structure that it is trained with; while it is trained, a penalty may be added to its loss and gates move; when
    training ends, it gets its last structure, is checked as by `compress`, and carries its `compression_report`.
    `Trainer.save_model` then writes a model that loads with `from_pretrained`. One callback serves one run.

    Args:
        config: a method's settings.
        calibration: as for `compress`. What is decided at the end can do without: the first 64 batches of the training
            data then serve.
        tokenizer: as for `compress`; the Trainer's `processing_class` when not given.
        options: how calibration data is read.
        every: make one change of structure (such as one merge) every so many optimizer steps, instead of all at the
            start; in one process only.
        teacher: an uncompressed model, for the loss (1 − teacher_share) · loss + teacher_share · KL(teacher ‖ model).
        teacher_share: in (0, 1).

    Raises:
        TypeError, ValueError: bad settings. What does not fit the model or the data is raised when the Trainer is made,
            what does not fit the Trainer when training begins: label smoothing, a loss function of its own, FSDP,
            DeepSpeed, several GPUs in one process; a teacher of another vocabulary; a second run. The model is as it
            was then.
    """

    def __init__(
        self,
        config: CompressionConfig,
        calibration: Any = None,
        tokenizer: Processor | None = None,
        options: DataOptions | None = None,
        *,
        every: int | None = None,
        teacher: PreTrainedModel | None = None,
        teacher_share: float = 0.5,
    ) -> None:
        if not isinstance(config, CompressionConfig):
            raise TypeError(f"config must be a method's settings, such as MKAConfig(ratio=0.25); got {config!r}")
        check("every", every, int | None, "[1, inf)")
        check("teacher_share", teacher_share, float, "(0, 1)")
        self.config, self.schedule = config, schedule_for(config)
        self.calibration, self.tokenizer, self.options = calibration, tokenizer, options
        self.every, self.teacher, self.teacher_share = every, teacher, teacher_share
        self._refusal: str | None = None
        self._model: PreTrainedModel | None = None  # once prepared
        self._begun = self._finished = False
        self._seconds: dict[str, float] = {}
        self._data: Calibration | None = None
        self._steps: list[CompressionConfig] = []  # changes of structure in mid-run, the first `_done` of them made
        self._done = 0
        self._changes = Plan()  # of all of them, without tensors
        self._distillation: Distillation | None = None
        self._loading: RemovableHandle | None = None
        self._structure_of: str | None = None  # the checkpoint that is being read

    @property
    def _adds_to_loss(self) -> bool:
        return self.teacher is not None or type(self.schedule).penalty is not TrainingSchedule.penalty

    # When the Trainer is made: there is no optimizer yet, no DDP around the model, and no checkpoint has been read.

    @torch_defaults()
    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._model is not None or self._finished:
            self._refusal = "this callback has served a Trainer already: make a new one for every run"
            return
        trainer, model = calling_trainer(), kwargs["model"]
        self._refusal = _refusal(args, trainer, self._adds_to_loss, self.every)
        if self._refusal is not None:
            return
        check_model(model)
        if type(self.schedule).penalty is TrainingSchedule.penalty:  # with one there is something to train in any case
            check_trainable(model)
        if self.teacher is not None:
            check_teacher(model, self.teacher)
        if self.calibration is not None:
            tokenizer = self.tokenizer or kwargs.get("processing_class")
            self._data = prepare(self.calibration, model, tokenizer, self.options)
        context = CalibrationContext(model, self._data, self._seconds)
        self._history, self._before = history_of(model), model_size(model)
        if self.every is None:
            with following(model, trainer.optimizer):  # one that was given to the Trainer
                self._change(context, self.schedule.prepare)
        else:
            self._steps = steps_for(self.config, context)
        self._model = model
        self._loading = model.register_load_state_dict_pre_hook(self._checkpoint_is_read)

    def _checkpoint_is_read(self, model: PreTrainedModel, *_: Any) -> None:
        """Before a resumed run makes its optimizer, the model gets the blocks that the checkpoint has."""
        folder = resumed_checkpoint()
        if self.every is not None and folder is not None and folder != self._structure_of:
            with following(model, calling_trainer().optimizer):
                take_structure(model, folder)
            self._structure_of = folder  # sharded weights are read one shard after another

    # When training begins.

    @torch_defaults()
    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        trainer = calling_trainer()
        model = self._checked(kwargs["model"], kwargs["optimizer"], state)
        self._structure_of = None
        self.schedule.steps = max(1, state.max_steps)
        self.schedule.begin(model, state.global_step / self.schedule.steps)
        if state.global_step:
            self._resume(read_state(resumed_checkpoint() or "", state.global_step))
        if self.teacher is not None:
            self._distillation = Distillation(model, self.teacher, autocast=trainer.accelerator.autocast)
        self.disarm()  # after a run that was interrupted
        if self._adds_to_loss:
            self.objective = Objective(model, self._terms)
        # Reporters send off what they are given, so the figures of a compression have to be there before their turn.
        others = [callback for callback in trainer.callback_handler.callbacks if callback is not self]
        trainer.callback_handler.callbacks = [self, *others]

    def _checked(self, model: PreTrainedModel, optimizer: Any, state: TrainerState) -> PreTrainedModel:
        """The model that was prepared; ValueError where it is not the one that is about to be trained, or cannot be."""
        if self._finished:
            self._refusal = "this callback has served a run already: make a new one, and a new Trainer, for the next"
        if self._refusal is not None:
            raise ValueError(self._refusal)
        if self._model is None or model is not self._model:
            raise ValueError(
                "the model was not prepared for compression when the Trainer was made: give the callback to "
                "Trainer(callbacks=[...]), not to add_callback, and a model, not a model_init"
            )
        if self.every is not None and len(self._steps) * self.every > state.max_steps:
            raise ValueError(
                f"{len(self._steps)} changes, one every {self.every} steps, do not fit into {state.max_steps} steps: "
                "lower every=, or train longer"
            )
        own = {id(parameter) for parameter in model.parameters()}
        if gone := sum(id(p) not in own for group in optimizer.param_groups for p in group["params"]):
            raise ValueError(
                f"the Trainer's optimizer has {gone} parameters that are none of the model's: make it from this model, "
                "for a new Trainer, or leave it to the Trainer"
            )
        return model

    def _resume(self, saved: TrainingState) -> None:
        self.schedule.restore(saved.tensors)
        self._done = saved.done
        if self.every is not None:
            self._changes = Plan(tuple(map(edit_from_dict, saved.edits)))

    # While it trains.

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._progress = state.global_step / state.max_steps
        super().on_step_begin(args, state, control, **kwargs)

    def _terms(
        self, inputs: dict[str, Any], output: Any, loss: Tensor | None, weight: Tensor
    ) -> tuple[Tensor | None, Tensor | None]:
        penalty = self.schedule.penalty(self._progress)
        term = None if penalty is None else weight * penalty
        if self._distillation is not None:
            divergence, _ = self._distillation.losses(inputs, output, weight)
            loss = None if loss is None else (1 - self.teacher_share) * loss
            taught = self.teacher_share * divergence
            term = taught if term is None else term + taught
        return loss, term

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        super().on_pre_optimizer_step(args, state, control, **kwargs)
        scaler = getattr(kwargs["optimizer"], "scaler", None)
        scale = scaler.get_scale() if scaler is not None else 1.0
        self.schedule.step((state.global_step + 1) / state.max_steps, scale)

    @torch_defaults()
    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.every is None or self._done == len(self._steps) or state.global_step % self.every:
            return
        model = kwargs["model"]
        context = CalibrationContext(model, self._data, self._seconds)
        with following(model, kwargs["optimizer"]):
            self._change(context, partial(plan_for, self._steps[self._done]))
        self._done += 1

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if args.should_save and self._model is not None:
            saved = TrainingState(state.global_step, self._done, self._changes.to_list(), self.schedule.state())
            write_state(Path(args.output_dir or ".") / f"checkpoint-{state.global_step}", saved)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if "loss" in kwargs["logs"]:
            figures = {f"compression/{name}": value for name, value in self.schedule.logs().items()}
            kwargs["logs"].update(figures)
            state.log_history[-1].update(figures)

    # When training ends.

    @torch_defaults()
    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        model = self._model
        if model is None or self._finished:
            return
        self._finished = True
        if self._loading is not None:
            self._loading.remove()
        super().on_train_end(args, state, control, **kwargs)
        if self._data is None and type(self.schedule).finish is not TrainingSchedule.finish:
            batches = list(islice(kwargs["train_dataloader"], _BATCHES))
            own = prepare(batches, model, self.tokenizer or kwargs.get("processing_class"), self.options)
            with sharing():
                self._data = from_one(lambda: own)  # every process has read others
        context = CalibrationContext(model, self._data, self._seconds)
        self._change(context, self.schedule.finish)
        done = self._changes.then(Plan(notes={"trained_steps": state.global_step}))
        stage = stage_of(self.config, done, context, self._before, model_size(model))
        add_stage(model, stage, self._history)
        share = stage.after.parameters / stage.before.parameters
        figures = {**self.schedule.logs(), "parameters": stage.after.parameters, "parameters_share": share}
        calling_trainer().log({f"compression/{name}": value for name, value in figures.items()})

    def _change(self, context: CalibrationContext, make: Callable[[CalibrationContext], Plan | None]) -> None:
        """Have a plan made by all processes, for the first one's model, and carried out."""
        model = context.model
        with torch.random.fork_rng(), sharing():
            take_values_of_first(model)
            with context.naming_failures():
                made = make(context)
            plan: Plan | None = from_one(lambda: made)
            if plan is None:
                return
            self._changes = self._changes.then(replace(plan, tensors={}))
            if plan.edits:
                log_decisions(self.config.method, plan)
                apply(plan, model, Probe.of(model, self._data.batches[0] if self._data else None))


def _refusal(args: TrainingArguments, trainer: Trainer, adds_to_loss: bool, every: int | None) -> str | None:
    """What about a Trainer makes the compression impossible; None where nothing does."""
    if getattr(trainer, "model_init", None) is not None:
        return "the Trainer makes its model anew for every run (model_init): give it model= instead"
    if args.fsdp or args.deepspeed:
        return "under FSDP or DeepSpeed the parameters are in pieces: compress before, or train with DDP (torchrun)"
    if args.n_gpu > 1:
        return "several GPUs in one process train copies of the model: start a process for each (torchrun)"
    if every is not None and args.world_size > 1:
        return (
            f"every={every} changes the structure in mid-run, which would let {args.world_size} processes drift apart: "
            "leave every= out, or train in one process"
        )
    if every is not None and args.load_best_model_at_end:
        return "load_best_model_at_end may bring back a checkpoint with other blocks: not together with every="
    if adds_to_loss and args.label_smoothing_factor:
        return (
            "with label_smoothing_factor the Trainer computes the loss itself, and nothing can be added to the "
            "model's: set it to 0"
        )
    if adds_to_loss and trainer.compute_loss_func is not None:
        return "with a compute_loss_func nothing can be added to the model's own loss: leave it out"
    return None
