"""ILLC and SpArX on the paper's own task: how faithful is a perceptron with its neurons merged to the one before?

    python examples/illc_breast_cancer.py                           # breast cancer, 10 seeds; some minutes
    python examples/illc_breast_cancer.py --data digits wine iris   # other tasks of scikit-learn
    python examples/illc_breast_cancer.py --full                    # all of them, 30 seeds

Perceptrons of 2 x 50, 5 x 100 and 20 x 100 ReLU neurons, trained by scikit-learn on four fifths of the data; neurons
are merged by what they do there, unfaithfulness is measured on the last fifth. SpArX clusters every layer on the
original network, ILLC on the compressed layers below. Differences are paired by seed, with standard errors.
"""

from __future__ import annotations

import argparse
import copy
import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from sklearn import datasets
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import train_test_split
from sklearn.neural_network import MLPClassifier
from sklearn.preprocessing import StandardScaler
from torch import Tensor
from tqdm.auto import tqdm

import hf_compress as hfc
from hf_compress.evaluation.faithfulness import activations, faithfulness, input_output_unfaithfulness
from hf_compress.models import DenseForClassification, from_scikit_learn
from hf_compress.report.canvas import new_figure, write_figure
from hf_compress.report.qbaf import draw_qbaf, qbaf
from hf_compress.report.stages import environment

RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"
LOADERS: dict[str, Callable[..., Any]] = {
    "breast_cancer": datasets.load_breast_cancer,
    "digits": datasets.load_digits,
    "wine": datasets.load_wine,
    "iris": datasets.load_iris,
}
SHAPES = {"2 × 50": (50,) * 2, "5 × 100": (100,) * 5, "20 × 100": (100,) * 20}
GAMMAS = (0.2, 0.5, 0.8)
METHODS: dict[str, dict[str, Any]] = {
    "SpArX": {"variant": "paper", "iterative": False},
    "ILLC": {"variant": "paper"},
    "SpArX + ridge": {"variant": "paper", "iterative": False, "compensation": "ridge"},
    "ILLC + ridge": {"variant": "paper", "compensation": "ridge"},
    "elimination + ridge (default)": {},
}
CLUSTERINGS = ("kmeans", "agglomerative")


@dataclass(frozen=True)
class Result:
    """Of one network: unfaithfulness, accuracy on the test data, and the structural part of each layer."""

    input_output: float
    structural: float | None
    accuracy: float
    layers: tuple[float, ...] = ()


Key = tuple[str, float, str, str]  # shape, gamma, clustering, method


