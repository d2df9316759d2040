"""Short runs of a Trainer on tiny random models: what the tests of training have in common."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

from hf_compress import CompressionCallback, DenseConfig, DenseForClassification
from hf_compress.methods.layer_collapse.training import Blending
from tests.helpers.language import WORDS, tiny_llama

PAPER = {"variant": "paper"}


def arguments(folder: str | Path, **settings: Any) -> TrainingArguments:
    """Silent, on the CPU, sequential, logging every step."""
    defaults: dict[str, Any] = {
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "train_sampling_strategy": "sequential",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "use_cache": True,  # as the models have it: a Trainer changes their config
    }
    return TrainingArguments(str(folder), **defaults | settings)


def token_rows(count: int = 16, length: int = 8, ignored: bool = False) -> list[dict[str, Tensor]]:
    """Texts of random words; if asked, with a number of labels of -100 that differs from row to row."""
    generator = torch.Generator().manual_seed(3)
    rows = []
    for number in range(count):
        ids = torch.randint(4, len(WORDS), (length,), generator=generator)
        labels = ids.clone()
        if ignored:
            labels[: (number * number) % (length - 1)] = -100
        rows.append({"input_ids": ids, "labels": labels})
    return rows


def ids_of(rows: list[dict[str, Tensor]]) -> Tensor:
    return torch.stack([row["input_ids"] for row in rows])


CALIBRATION = ids_of(token_rows(64))


def dense_rows(count: int = 16) -> list[dict[str, Tensor]]:
    values = torch.randn(count, 8, generator=torch.Generator().manual_seed(3))
    return [{"input_values": value, "labels": value[0].gt(0).long()} for value in values]


def tiny_dense(**settings: Any) -> DenseForClassification:
    torch.manual_seed(0)
    fields = {"input_size": 8, "hidden_size": 8, "intermediate_size": 32, "num_hidden_layers": 3, "num_labels": 2}
    return DenseForClassification(DenseConfig(**fields | {"residual": True} | settings)).eval()


def dropping_llama(layers: int = 4) -> PreTrainedModel:
    """A Llama with dropout in its attention."""
    model = tiny_llama(layers)
    model.config.attention_dropout = 0.2
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.2
    return model


def state_of(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    """Whether two sets of tensors are the same, bit for bit."""
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


class Snapshot:
    """A model's structure, config, weights, and what of it is trained."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.weights = state_of(model)
        self.facts = self._facts(model)

    def matches(self, model: PreTrainedModel) -> bool:
        return self.facts == self._facts(model) and same(self.weights, state_of(model))

    def _facts(self, model: PreTrainedModel) -> list[Any]:
        modules = [(path, type(module).__name__) for path, module in model.named_modules()]
        return [model.config.to_dict(), modules, [(name, p.requires_grad) for name, p in model.named_parameters()]]


def figures(trainer: Trainer) -> list[dict[str, float]]:
    """The log of the steps, without times."""
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def loss_on(model: PreTrainedModel, rows: list[dict[str, Tensor]]) -> float:
    batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    with torch.no_grad():
        return model.eval()(**batch).loss.item()


class Gradients(TrainerCallback):
    """The gradients of the first step, of the weights and of the learned α."""

    def __init__(self, callback: CompressionCallback | None = None) -> None:
        self.weights: dict[str, Tensor] = {}
        self.alphas = torch.zeros(0)
        if callback is not None:
            schedule, step = callback.schedule, callback.schedule.step

            def watched(progress: float, loss_scale: float) -> None:
                if not len(self.alphas) and isinstance(schedule, Blending):
                    self.alphas = schedule.gradient.clone()
                step(progress, loss_scale)

            schedule.step = watched

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self.weights:
            named = kwargs["model"].named_parameters()
            self.weights = {name: p.grad.clone() for name, p in named if p.grad is not None}
