"""LRP on dense ReLU networks: pruning against its controls at the same sparsity, mixed precision at the same bytes.

    python examples/lrp_dense.py            # 3 × 300 hidden units, ten seeds; about five minutes on two cores
    python examples/lrp_dense.py --full     # and the paper's 3 × 1,000; an hour and a half more

Data: scikit-learn's digits, and `make_classification` (6 classes, 40 features of which 20 tell something, seeded): the
paper's "multi" set is not public. Accuracies are on a held-out part, differences from the default's in pairs. "Bytes"
are those of the whole file's tensors over the dense model's, masks, scales and numbers of bits included.
"""

from __future__ import annotations

import argparse
import copy
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from statistics import mean, stdev
from typing import Any

import torch
from collapse_columns import save_table
from sklearn.datasets import load_digits, make_classification
from sklearn.model_selection import train_test_split
from torch import Tensor
from tqdm.auto import tqdm

import hf_compress as hfc
from hf_compress.evaluation.size import stored_bytes

Config = dict[str, Any]
Row = tuple[float, float]  # accuracy, bytes
SHARES = (0.5, 0.7, 0.8, 0.9)
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
UNIFORM = {"allocation": "uniform", "rounding": "nearest"}


def weights(sparsity: float) -> dict[str, Config]:
    """Single weights, a share of each layer's."""
    plain: Config = {"sparsity": sparsity, "compensation": "none"}
    return {
        "default": {"sparsity": sparsity},
        "relevance, tempered": plain,
        "relevance, E abs(R)": plain | {"temper": 1.0},
        "Wanda": plain | {"score": "wanda", "scope": "row"},
        "Wanda, solved": {"sparsity": sparsity, "score": "wanda", "scope": "row"},
        "magnitude": plain | {"score": "magnitude"},
        "magnitude, solved": {"sparsity": sparsity, "score": "magnitude"},
        "random": plain | {"score": "random"},
    }


def neurons(sparsity: float) -> dict[str, Config]:
    """Hidden units, a share of each layer's."""
    solved: Config = {"sparsity": sparsity, "granularity": "neuron"}
    plain = solved | {"compensation": "none"}
    return {
        "default": solved,
        "relevance, E abs(R)": plain,
        "Wanda": plain | {"score": "wanda"},
        "Wanda, solved": solved | {"score": "wanda"},
        "magnitude": plain | {"score": "magnitude"},
        "magnitude, solved": solved | {"score": "magnitude"},
        "random": plain | {"score": "random"},
    }


def precision(bits: float) -> dict[str, Config]:
    """So many bits a weight, all counted."""
    return {
        "default": {"bits": bits},
        "default, to nearest": {"bits": bits, "rounding": "nearest"},
        "relevance": {"bits": bits, "allocation": "relevance"},
        "error alone": {"bits": bits, "allocation": "error"},
        "uniform, compensated (GPTQ)": {"bits": bits, "allocation": "uniform"},
        "uniform, to nearest": {"bits": bits, **UNIFORM},
    }


PAPER = {
    "weights with R ≤ 0 left out": {"variant": "paper"},
    "neurons with R ≤ 0 left out": {"variant": "paper", "granularity": "neuron"},
    "8 and 4 bits by the median": {"variant": "paper", "prune": False, "split": (8, 4)},
    "neurons, then 16 and 8 bits": {"variant": "paper", "granularity": "neuron", "split": (16, 8)},
    "neurons, then 8 and 4 bits": {"variant": "paper", "granularity": "neuron", "split": (8, 4)},
}
BOTH = {
    "a third of the neurons out, 8 bits": {"sparsity": 1 / 3, "granularity": "neuron", "bits": 8.0},
    "a third of the neurons out, 4.25 bits": {"sparsity": 1 / 3, "granularity": "neuron", "bits": 4.25},
    "half of the neurons out, 4.25 bits": {"sparsity": 0.5, "granularity": "neuron", "bits": 4.25},
    "half of the weights out, 3 bits": {"sparsity": 0.5, "bits": 3.0},
}
GROUPS: dict[str, dict[str, Config]] = {
    "The paper's rules": PAPER,
    **{f"{share:.0%} of the weights out": weights(share) for share in SHARES},
    **{f"{share:.0%} of the neurons out": neurons(share) for share in (1 / 3, 0.5, 0.7)},
    **{f"{bits:g} bits a weight": precision(bits) for bits in (4.25, 3.25, 2.75)},
    "Both": BOTH,
}


@dataclass(frozen=True)
class Problem:
    """Samples (samples, features) and their classes, for training and for tests."""

    x: Tensor
    y: Tensor
    x_test: Tensor
    y_test: Tensor


