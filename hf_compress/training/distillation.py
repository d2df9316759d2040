"""What a student is to learn from a teacher: its distribution, and its residual stream where blocks correspond."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from hf_compress.anatomy.anatomy import Anatomy
from hf_compress.calibration.capture import inference, watch_blocks
from hf_compress.calibration.decoder import has_decoder
from hf_compress.calibration.objective import first_tensor
from hf_compress.report.history import history_of
from hf_compress.training.objective import shifts_labels

_NOT_FOR_THE_TEACHER = ("shift_labels", "num_items_in_batch")


class Distillation:
    """The distance of a student from its teacher on the batches that the student is trained on.

    Logits: the Kullback-Leibler divergence of the student's distribution from the teacher's, in nats, the mean over the
    positions that the loss counts (Hinton et al., arXiv 1503.02531, with their factor T²); for a regression, the
    squared distance. Streams: ‖student − teacher‖² / ‖teacher − mean‖², the mean over corresponding blocks.

    Args:
        student: the model being trained.
        teacher: with the same inputs and outputs. It is put on the student's device.
        pairs: (block of the student, block of the teacher) whose outputs are to be alike; none for the logits alone.
        temperature: T.
        autocast: makes the context that the teacher runs in, as the Trainer's own for mixed precision.
    """

    def __init__(
        self,
        student: PreTrainedModel,
        teacher: PreTrainedModel,
        pairs: Sequence[tuple[int, int]] = (),
        temperature: float = 1.0,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        check_teacher(student, teacher)
        self.student, self.temperature, self.pairs, self.autocast = student, temperature, pairs, autocast
        self.teacher = teacher.to(student.device)  # type: ignore[arg-type]
        accepted = inspect.signature(teacher.forward).parameters
        self._takes_all = any(one.kind is inspect.Parameter.VAR_KEYWORD for one in accepted.values())
        self._taken = frozenset(accepted)
        self._stack = Anatomy(teacher).stack() if pairs else None
        self._streams: dict[int, Tensor] = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Keep what the student's blocks give, for as long as it lasts."""
        wanted = {own for own, _ in self.pairs}

        def keep(index: int, before: Tensor, after: Tensor) -> None:
            if index in wanted and torch.is_grad_enabled():
                self._streams[index] = after

        with ExitStack() as hooks:
            if wanted:
                hooks.enter_context(watch_blocks(Anatomy(self.student).stack(), keep))
            yield

    def losses(self, kwargs: dict[str, Any], output: Any, weight: Tensor) -> tuple[Tensor, Tensor | None]:
        """Both distances of a micro-batch, in the share that it has in its optimizer's step.

        Args:
            kwargs: of the student's forward pass.
            output: its output.
            weight: see `item_weight`.
        """
        seen: dict[int, Tensor] = {}

        def keep(index: int, before: Tensor, after: Tensor) -> None:
            seen[index] = after

        inputs = {
            name: value
            for name, value in kwargs.items()
            if name not in _NOT_FOR_THE_TEACHER and (self._takes_all or name in self._taken)
        }
        if not self.student.config.is_encoder_decoder:  # there they are what the decoder reads
            inputs.pop("labels", None)
        with inference(self.teacher), self.autocast(), ExitStack() as hooks:
            if self._stack is not None:
                hooks.enter_context(watch_blocks(self._stack, keep))
            target = _logits(self.teacher(**inputs))
        counted = _counted(self.student, kwargs, target)
        divergence = _divergence(_logits(output)[counted], target[counted], self.temperature)
        if not self.pairs:
            return weight * divergence, None
        real = _real(kwargs, seen[self.pairs[0][1]])
        ran = [(own, other) for own, other in self.pairs if own in self._streams]  # layerdrop skips some in training
        gaps = [_gap(self._streams[own][real], seen[other][real]) for own, other in ran]
        self._streams.clear()
        return weight * divergence, weight * torch.stack(gaps).mean() if gaps else None


