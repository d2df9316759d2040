"""MKA on a trained language model: look at the blocks, merge a quarter, save, load, score, write the model card.

    python examples/mka_llm.py                        # the bundled model and texts; some minutes on two cores
    python examples/mka_llm.py --full                 # the whole cloze task
    python examples/mka_llm.py --model gpt2 --calibration my.jsonl --heldout other.jsonl --output out/gpt2-9l

Writes the model and a heatmap of its blocks' similarity to --output, and its card, with the scores measured in this run
and those of its controls, to model_cards/ (for the bundled model) and into the model's folder.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

import hf_compress as hfc
from hf_compress.calibration.files import load_texts
from hf_compress.report.card import CardDetails, model_card

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


def controls(task: Task, ratio: float) -> dict[str, hfc.EvaluationResult]:
    """The scores of the uncompressed model, of the paper's variant, and of the simplest things of the same size."""
    configs = {
        "MKA (paper): averaging": hfc.MKAConfig(ratio=ratio, variant="paper"),
        "last blocks left out": hfc.DropBlocksConfig(ratio=ratio, criterion="last"),
        "block influence (ShortGPT)": hfc.DropBlocksConfig(ratio=ratio, criterion="block_influence"),
    }
    scores = {"uncompressed": task.score(task.fresh())}
    for name, config in configs.items():
        scores[name] = task.score(hfc.compress(task.fresh(), config, task.calibration, task.tokenizer))
    return scores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a directory or a name on the Hub; default: the bundled reference model")
    parser.add_argument("--calibration", type=Path, default=REFERENCE / "calibration.jsonl")
    parser.add_argument("--heldout", type=Path, default=REFERENCE / "heldout.jsonl")
    parser.add_argument("--ratio", type=float, default=0.25)
    parser.add_argument("--output", type=Path, default=Path("out/manuals-llama-9l-mka"))
    parser.add_argument("--full", action="store_true", help="the whole cloze task instead of 200 questions")
    args = parser.parse_args()
    logging.set_verbosity_error()

    name = args.model or str(REFERENCE / "manuals-llama-12l")
    task = Task(
        name,
        AutoTokenizer.from_pretrained(name),
        load_texts(args.calibration),
        load_texts(args.heldout),
        None if args.full else 200,
    )
    model = task.fresh()
    analysis = hfc.analyze(model, task.calibration, task.tokenizer)
    model = hfc.compress(model, hfc.MKAConfig(ratio=args.ratio), task.calibration, task.tokenizer)
    folder = hfc.save(model, args.output, task.tokenizer, overwrite=True)
    analysis.plot(folder / "similarity.png")
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    loaded.compression_report = model.compression_report
    bundled = all(value == parser.get_default(key) for key, value in vars(args).items() if key in DATA)
    card = model_card(
        loaded,
        result=task.score(loaded),
        controls=controls(task, args.ratio),
        command=shlex.join(["python", "examples/mka_llm.py", *sys.argv[1:]]),
        details=replace(BUNDLED if bundled else CardDetails(), name=folder.name),
    )
    card.save(folder / "README.md")
    if bundled:
        CARDS.mkdir(exist_ok=True)
        card.save(CARDS / f"{folder.name}.md")
    print(card.content)


if __name__ == "__main__":
    main()
