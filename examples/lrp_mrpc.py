"""LRP on an encoder fine-tuned on MRPC: accuracy and outputs against stored bytes, beside every control.

    python examples/lrp_mrpc.py                          # one seed; some 25 minutes on two cores, a third training
    python examples/lrp_mrpc.py --trained DIRECTORY      # of a model trained before
    python examples/lrp_mrpc.py --sizes paper "50%"      # some of the table; printed alone
    python examples/lrp_mrpc.py --full                   # three seeds, more sizes

Model and task are those of layer_collapse_bert.py, which says where its data come from. Nothing is trained after the
compression. In each cell: accuracy; the mean squared distance of the class probabilities from the dense model's, on the
test data (input-output unfaithfulness), which says more.
"""

from __future__ import annotations

import argparse
import copy
from statistics import mean
from typing import Any

from collapse_columns import save_table
from illc_classifiers import TASKS, probabilities
from lrp_llm import PAPER, PRECISION, PRUNING
from tqdm.auto import tqdm
from transformers import AutoModelForSequenceClassification

import hf_compress as hfc
from hf_compress.evaluation.faithfulness import input_output_unfaithfulness
from hf_compress.evaluation.size import stored_bytes

Row = tuple[float, float, float]  # accuracy, unfaithfulness, bytes over the dense model's


def groups(full: bool) -> dict[str, dict[str, dict[str, Any]]]:
    """Title -> column -> settings."""
    bits = (8.0, 4.25, 3.25, 2.75) if full else (4.25, 2.75)
    shares = (0.3, 0.5, 0.7) if full else (0.5,)
    return {
        "paper": PAPER,
        **{f"{number:g} bits": {n: s | {"bits": number} for n, s in PRECISION.items()} for number in bits},
        **{f"{share:.0%}": {n: s | {"sparsity": share} for n, s in PRUNING.items()} for share in shares},
    }


def run(seed: int, args: argparse.Namespace) -> dict[tuple[str, str], Row]:
    """Every column for one trained model."""
    task = TASKS["mrpc"]()
    trained = args.trained and AutoModelForSequenceClassification.from_pretrained(args.trained)
    dense = trained or task.dense(seed)
    expected, size = probabilities(task, dense), stored_bytes(dense)
    rows: dict[tuple[str, str], Row] = {("", "dense"): (task.score(dense)["accuracy"], 0.0, 1.0)}
    options = hfc.DataOptions(batch_size=64)
    for title, columns in tqdm(groups(args.full).items(), desc="sizes", disable=None):
        for name, settings in columns.items() if not args.sizes or title in args.sizes else ():
            config = hfc.LRPConfig(**settings)
            model = hfc.compress(copy.deepcopy(dense), config, task.calibration, task.tokenizer, options)
            gap = input_output_unfaithfulness(probabilities(task, model), expected)
            rows[title, name] = (task.score(model)["accuracy"], gap, stored_bytes(model) / size)
            print(f"seed {seed}, {title}, {name}: {rows[title, name]}", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, help="1 by default, 3 with --full")
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--trained", metavar="DIRECTORY")
    parser.add_argument("--sizes", nargs="+", help="such as paper, 4.25 bits, 50%%")
    args = parser.parse_args()
    if args.trained and (args.full or (args.seeds or 1) > 1):
        parser.error("--trained gives one model: leave out --full and --seeds")
    runs = [run(seed, args) for seed in range(args.seeds or (3 if args.full else 1))]
    lines = ["| | accuracy | unfaithfulness | bytes |", "|---|---|---|---|"]
    for key in runs[0]:
        cells = [mean(one[key][place] for one in runs) for place in range(3)]
        title = ": ".join(part for part in key if part)
        lines.append(f"| {title} | {cells[0]:.3f} | {cells[1]:.4f} | {cells[2]:.3f} |")
    text = "\n".join(lines)
    if args.sizes:
        print(text)
    else:
        save_table("lrp_mrpc", f"Seeds: {len(runs)}.\n\n{text}", "lrp_llm.py")


if __name__ == "__main__":
    main()
