"""What the LayerCollapse examples have in common: one trained model, and six ways to make it smaller.

    dense       the model, trained on its task
    longer      the same, trained for as long again as the others: what that training alone is worth
    naive       its FFNs as the product of their projections, a gate as its mean: no training, no fit
    paper       activations trained to be linear (`variant="paper"`), then the product; the last FFNs
    closed      the closed form, `compress`'s default, which chooses the FFNs itself
    gradual     activations blended away over the first half of the training, in the FFNs that the closed form chooses
    healed      the closed form, then `heal` with the dense model as the teacher
    student     as many parameters, all FFNs narrower (the dense model's first hidden units), distilled in the same way

All that are trained start from the dense model, and train for the same number of epochs. Cost: FLOPs of that training
beside those of the dense model's own, 6 a parameter and token, 2 for the teacher and for calibration.
"""

from __future__ import annotations

import copy
import json
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import mean, stdev
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from transformers import (
    DataCollatorWithPadding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

import hf_compress as hfc
from hf_compress.anatomy.anatomy import Block
from hf_compress.calibration.data import DataOptions, prepare
from hf_compress.checks import is_number
from hf_compress.evaluation.size import parameter_count
from hf_compress.methods.layer_collapse.blend import fitting_blend, mean_gates
from hf_compress.methods.layer_collapse.product import product
from hf_compress.rewrite.apply import apply
from hf_compress.rewrite.builders import narrow_ffn, replace_activation
from hf_compress.rewrite.probe import Probe

UNTRAINED = ("naive", "closed")
COLUMNS = (*UNTRAINED, "paper", "gradual", "healed", "student")
RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"


@dataclass(frozen=True)
class Task:
    """A dataset, a model for it, and how it is trained.

    Attributes:
        build: an untrained (or pretrained) model for a seed.
        train, test: rows with labels, as a Trainer takes them.
        calibration: of the training rows, as `compress` takes it.
        tokenizer: pads rows of tokens.
        epochs, learning_rate: of the dense model's training.
        again, learning_rate_again: of what comes after it.
        scores: name -> function of predictions and labels.
    """

    build: Callable[[int], PreTrainedModel]
    train: Sequence[dict[str, Any]]
    test: Sequence[dict[str, Any]]
    calibration: Any
    epochs: float
    learning_rate: float
    again: float
    learning_rate_again: float
    scores: dict[str, Callable[[Tensor, Tensor], float]]
    tokenizer: PreTrainedTokenizerBase | None = None
    batch_size: int = 32
    bf16: bool = False

    @property
    def collate(self) -> Any:
        """What makes a batch of rows."""
        return default_data_collator if self.tokenizer is None else DataCollatorWithPadding(self.tokenizer)

    def arguments(self, folder: str, epochs: float, learning_rate: float, seed: int) -> TrainingArguments:
        return TrainingArguments(
            folder,
            num_train_epochs=epochs,
            learning_rate=learning_rate,
            per_device_train_batch_size=self.batch_size,
            warmup_steps=0.1,
            weight_decay=0.01,
            seed=seed,
            bf16=self.bf16,
            use_cpu=not torch.cuda.is_available(),
            lr_scheduler_type="cosine",
            logging_strategy="no",
            save_strategy="no",
            report_to=[],
            disable_tqdm=not sys.stderr.isatty(),
            train_sampling_strategy="group_by_length" if self.tokenizer else "random",
            dataloader_pin_memory=torch.cuda.is_available(),
        )

    def fit(
        self, model: PreTrainedModel, epochs: float, rate: float, seed: int, callback: Any = None
    ) -> PreTrainedModel:
        with TemporaryDirectory() as folder:
            arguments = self.arguments(folder, epochs, rate, seed)
            callbacks = [callback] if callback else []
            trainer = Trainer(
                model, arguments, data_collator=self.collate, train_dataset=self.train, callbacks=callbacks
            )
            trainer.remove_callback(PrinterCallback)
            trainer.train()
        return model.eval()

    def settings(self) -> dict[str, Any]:
        """The numbers among the fields: what tells one experiment's results from another's."""
        return {field.name: value for field in fields(self) if is_number(value := getattr(self, field.name))}

    def dense(self, seed: int) -> PreTrainedModel:
        """The model, trained."""
        set_seed(seed)
        return self.fit(self.build(seed), self.epochs, self.learning_rate, seed)

    def heal(self, model: PreTrainedModel, teacher: PreTrainedModel, epochs: float, seed: int) -> PreTrainedModel:
        with TemporaryDirectory() as folder:
            arguments = self.arguments(folder, epochs, self.learning_rate_again, seed)
            hfc.heal(model, teacher, self.train, self.tokenizer, lora=None, args=arguments)
        return model.eval()

    @torch.no_grad()
    def score(self, model: PreTrainedModel) -> dict[str, float]:
        """Of the model's most probable labels on the test rows."""
        model.eval()
        guesses, labels = [], []
        for start in range(0, len(self.test), 64):
            batch = self.collate([self.test[i] for i in range(start, min(start + 64, len(self.test)))])
            labels.append(batch.pop("labels"))
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.bf16):
                guesses.append(model(**{k: v.to(model.device) for k, v in batch.items()}).logits.argmax(-1).cpu())
        return {name: score(torch.cat(guesses), torch.cat(labels)) for name, score in self.scores.items()}


