"""`hf-compress demo`: a quarter of a trained model's blocks out by MKA, saved, loaded, and scored beside controls."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from hf_compress.api.compress import compress
from hf_compress.calibration.capture import forward, inference
from hf_compress.calibration.data import DataOptions, prepare
from hf_compress.cli.reference import MODEL, REFERENCE
from hf_compress.errors import ParityError
from hf_compress.evaluation.perplexity import Perplexity, perplexity
from hf_compress.evaluation.size import parameter_count, stored_bytes
from hf_compress.methods.base.settings import CompressionConfig
from hf_compress.methods.drop_blocks import DropBlocksConfig
from hf_compress.methods.mka import MKAConfig
from hf_compress.storage.save import own_memory, save

if TYPE_CHECKING:
    from rich.console import Console

    from hf_compress.evaluation.evaluate import TaskScore

RATIO = 0.25
_CALIBRATION_TOKENS = 256  # of each text
_HELD_OUT_LETTERS = 1500  # from the middle of each held-out document: about as many tokens as the model has positions


@dataclass(frozen=True)
class _Amounts:
    """How much data the demo takes: texts, questions, and texts that MKA compares candidates on."""

    calibration: int
    choice: int
    held_out: int
    cloze: int


_FULL = _Amounts(calibration=96, choice=24, held_out=64, cloze=100)
_QUICK = _Amounts(calibration=32, choice=8, held_out=24, cloze=40)


@dataclass(frozen=True)
class _Row:
    """One model in the final table."""

    name: str
    parameters: int
    bytes: int
    perplexity: Perplexity
    cloze: TaskScore | None


def methods(choice_samples: int = 32) -> dict[str, CompressionConfig]:
    """What is compared, by the names in the table."""
    return {
        "MKA": MKAConfig(ratio=RATIO, choice_samples=choice_samples),
        "MKA, the paper's averaging": MKAConfig(ratio=RATIO, variant="paper"),
        "drop the last blocks": DropBlocksConfig(ratio=RATIO, criterion="last"),
        "drop by block influence": DropBlocksConfig(ratio=RATIO, criterion="block_influence"),
    }


def run(console: Console, output: Path, *, quick: bool = False) -> None:
    """Compress the reference model, prove that it loads, and print what it and its controls are worth.

    Args:
        console: what to print on.
        output: where the compressed model goes; replaced if it exists.
        quick: take less data.

    Raises:
        ParityError: the model that was loaded gives other logits than the one that was saved.
    """
    start = perf_counter()
    amounts = _QUICK if quick else _FULL
    calibration = _texts("calibration", amounts.calibration)
    held_out = [_middle(text) for text in _texts("heldout", amounts.held_out)]
    name = str(REFERENCE / MODEL)
    tokenizer = AutoTokenizer.from_pretrained(name)
    rows: list[_Row] = []
    for label, model in _models(console, name, calibration, tokenizer, amounts.choice):
        if label == "MKA":
            console.print(str(model.compression_report), markup=False, soft_wrap=True)
            _save_and_compare(console, model, tokenizer, output, held_out[0])
        console.print(f"  scoring: {label}", style="dim")
        rows.append(_score(label, model, tokenizer, held_out, amounts.cloze))
    console.print(_table(rows))
    if rows[0].cloze is None:
        console.print("No cloze accuracy: it needs lm-eval (pip install hf-compress[evaluation]).", markup=False)
    console.print(f"{perf_counter() - start:.0f} s. The compressed model lies in {_shown(output)}. Next:", markup=False)
    console.print(f"  hf-compress info {_shown(output)}", markup=False)
    console.print("  hf-compress compress YOUR_MODEL --ratio 0.25 --calibration YOUR_TEXTS --output DIR", markup=False)


def _models(
    console: Console, name: str, calibration: list[str], tokenizer: PreTrainedTokenizerBase, choice: int
) -> Iterator[tuple[str, PreTrainedModel]]:
    """The dense model, and one for every method, each from the files anew."""
    yield "dense", _load(name)
    data = None
    for label, config in methods(choice).items():
        console.print(f"[bold]{label}[/bold]: taking out 3 of 12 blocks …")
        model = _load(name)
        data = data or prepare(calibration, model, tokenizer, DataOptions(max_length=_CALIBRATION_TOKENS))
        yield label, compress(model, config, data)


def _load(name: str) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_pretrained(name, dtype="auto")
    assert isinstance(model, PreTrainedModel)
    return model


def _texts(part: str, count: int) -> list[str]:
    """The first texts of a part of the reference data, evenly spread over it."""
    lines = (REFERENCE / f"{part}.jsonl").read_text(encoding="utf-8").splitlines()
    count = min(count, len(lines))
    return [json.loads(lines[i * len(lines) // count])["text"] for i in range(count)]


def _middle(text: str) -> str:
    """A stretch from the middle of a document, where it is least like other documents."""
    start = max(0, (len(text) - _HELD_OUT_LETTERS) // 2)
    return text[start : start + _HELD_OUT_LETTERS]


def _save_and_compare(
    console: Console, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, output: Path, text: str
) -> None:
    """Save, load by Transformers alone, and hold the logits against those of the model in memory.

    Raises:
        ParityError: they are not the same bits.
    """
    save(model, output, tokenizer, overwrite=True)
    loaded = _load(str(output))
    own_memory(loaded)
    batch = prepare([text[:500]], model, tokenizer).batches[0]
    with inference(model), inference(loaded):
        ours, theirs = (forward(each, batch).logits for each in (model, loaded))
    if not torch.equal(ours, theirs):
        raise ParityError("the loaded model gives other logits than the one that was saved")
    shape = " x ".join(map(str, ours.shape))
    console.print(
        f'[green]AutoModelForCausalLM.from_pretrained("{_shown(output)}"): '
        f"{shape} logits, bit for bit those of the model in memory.[/green]"
    )


def _score(
    label: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, held_out: list[str], cloze: int
) -> _Row:
    return _Row(
        label,
        parameter_count(model),
        stored_bytes(model),
        perplexity(model, tokenizer, held_out, batch_size=8),
        _cloze(model, tokenizer, cloze),
    )


def _cloze(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, limit: int) -> TaskScore | None:
    """Accuracy on the shipped cloze task; None where lm-eval is not installed."""
    from hf_compress.evaluation.evaluate import task_scores
    from hf_compress.evaluation.harness import run_tasks

    try:
        harness = run_tasks(model, tokenizer, "manuals_cloze", limit=limit)
    except ImportError:
        return None
    return next(score for score in task_scores(harness) if score.metric == "acc")


def _table(rows: list[_Row]) -> object:
    from rich.table import Table

    table = Table(title="measured just now, on manuals that neither training nor calibration has seen")
    table.add_column("model")
    for name in ("parameters", "stored bytes", "perplexity", "times dense", "cloze accuracy (chance 0.25)"):
        table.add_column(name, justify="right")
    for row in rows:
        cloze = "" if row.cloze is None else f"{row.cloze.value:.2f} ± {row.cloze.standard_error:.2f}"
        style = "bold" if row.name == "MKA" else None
        times = "" if row is rows[0] else _times(row.perplexity, rows[0].perplexity)
        table.add_row(row.name, f"{row.parameters:,}", f"{row.bytes:,}", str(row.perplexity), times, cloze, style=style)
    return table


def _times(perplexity: Perplexity, dense: Perplexity) -> str:
    """How many times the dense model's perplexity, with the far smaller error of a comparison text by text."""
    difference, error = perplexity.loss_difference(dense)
    factor = math.exp(difference)
    return f"{factor:.3f} ± {factor * error:.3f}"


def _shown(path: Path) -> str:
    """A path as it is typed."""
    return path.as_posix() if path.is_absolute() else f"./{path.as_posix()}"
