"""ILLC on an encoder fine-tuned on MRPC and on a vision transformer: accuracy and outputs against the width of FFNs.

    python examples/illc_classifiers.py                      # both tasks, one seed; half of the hidden units
    python examples/illc_classifiers.py --task mrpc --full   # three seeds, widths 0.9 to 0.5

The models and tasks are those of layer_collapse_bert.py (which says where its data come from) and of
layer_collapse_vit.py. Nothing is trained after the compression. Beside accuracy stands the input-output unfaithfulness,
which says more: the mean squared distance of the class probabilities from the dense model's, on the test data.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from pathlib import Path
from statistics import mean, stdev

import torch
from collapse_columns import Task
from illc_columns import COLUMNS, DEFAULT
from layer_collapse_bert import SHARED as MRPC
from layer_collapse_bert import default_model, mrpc_task
from layer_collapse_vit import SHARED as CIFAR
from layer_collapse_vit import vit_task
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

import hf_compress as hfc
from hf_compress.evaluation.faithfulness import input_output_unfaithfulness
from hf_compress.report.stages import environment

RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"
TASKS: dict[str, Callable[[], Task]] = {
    "mrpc": lambda: mrpc_task(default_model(), MRPC if MRPC.is_dir() else None),
    "vit": lambda: vit_task(CIFAR if CIFAR.is_file() else None),
}
Rows = dict[tuple[str, float], tuple[float, float]]  # of one seed: accuracy and unfaithfulness, by column and width


@torch.no_grad()
def probabilities(task: Task, model: PreTrainedModel) -> Tensor:
    """Of the classes, on the test rows, (samples, classes)."""
    found = []
    for start in range(0, len(task.test), 64):
        batch = task.collate([task.test[i] for i in range(start, min(start + 64, len(task.test)))])
        batch.pop("labels")
        found.append(model(**batch).logits.softmax(-1))
    return torch.cat(found)


def run(task: Task, gammas: list[float], seed: int) -> Rows:
    """Every column at every width, for one trained model."""
    dense = task.dense(seed)
    expected = probabilities(task, dense)
    rows: Rows = {("dense", 1.0): (task.score(dense)["accuracy"], 0.0)}
    options = hfc.DataOptions(batch_size=64)
    for gamma in tqdm(gammas, desc="widths", disable=None):
        for name, settings in COLUMNS.items():
            config = hfc.ILLCConfig(gamma=gamma, **settings)
            model = hfc.compress(copy.deepcopy(dense), config, task.calibration, task.tokenizer, options)
            gap = input_output_unfaithfulness(probabilities(task, model), expected)
            rows[name, gamma] = (task.score(model)["accuracy"], gap)
            print(f"seed {seed}, {gamma:g}, {name}: {rows[name, gamma]}", flush=True)
    return rows


def table(runs: list[Rows], gammas: list[float]) -> str:
    """Accuracy, unfaithfulness, and by how much that is above the default's, in pairs where there are several seeds."""
    lines = [
        f"{len(runs)} seeds; dense accuracy {mean(one['dense', 1.0][0] for one in runs):.3f}. In each cell accuracy; "
        "input-output unfaithfulness (above the default's).",
        "",
        "| hidden units kept | " + " | ".join(f"{gamma:g}" for gamma in gammas) + " |",
        "|---" * (len(gammas) + 1) + "|",
    ]
    for name in COLUMNS:
        cells = []
        for gamma in gammas:
            accuracy, gap = (mean(one[name, gamma][i] for one in runs) for i in (0, 1))
            above = [one[name, gamma][1] - one[DEFAULT, gamma][1] for one in runs]
            error = f" ± {stdev(above) / len(above) ** 0.5:.4f}" if len(above) > 1 else ""
            cells.append(f"{accuracy:.3f}; {gap:.4f}" + (f" ({mean(above):+.4f}{error})" if name != DEFAULT else ""))
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--seeds", type=int, help="1 by default, 3 with --full")
    parser.add_argument("--full", action="store_true")
    args = parser.parse_args()
    gammas = [0.9, 0.8, 0.7, 0.6, 0.5] if args.full else [0.5]
    for name in args.task:
        task = TASKS[name]()
        runs = [run(task, gammas, seed) for seed in range(args.seeds or (3 if args.full else 1))]
        made = ", ".join(f"{key} {value}" for key, value in environment().items())
        command = f"python examples/illc_classifiers.py --task {name}" + " --full" * args.full
        text = f"{table(runs, gammas)}\n\nMade by `{command}` with {made}.\n"
        (RESULTS / f"illc_{name}.md").write_text(text)
        print(text, flush=True)


if __name__ == "__main__":
    main()
