"""What the examples on language models have in common: the task, the command line, and the model card."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

import hf_compress as hfc
from hf_compress.calibration.files import load_texts
from hf_compress.report.card import model_card
from hf_compress.report.card_facts import CardDetails

REFERENCE = Path(__file__).parent / "reference"
CARDS = Path(__file__).parent.parent / "model_cards"

DATA = ("model", "calibration", "heldout")
BUNDLED = CardDetails(  # what is true of the default DATA alone
    license="apache-2.0",
    language="en",
    calibration="Unix manual pages, Python, Perl and Git documentation and standard-library code.",
    evaluation="documents of the same kinds that neither training nor calibration has seen",
    limitations=(
        "manuals_cloze asks which of four continuations is a held-out manual's own, in the words of manuals alone: "
        "chance is 0.25, and what it says of other language is not known.",
        "The base model is a small one, trained to exercise this library on manual pages and code; it is good for "
        "nothing else, and neither is this.",
    ),
)


@dataclass(frozen=True)
class Task:
    """What every model of the table is scored on, and what it is compressed with."""

    model: str
    tokenizer: PreTrainedTokenizerBase
    calibration: list[str]
    heldout: list[str]
    questions: int | None

    def fresh(self) -> PreTrainedModel:
        return AutoModelForCausalLM.from_pretrained(self.model)

    def score(self, model: PreTrainedModel) -> hfc.EvaluationResult:
        return hfc.evaluate(model, self.tokenizer, tasks=["manuals_cloze"], texts=self.heldout, limit=self.questions)

    def shortened(self) -> Task:
        """The middle of each held-out document alone, past the preambles that manual pages share."""
        return replace(self, heldout=[text[1500:3000] for text in self.heldout if len(text) > 3000])

    def compressed(self, config: hfc.CompressionConfig) -> hfc.EvaluationResult:
        """The scores of a fresh model compressed by `config`."""
        return self.score(hfc.compress(self.fresh(), config, self.calibration, self.tokenizer))


def accuracy(result: hfc.EvaluationResult) -> str:
    """Of the cloze task."""
    return f"{next(score.value for score in result.scores if score.metric == 'acc'):.3f}"


def arguments(description: str | None, output: str) -> argparse.ArgumentParser:
    """The options that every such example has."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a directory or a name on the Hub; default: the bundled reference model")
    parser.add_argument("--calibration", type=Path, default=REFERENCE / "calibration.jsonl")
    parser.add_argument("--heldout", type=Path, default=REFERENCE / "heldout.jsonl")
    parser.add_argument("--output", type=Path, default=Path(output))
    parser.add_argument("--full", action="store_true", help="the whole cloze task instead of 200 questions")
    return parser


def task_of(args: argparse.Namespace) -> Task:
    logging.set_verbosity_error()
    name = args.model or str(REFERENCE / "manuals-llama-12l")
    return Task(
        name,
        AutoTokenizer.from_pretrained(name),
        load_texts(args.calibration),
        load_texts(args.heldout),
        None if args.full else 200,
    )


def publish(
    task: Task,
    model: PreTrainedModel,
    args: argparse.Namespace,
    parser: argparse.ArgumentParser,
    controls: Callable[[], dict[str, hfc.EvaluationResult]],
) -> None:
    """Save a model, load it again, score that beside its controls, and write and print the card."""
    folder = hfc.save(model, args.output, task.tokenizer, overwrite=True)
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    bundled = all(value == parser.get_default(key) for key, value in vars(args).items() if key in DATA)
    card = model_card(
        loaded,
        result=task.score(loaded),
        controls=controls(),
        command=shlex.join(["python", f"examples/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        details=replace(BUNDLED if bundled else CardDetails(), name=folder.name),
    )
    card.save(folder / "README.md")
    if bundled:
        CARDS.mkdir(exist_ok=True)
        card.save(CARDS / f"{folder.name}.md")
    print(card.content)
