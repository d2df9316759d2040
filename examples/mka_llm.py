"""MKA on a trained language model: look at the blocks, merge a quarter, save, load, score, write the model card.

    python examples/mka_llm.py                        # the bundled model and texts; some minutes on two cores
    python examples/mka_llm.py --full                 # the whole cloze task
    python examples/mka_llm.py --model gpt2 --calibration my.jsonl --heldout other.jsonl --output out/gpt2-9l

Writes the model and a heatmap of its blocks' similarity to --output, and its card, with the scores measured in this run
and those of its controls, to model_cards/ (for the bundled model) and into the model's folder.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

import hf_compress as hfc
from hf_compress.calibration.files import load_texts

REFERENCE = Path(__file__).parent / "reference"
CARDS = Path(__file__).parent.parent / "model_cards"

CARD = """---
{metadata}
---

# {name}

[{base}]({base_link}) with {after} of its {before} residual blocks, made by
[MKA](../docs/mka.md) (arXiv [2406.16330](https://arxiv.org/abs/2406.16330)), default variant, with hf_compress.
{blocks} It is a plain checkpoint: stock Transformers loads it.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{folder}")
tokenizer = AutoTokenizer.from_pretrained("{folder}")
```

## Scores

Measured by the command below; ± are standard errors. The controls leave the same number of blocks out.

{table}

Perplexity: {documents} documents that neither training nor calibration has seen, {tokens:,} tokens, in windows of 512.
The errors are mostly what documents differ by; between models of one table they are far smaller. Cloze: which of four
continuations is a held-out manual's own ({questions} questions, chance 0.25).

## How it was made

    {command}

Calibration: {samples} texts, {calibration_tokens:,} tokens, of Unix manual pages, Python, Perl and Git documentation
and standard-library code. Settings: `{config}`. Versions: {versions}.

## Limitations

The base model is a small one, trained to exercise this library on manual pages and code; it is good for nothing else,
and neither is this. Nothing was trained after compression. Not evaluated: safety, bias, other languages, other text.
"""


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


def row(name: str, result: hfc.EvaluationResult) -> str:
    """A line of the card's table."""
    cloze = next(score for score in result.scores if score.metric == "acc")
    return (
        f"| {name} | {result.parameters:,} | {result.stored_bytes:,} | {result.perplexity} | "
        f"{cloze.value:.3f} ± {cloze.standard_error:.3f} |"
    )


def scored_table(task: Task, ratio: float, ours: PreTrainedModel) -> tuple[str, hfc.EvaluationResult]:
    """The table of our model, the uncompressed one, the paper's variant and the controls; and our model's scores."""
    result = task.score(ours)
    lines = ["| model | parameters | bytes | held-out perplexity | cloze accuracy |", "|---|---|---|---|---|"]
    lines += [row("uncompressed", task.score(task.fresh())), row("**MKA (default)**", result)]
    others = {
        "MKA (paper): averaging": hfc.MKAConfig(ratio=ratio, variant="paper"),
        "last blocks left out": hfc.DropBlocksConfig(ratio=ratio, criterion="last"),
        "block influence (ShortGPT)": hfc.DropBlocksConfig(ratio=ratio, criterion="block_influence"),
    }
    for name, config in others.items():
        model = hfc.compress(task.fresh(), config, task.calibration, task.tokenizer)
        lines.append(row(name, task.score(model)))
    return "\n".join(lines), result


def write_card(task: Task, args: argparse.Namespace, model: PreTrainedModel, folder: Path) -> ModelCard:
    """The card of a compressed model, with all of its scores."""
    report = model.compression_report
    table, result = scored_table(task, args.ratio, model)
    stack, before = next(iter(report.before.blocks.items()))
    merged = [edit for edit in report.edits if edit["edit"] == "MergeBlocks"]
    blocks = "Block " + ", block ".join(
        f"{edit['kept']} stands for {[edit['kept'], *edit['absorbed']]}" for edit in merged
    )
    base = Path(task.model).name
    metadata = ModelCardData(
        license="apache-2.0", library_name="transformers", tags=["hf-compress", "mka"], pipeline_tag="text-generation"
    )
    bundled = args.model is None
    text = CARD.format(
        metadata=metadata.to_yaml(),
        name=folder.name,
        base=base,
        base_link=f"../examples/reference/{base}" if bundled else f"https://huggingface.co/{task.model}",
        before=before,
        after=report.after.blocks[stack],
        blocks=f"{blocks} of the original, counted from 0.",
        folder=folder.name,
        table=table,
        documents=result.perplexity.documents,
        tokens=result.perplexity.tokens,
        questions=next(iter(result.scores)).documents,
        command="python examples/mka_llm.py" + (" --full" if args.full else ""),
        samples=report.calibration["samples"],
        calibration_tokens=report.calibration["tokens"],
        config=report.config,
        versions=", ".join(f"{name} {version}" for name, version in report.environment.items()),
    )
    return ModelCard(text)


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
    card = write_card(task, args, loaded, folder)
    card.save(folder / "README.md")
    if args.model is None:
        CARDS.mkdir(exist_ok=True)
        card.save(CARDS / f"{folder.name}.md")
    print(card.content)


if __name__ == "__main__":
    main()