def check_teacher(student: PreTrainedModel, teacher: Any) -> None:
    """Raise unless a teacher's outputs can be compared with the student's.

    Raises:
        TypeError: it is no Transformers model.
        ValueError: another vocabulary or other labels, or the student itself.
    """
    if not isinstance(teacher, PreTrainedModel):
        raise TypeError(f"teacher must be a transformers.PreTrainedModel; got {type(teacher).__name__}")
    if teacher is student:
        raise ValueError("the teacher is the very model that is trained: give an uncompressed copy (copy.deepcopy)")
    for name in ("vocab_size", "num_labels"):
        if name == "num_labels" and student.can_generate():
            continue
        own, other = (getattr(model.config.get_text_config(), name, None) for model in (student, teacher))
        if own != other:
            raise ValueError(
                f"the teacher has {name} {other} and the model {own}: their outputs cannot be compared; give a teacher "
                "of the same tokenizer and labels"
            )


def _logits(output: Any) -> Tensor:
    if isinstance(output, tuple):
        return next(value for value in output if isinstance(value, Tensor) and value.ndim > 0)
    return first_tensor(output)


def _counted(student: PreTrainedModel, kwargs: dict[str, Any], logits: Tensor) -> Tensor:
    """Mask of the places of `logits`, without their last axis, whose distribution the loss looks at."""
    shape = logits.shape[:-1]
    labels = kwargs.get("shift_labels", kwargs.get("labels"))
    if isinstance(labels, Tensor) and labels.shape == shape:
        counted = labels.ne(-100)
        if shifts_labels(student) and "shift_labels" not in kwargs:
            counted = F.pad(counted[..., 1:], (0, 1), value=False)
        return counted
    if len(shape) != 2:
        return torch.ones(shape, dtype=torch.bool, device=logits.device)
    return _real(kwargs, logits, "decoder_attention_mask" if has_decoder(student) else "attention_mask")


def _real(kwargs: dict[str, Any], stream: Tensor, name: str = "attention_mask") -> Tensor:
    """Mask of the positions of `stream` that are no padding."""
    mask = kwargs.get(name)
    if isinstance(mask, Tensor) and mask.shape == stream.shape[:2]:
        return mask.bool()
    return torch.ones(stream.shape[:2], dtype=torch.bool, device=stream.device)


def _divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Mean over places (places, classes); one class is a regression. 0 where there is no place."""
    if len(student) == 0:
        return student.sum()
    if student.shape[-1] == 1:
        return F.mse_loss(student.float(), teacher.float())
    own = F.log_softmax(student.float() / temperature, dim=-1)
    other = F.log_softmax(teacher.float() / temperature, dim=-1)
    return F.kl_div(own, other, reduction="batchmean", log_target=True) * temperature**2


def _gap(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared distance of two streams (tokens, width) beside the teacher's spread."""
    teacher = teacher.float()
    spread = (teacher - teacher.mean(0)).square().sum()
    return (student.float() - teacher).square().sum() / spread.clamp(min=1e-12)


def corresponding_blocks(student: PreTrainedModel, teacher: PreTrainedModel) -> list[tuple[int, int]]:
    """Which blocks of two models stand for each other.

    All, where they have as many; else those that have stayed, by the student's history, since it had as many as the
    teacher; where that tells of no such time, the last ones, whose streams the heads read.
    """
    own, other = Anatomy(student).stack(), Anatomy(teacher).stack()
    if len(own) == len(other):
        return [(index, index) for index in range(len(own))]
    history = history_of(student)
    last = list(range(len(own)))  # of the blocks that each stands for, counted as before the stages gone through
    for stage in reversed(history.stages if history else ()):
        stands_for = list(stage.survivors(own.path).values())
        if max(last) >= len(stands_for):
            break
        last = [stands_for[index] for index in last]
        if stage.before.blocks.get(own.path) == len(other):
            return list(enumerate(last))
    return [(len(own) - 1, len(other) - 1)]
