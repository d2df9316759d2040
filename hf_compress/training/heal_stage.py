"""Healing as a stage among others: by settings that are data, and from where a run that was killed had got."""

from __future__ import annotations

from dataclasses import asdict
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import torch
from accelerate.utils import set_seed
from torch import Tensor
from transformers import PreTrainedModel

from hf_compress.calibration.data import Calibration
from hf_compress.methods.base.journal import Journal, Result
from hf_compress.numerics.defaults import torch_defaults
from hf_compress.report.history import add_stage, history_of, model_size
from hf_compress.training.heal import Learned, adapters_for, default_arguments, learn, stage_of_healing
from hf_compress.training.heal_config import HealConfig


@torch_defaults()
def heal_by(
    model: PreTrainedModel, config: HealConfig, teacher: PreTrainedModel, data: Calibration, journal: Journal
) -> None:
    """Train `model` in place by the settings of a stage, which its history gets.

    Args:
        data: what is learned from.
        journal: keeps the trained weights, all of them.

    Raises:
        ValueError, TypeError: as `heal`.
    """
    history, size, start = history_of(model), model_size(model), perf_counter()

    def train() -> Result:
        learned = _train(model, config, teacher, data)
        return _tensors(model), asdict(learned)

    tensors, facts = journal.result("trained", train)
    if journal.folder is not None:  # the values are in a file, perhaps of an earlier run
        with torch.no_grad():
            for name, tensor in _tensors(model).items():
                tensor.copy_(tensors[name])
    learned, seconds = Learned(**facts), perf_counter() - start
    stage = stage_of_healing(config.to_dict(), size, model_size(model), learned, teacher, seconds, data)
    add_stage(model, stage, history)


def _train(model: PreTrainedModel, config: HealConfig, teacher: PreTrainedModel, data: Calibration) -> Learned:
    set_seed(config.seed)  # the adapters begin with random weights
    lora = adapters_for(model, config.rank)
    more: dict[str, Any] = {"num_train_epochs": config.epochs, "per_device_train_batch_size": config.batch_size}
    if config.steps is not None:
        more["max_steps"] = config.steps
    if config.learning_rate is not None:
        more["learning_rate"] = config.learning_rate
    with TemporaryDirectory() as folder:
        args = default_arguments(folder, lora is not None, seed=config.seed, **more)
        return learn(model, teacher, data, None, lora, config, args, None)


def _tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """All that training may change."""
    named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: tensor.detach() for name, tensor in named.items()}
