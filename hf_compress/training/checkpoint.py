"""What a Trainer's checkpoint does not hold of a compression, in a file beside it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel

from hf_compress.numerics.tensor_file import read_tensors, write_tensors

STATE_FILE = "hf_compress_training.safetensors"


@dataclass(frozen=True)
class TrainingState:
    """
    Attributes:
        step: the optimizer's steps done.
        done: how many changes of structure have been made in mid-run.
        edits: theirs, as JSON values, in the numbering of the model before the first.
        tensors: of the method; see `TrainingSchedule.state`.
    """

    step: int
    done: int
    edits: list[dict]
    tensors: dict[str, Tensor]


def write_state(folder: str | Path, state: TrainingState) -> None:
    """Write it into a checkpoint's folder: whole, or not at all."""
    path = Path(folder) / STATE_FILE
    facts = {"step": state.step, "done": state.done, "edits": state.edits}
    write_tensors(path, state.tensors, facts)


def read_state(folder: str | Path, step: int) -> TrainingState:
    """What `write_state` wrote.

    Raises:
        ValueError: the folder has no such file, or one of another step.
    """
    path = Path(folder) / STATE_FILE
    if not path.is_file():
        raise ValueError(
            f"{folder} has no {STATE_FILE}: it was written without this callback, or the run ended while it was "
            "written; resume from an earlier checkpoint"
        )
    facts, tensors = read_tensors(path)
    if facts["step"] != step:
        raise ValueError(f"{path} is of step {facts['step']}, the checkpoint of step {step}; resume from another one")
    return TrainingState(facts["step"], facts["done"], facts["edits"], tensors)


def take_structure(model: PreTrainedModel, folder: str | Path) -> None:
    """Make `model`, in place, what a checkpoint of it has become since: its modules, its config, and its weights."""
    kind: type[PreTrainedModel] = type(model)
    saved = kind.from_pretrained(folder, dtype=model.dtype).to(model.device)  # type: ignore[arg-type]
    trained = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    for table in ("_modules", "_parameters", "_buffers"):
        vars(model)[table] = vars(saved)[table]
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trained.get(name, True))
    model.train(model.training)
    model.config = saved.config  # the very one that its modules hold