def problem(name: str, seed: int) -> Problem:
    if name == "digits":
        x, y = load_digits(return_X_y=True)
        x = x / 16
    else:
        x, y = make_classification(3000, 40, n_informative=20, n_classes=6, class_sep=1.5, random_state=0)
    parts = train_test_split(x, y, test_size=0.3, random_state=seed)
    x, x_test = (torch.tensor(part, dtype=torch.float32) for part in parts[:2])
    y, y_test = (torch.tensor(part) for part in parts[2:])
    return Problem(x, y, x_test, y_test)


def trained(data: Problem, width: int, seed: int) -> hfc.DenseForClassification:
    """Three blocks of a hidden layer each, trained by Adam."""
    torch.manual_seed(seed)
    sizes = {"input_size": data.x.shape[1], "hidden_size": width, "intermediate_size": width, "num_hidden_layers": 3}
    model = hfc.DenseForClassification(hfc.DenseConfig(**sizes, num_labels=int(data.y.max()) + 1))
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for _ in range(15):
        for rows in torch.randperm(len(data.x)).split(64):
            optimizer.zero_grad()
            model(input_values=data.x[rows], labels=data.y[rows]).loss.backward()
            optimizer.step()
    return model.eval()


@torch.no_grad()
def accuracy(model: hfc.DenseForClassification, data: Problem) -> float:
    return float((model(input_values=data.x_test).logits.argmax(-1) == data.y_test).double().mean())


def run(name: str, width: int, seed: int) -> dict[tuple[str, str], Row]:
    """Every row of the tables for one split and one network."""
    data = problem(name, seed)
    dense = trained(data, width, seed)
    size = stored_bytes(dense)
    calibration = {"input_values": data.x, "labels": data.y}
    rows = {("", "dense"): (accuracy(dense, data), 1.0)}
    for title, group in GROUPS.items():
        for label, settings in group.items():
            config = hfc.LRPConfig(**{"seed": seed, **settings})
            options = hfc.DataOptions(batch_size=64)
            model = hfc.compress(copy.deepcopy(dense), config, calibration, options=options)
            rows[title, label] = (accuracy(model, data), stored_bytes(model) / size)
    return rows


def runs(name: str, width: int, args: argparse.Namespace) -> list[dict[tuple[str, str], Row]]:
    """One for each seed, several at once, each with its share of the cores."""
    threads = max(1, CORES // args.jobs)
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(args.jobs, spawn, initializer=torch.set_num_threads, initargs=(threads,)) as pool:
        found = pool.map(partial(run, name, width), range(args.seeds))
        return list(tqdm(found, total=args.seeds, desc=f"{name}, 3 × {width}", disable=None))


def table(rows: list[dict[tuple[str, str], Row]]) -> str:
    def column(key: tuple[str, str], place: int) -> list[float]:
        return [one[key][place] for one in rows]

    dense = column(("", "dense"), 0)
    lines = [f"Dense: {mean(dense):.4f} ± {_error(dense):.4f}", ""]
    lines += ["| | accuracy | from dense | from the default | bytes |", "|---|---|---|---|---|"]
    for title, label in list(rows[0])[1:]:
        own = column((title, label), 0)
        cells = [f"{mean(own):.4f}", _difference(own, dense)]
        cells.append(_difference(own, column((title, "default"), 0)) if "default" in GROUPS[title] else "")
        lines.append(f"| {title}: {label} | " + " | ".join([*cells, f"{mean(column((title, label), 1)):.3f}"]) + " |")
    return "\n".join(lines)


def _difference(own: list[float], other: list[float]) -> str:
    gaps = [a - b for a, b in zip(own, other, strict=True)]
    return f"{mean(gaps):+.4f} ± {_error(gaps):.4f}"


def _error(values: list[float]) -> float:
    return stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--jobs", type=int, default=CORES, help="seeds at once; as many as cores")
    parser.add_argument("--full", action="store_true", help="3 × 1,000 hidden units too")
    args = parser.parse_args()
    if args.jobs < 1 or args.seeds < 1:
        parser.error(f"--jobs and --seeds must be 1 or more; got {args.jobs} and {args.seeds}")
    parts = []
    for width in (300, 1000) if args.full else (300,):
        for name in ("digits", "multi"):
            parts += [f"\n## {name}, 3 × {width}, {args.seeds} seeds\n", table(runs(name, width, args))]
            print("\n".join(parts[-2:]), flush=True)
    save_table("lrp_dense", "\n".join(parts), "lrp_dense.py")


if __name__ == "__main__":
    main()