@dataclass(frozen=True)
class Result:
    """Scores, parameters, and the FLOPs of the training that it took after the dense model's, beside those of that."""

    scores: dict[str, float]
    parameters: int
    cost: float = 0.0
    collapsed: int = 0


Runs = dict[tuple[str, int], Result]  # of one seed, by column and number of FFNs


def run(task: Task, counts: Sequence[int], seed: int, trained: Sequence[int] | None = None) -> Runs:
    """All columns for some numbers of FFNs, for one seed; those that take training for `trained` alone."""
    dense = task.dense(seed)
    results = {("dense", 0): Result(task.score(dense), parameter_count(dense))}
    longer = task.fit(copy.deepcopy(dense), task.again, task.learning_rate_again, seed)
    results["longer", 0] = Result(task.score(longer), parameter_count(longer), task.again / task.epochs)
    for count in counts:
        closed = _compressed(task, dense, count)
        chosen = [step["block"] for step in closed.compression_report.notes["collapsed"]]
        made = {
            "naive": (naive(task, dense, chosen), 0.0),
            "closed": (closed, _passes(task, count) / (3 * task.epochs)),
        }
        if trained is None or count in trained:
            made |= {
                "paper": _trained(task, dense, _paper_config(task, dense, count), seed),
                "gradual": _trained(task, dense, hfc.LayerCollapseConfig(num_layers=count, gradual=True), seed),
                "healed": _healed(task, dense, closed, seed),
                "student": _student(task, dense, parameter_count(closed), seed),
            }
        for name, (model, cost) in made.items():
            linear = count
            if name == "paper":
                linear = len(model.compression_report.notes.get("collapsed", ()))
            results[name, count] = Result(task.score(model), parameter_count(model), cost, linear)
    return results


def naive(task: Task, dense: PreTrainedModel, blocks: Sequence[int]) -> PreTrainedModel:
    """The product of the projections of FFNs as they are, as if their activations were linear."""
    model = copy.deepcopy(dense)
    data = prepare(task.calibration, model, None, DataOptions(batch_size=64))
    stack = hfc.Anatomy(model).stack()
    for index in blocks:
        ffn = hfc.Anatomy(model).parts(stack, index).ffn
        blend = fitting_blend(ffn, stack.blocks[index].get_submodule(ffn.activation))
        constant = mean_gates(model, stack, data, [index])[index].float() if blend == "constant" else None
        apply(
            replace_activation(Block(model, stack, index), blend, 1.0, constant),
            model,
            Probe.of(model, data.batches[0]),
        )
        apply(product(Block(model, stack, index), None), model, Probe.of(model, data.batches[0]))
    return model


def _compressed(task: Task, dense: PreTrainedModel, count: int) -> PreTrainedModel:
    config = hfc.LayerCollapseConfig(num_layers=count)
    return hfc.compress(copy.deepcopy(dense), config, task.calibration, options=DataOptions(batch_size=64))


def _passes(task: Task, count: int) -> float:
    """Forward passes of the closed form, as a share of the training rows."""
    return count * _samples(task.calibration) / len(task.train)


def _samples(calibration: Any) -> int:
    return len(next(iter(calibration.values())))


def _trained(
    task: Task, dense: PreTrainedModel, config: hfc.LayerCollapseConfig, seed: int
) -> tuple[PreTrainedModel, float]:
    model = copy.deepcopy(dense)
    callback = hfc.CompressionCallback(config, task.calibration, options=DataOptions(batch_size=64))
    return task.fit(model, task.again, task.learning_rate_again, seed, callback), task.again / task.epochs


def _paper_config(task: Task, dense: PreTrainedModel, count: int) -> hfc.LayerCollapseConfig:
    """With PReLU, whatever the activation, as the paper has it; it says nothing of gates."""
    ffn = hfc.Anatomy(dense).parts(hfc.Anatomy(dense).stack(), 0).ffn
    blend = "leaky" if ffn.kind == "plain" else None
    return hfc.LayerCollapseConfig(variant="paper", num_layers=count, blend=blend)