@dataclass(frozen=True)
class Problem:
    """Training and test data of a seed, standardised by the training data."""

    train: Tensor
    train_labels: Any
    test: Tensor
    test_labels: Tensor
    names: list[str]
    classes: list[str]

    @staticmethod
    def of(name: str, seed: int) -> Problem:
        data = LOADERS[name]()
        train, test, before, after = train_test_split(
            data.data, data.target, test_size=0.2, random_state=seed, stratify=data.target
        )
        scaler = StandardScaler().fit(train)
        train, test = (torch.tensor(scaler.transform(part), dtype=torch.float32) for part in (train, test))
        return Problem(
            train, before, test, torch.tensor(after), list(data.feature_names), [str(c) for c in data.target_names]
        )

    def network(self, shape: tuple[int, ...], seed: int) -> DenseForClassification:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            trained = MLPClassifier(shape, random_state=seed, max_iter=300).fit(self.train.numpy(), self.train_labels)
        return from_scikit_learn(trained)

    def accuracy(self, model: DenseForClassification) -> float:
        return float((activations(model, self.test)[-1].argmax(dim=1) == self.test_labels).double().mean())

    def compressed(self, model: DenseForClassification, gamma: float, clustering: str, method: str) -> Any:
        config = hfc.ILLCConfig(gamma=gamma, clustering=clustering, **METHODS[method])
        options = hfc.DataOptions(batch_size=-(-len(self.train) // 8))
        return hfc.compress(copy.deepcopy(model), config, self.train, options=options)

    def result(self, model: DenseForClassification, smaller: Any) -> Result:
        blocks = smaller.compression_report.notes["blocks"]
        accuracy = self.accuracy(smaller)
        if "clusters" not in blocks[0]:
            probabilities = [activations(one, self.test)[-1] for one in (smaller, model)]
            return Result(input_output_unfaithfulness(*probabilities), None, accuracy)
        found = faithfulness(model, smaller, [block["clusters"] for block in blocks], self.test)
        return Result(found.input_output, found.structural, accuracy, found.layers)


def run(name: str, seed: int) -> dict[Key, Result]:
    """Every method, for one split and one network of each shape."""
    problem = Problem.of(name, seed)
    results: dict[Key, Result] = {}
    for label, shape in SHAPES.items():
        model = problem.network(shape, seed)
        results[label, 1.0, "", "dense"] = Result(0.0, 0.0, problem.accuracy(model))
        for gamma in GAMMAS:
            for clustering in CLUSTERINGS:
                for method in METHODS:
                    if "default" in method and clustering != CLUSTERINGS[0]:
                        continue  # it clusters nothing
                    smaller = problem.compressed(model, gamma, clustering, method)
                    results[label, gamma, clustering, method] = problem.result(model, smaller)
    return results


def table(runs: list[dict[Key, Result]]) -> str:
    lines = [
        "| network | kept | clusters by | method | input-output | difference from SpArX | structural | difference from "
        "SpArX | accuracy |",
        "|---" * 9 + "|",
    ]
    for shape in SHAPES:
        accuracy = mean(one[shape, 1.0, "", "dense"].accuracy for one in runs)
        lines.append(f"| {shape} | 1 | | dense | 0 | | 0 | | {accuracy:.3f} |")
        for gamma in GAMMAS:
            for clustering in CLUSTERINGS:
                for method in METHODS:
                    if (shape, gamma, clustering, method) in runs[0]:
                        lines.append(row(runs, (shape, gamma, clustering, method)))
    return "\n".join(lines)


def row(runs: list[dict[Key, Result]], key: Key) -> str:
    shape, gamma, clustering, method = key
    cells = [shape, f"{gamma:g}", "" if "default" in method else clustering, method]
    for field in ("input_output", "structural"):
        own = [getattr(one[key], field) for one in runs]
        base = [getattr(one[shape, gamma, clustering, "SpArX"], field) for one in runs]
        if own[0] is None:
            cells += ["", ""]
            continue
        cells += [f"{mean(own):.4f}", "" if method == "SpArX" else difference(own, base)]
    accuracy = mean(one[key].accuracy for one in runs)
    return "| " + " | ".join([*cells, f"{accuracy:.3f}"]) + " |"


def difference(own: list[float], base: list[float]) -> str:
    """Mean paired difference ± standard error, as a share of the old value, and of the new one."""
    gaps = [a - b for a, b in zip(own, base, strict=True)]
    error = stdev(gaps) / len(gaps) ** 0.5
    shares = f"{mean(gaps) / mean(base):+.1%}; {mean(gaps) / mean(own):+.1%}"
    return f"{mean(gaps):+.4f} ± {error:.4f} ({shares})"


def draw(runs: list[dict[Key, Result]], name: str, gamma: float = 0.2) -> None:
    """The structural unfaithfulness of each layer of the deepest networks."""
    figure = new_figure(7, 3.4)
    axis = figure.add_subplot()
    shape = list(SHAPES)[-1]
    for method in METHODS:
        layers = [one[shape, gamma, "kmeans", method].layers for one in runs if (shape, gamma, "kmeans", method) in one]
        if layers and layers[0]:
            curve = [mean(column) for column in zip(*layers, strict=True)]
            axis.plot(range(1, len(curve) + 1), curve, marker="o", markersize=3, label=method)
    axis.set_yscale("log")
    axis.set_xlabel(f"hidden layer of {shape}")
    axis.set_ylabel("mean |difference| of a unit\nfrom its cluster's mean")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=8)
    write_figure(figure, RESULTS / f"illc_{name}_layers.png")


def picture() -> None:
    """Two layers of 50 neurons, a tenth kept: few enough to look at."""
    problem = Problem.of("breast_cancer", 0)
    model = problem.network(SHAPES["2 × 50"], 0)
    smaller = problem.compressed(model, 0.1, "kmeans", "ILLC + ridge")
    graph = qbaf(smaller, problem.names, problem.classes)
    draw_qbaf(graph, RESULTS / "illc_qbaf.png", strongest=150, title="2 × 50 neurons merged to 2 × 5")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", choices=list(LOADERS), help="breast_cancer by default, all with --full")
    parser.add_argument("--seeds", type=int, help="10 by default, 30 with --full")
    parser.add_argument("--full", action="store_true")
    args = parser.parse_args()
    seeds = args.seeds or (30 if args.full else 10)
    given = " --full" * args.full + (f" --seeds {args.seeds}" if args.seeds else "")
    for name in args.data or (list(LOADERS) if args.full else ["breast_cancer"]):
        runs = [run(name, seed) for seed in tqdm(range(seeds), desc=name, disable=None)]
        made = ", ".join(f"{key} {value}" for key, value in environment().items())
        given_data = f" --data {name}" if name != "breast_cancer" or args.data else ""
        head = f"{name}, {seeds} seeds (split and network). In brackets: of the old value; of the new one.\n\n"
        text = (
            f"{head}{table(runs)}\n\nMade by `python examples/illc_breast_cancer.py{given_data}{given}` with {made}.\n"
        )
        (RESULTS / f"illc_{name}.md").write_text(text)
        rows = [
            {" ".join(map(str, key)): [r.input_output, r.structural, r.accuracy] for key, r in one.items()}
            for one in runs
        ]
        (RESULTS / f"illc_{name}.json").write_text(json.dumps(rows) + "\n")
        draw(runs, name)
        print(text, flush=True)
    picture()


if __name__ == "__main__":
    main()
