"""Which tokens an output comes from: a text through a language model, and a pair of sentences through a classifier.

    python examples/relevance_heatmap.py                    # the bundled language model; seconds
    python examples/relevance_heatmap.py --model gpt2 --texts "The capital of France is"
    python examples/relevance_heatmap.py --mrpc             # and MiniLM, fine-tuned here on paraphrases; ten minutes
    python examples/relevance_heatmap.py --mrpc DIRECTORY   # or fine-tuned before

Pages and pictures go to --output (benchmarks/results/ by default).
"""

from __future__ import annotations

import argparse
from pathlib import Path

from llm import REFERENCE
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils import logging

import hf_compress as hfc

RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"
TEXTS = [
    "The git commit command records changes to the",
    "ls lists the files in a directory. If no directory is given, it lists those in the current",
]


def language_model(name: str, texts: list[str]) -> hfc.Relevance:
    """The next word that the model holds most likely after each text, by the words before."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(name), AutoTokenizer.from_pretrained(name)
    found = hfc.relevance(model, texts, tokenizer)
    for row, text in enumerate(texts):
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        word = tokenizer.decode(model(input_ids=ids).logits[0, -1].argmax())
        print(f"{text!r} goes on with {word!r}, a logit of {float(found.explained[row]):.2f}")
    return found


def paraphrases(count: int, trained: str) -> hfc.Relevance:
    """The class that a MiniLM gives pairs of sentences of MRPC; fine-tuned here, where it is not `trained` before."""
    from layer_collapse_bert import SHARED, default_model, mrpc_task

    task = mrpc_task(default_model(), SHARED if SHARED.is_dir() else None)
    model = AutoModelForSequenceClassification.from_pretrained(trained) if trained else task.dense(0)
    rows = [{name: value for name, value in row.items() if name != "labels"} for row in list(task.test)[:count]]
    batch = task.collate([{**row, "labels": 0} for row in rows])
    batch.pop("labels")
    return hfc.relevance(model, dict(batch), task.tokenizer)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(REFERENCE / "manuals-llama-12l"))
    parser.add_argument("--texts", nargs="+", default=TEXTS)
    parser.add_argument("--mrpc", nargs="?", const="", metavar="DIRECTORY")
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    logging.set_verbosity_error()
    found = {"relevance_llm": language_model(args.model, args.texts)}
    if args.mrpc is not None:
        found["relevance_mrpc"] = paraphrases(3, args.mrpc)
    for name, relevance in found.items():
        for suffix in (".html", ".png"):
            print(hfc.heatmap(relevance, args.output / f"{name}{suffix}"))


if __name__ == "__main__":
    main()