def _healed(task: Task, dense: PreTrainedModel, closed: PreTrainedModel, seed: int) -> tuple[PreTrainedModel, float]:
    model = copy.deepcopy(closed)
    cost = task.again / task.epochs * (parameter_count(model) / parameter_count(dense) + 1 / 3)
    return task.heal(model, dense, task.again, seed), cost


def _student(task: Task, dense: PreTrainedModel, parameters: int, seed: int) -> tuple[PreTrainedModel, float]:
    model = copy.deepcopy(dense)
    stack = hfc.Anatomy(model).stack()
    width = hfc.Anatomy(model).parts(stack, 0).ffn.width
    probe = Probe.of(model, prepare(task.calibration, model, None, DataOptions(batch_size=64)).batches[0])
    one = copy.deepcopy(dense)
    apply(_narrow(one, width - 1), one, probe)
    unit = parameter_count(dense) - parameter_count(one)  # parameters of one hidden unit in every block
    apply(_narrow(model, width - round((parameter_count(dense) - parameters) / unit)), model, probe)
    cost = task.again / task.epochs * (parameter_count(model) / parameter_count(dense) + 1 / 3)
    return task.heal(model, dense, task.again, seed), cost


def _narrow(model: PreTrainedModel, width: int) -> hfc.Plan:
    stack = hfc.Anatomy(model).stack()
    plans = [narrow_ffn(Block(model, stack, index), range(max(1, width))) for index in range(len(stack))]
    return sum(plans[1:], start=plans[0])


def table(runs: Sequence[Runs], counts: Sequence[int]) -> str:
    """Markdown: a row for each column and number of FFNs, means over the seeds and their spread."""
    names = list(runs[0]["dense", 0].scores)
    lines = [
        "| FFNs | model | parameters | " + " | ".join(names) + " | training cost |",
        "|---|---|---|" + "---|" * len(names) + "---|",
    ]
    dense = runs[0]["dense", 0].parameters
    for key in [("dense", 0), ("longer", 0), *((name, count) for count in counts for name in COLUMNS)]:
        results = [run[key] for run in runs if key in run]
        if not results:
            continue
        cells = [_spread([result.scores[name] for result in results]) for name in names]
        size = mean(result.parameters for result in results) / dense - 1
        short = sum(result.collapsed < key[1] for result in results)
        note = f" ({short} of {len(results)} runs with fewer FFNs linear)" if short else ""
        note += f" ({len(results)} of {len(runs)} seeds)" if len(results) < len(runs) else ""
        lines.append(
            f"| {key[1] or ''} | {key[0]}{note} | {100 * size:+.1f}% | "
            + " | ".join(cells)
            + f" | {mean(result.cost for result in results):.2f} |"
        )
    return "\n".join(lines)


def _spread(values: list[float]) -> str:
    return f"{mean(values):.3f} ± {stdev(values):.3f}" if len(values) > 1 else f"{values[0]:.3f}"


def experiment(
    name: str,
    task: Task,
    counts: Sequence[int],
    seeds: int,
    trained: Sequence[int] | None = None,
    resume: bool = False,
) -> list[Runs]:
    """Run the seeds one after another, and save the table of those so far: a long run may be cut.

    With `resume` the seeds that an earlier run of the same task has left in benchmarks/results are taken from there, if
    they have all that is wanted; what more they have enters the table too.
    """
    path = RESULTS / f"{name}.json"
    settings = task.settings()
    saved = json.loads(path.read_text()) if resume and path.is_file() else {}
    rows = saved["seeds"] if saved.get("settings") == settings else {}
    wanted = {(column, n) for n in trained or counts for column in COLUMNS}
    wanted |= {(column, n) for n in counts for column in UNTRAINED}
    runs = []
    for seed in range(seeds):
        if not wanted <= {(row["model"], row["ffns"]) for row in rows.get(str(seed), ())}:
            results = run(task, counts, seed, trained)
            rows[str(seed)] = [{"model": model, "ffns": ffns, **asdict(r)} for (model, ffns), r in results.items()]
            path.write_text(json.dumps({"settings": settings, "seeds": rows}, indent=1) + "\n")
        runs.append({(row.pop("model"), row.pop("ffns")): Result(**row) for row in map(dict, rows[str(seed)])})
        head = f"{len(task.train):,} samples to train on, {len(task.test):,} to test on; seeds 0 to {seed}.\n\n"
        save_table(name, head + table(runs, counts))
    return runs


def save_table(name: str, text: str, columns: str = "collapse_columns.py") -> None:
    """Print a table, and keep it under benchmarks/results/ with the command that made it."""
    print(text, flush=True)
    path = RESULTS / f"{name}.md"
    command = f"python examples/{name}.py {shlex.join(sys.argv[1:])}".strip()
    path.write_text(f"Made by `{command}`; see examples/{columns} for the columns.\n\n{text}\n")
