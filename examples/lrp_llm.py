"""LRP on a language model: perplexity and cloze accuracy against stored bytes, beside every control.

    python examples/lrp_llm.py                                  # the bundled 11 M model; some 20 minutes on two cores
    python examples/lrp_llm.py --full                           # more sizes: 2.5 to 8 bits, 30 to 70% left out
    python examples/lrp_llm.py --model gpt2 --calibration my_calibration.jsonl --heldout my_heldout.jsonl

"Bits" are all that the blocks' linear maps store (masks, steps, zeros, numbers of bits) over their number of weights.
For the bundled model the tables and a plot go to benchmarks/results/, and the card of one model to model_cards/.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from itertools import cycle
from pathlib import Path
from typing import Any

from llm import REFERENCE, Task, accuracy, arguments, publish, task_of
from transformers import PreTrainedModel

import hf_compress as hfc
from hf_compress.evaluation.size import stored_bytes
from hf_compress.report.canvas import new_figure, write_figure
from hf_compress.report.stages import environment

RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"
DEFAULT = "LRP (default)"
Columns = dict[str, dict[str, Any]]
PRUNING: Columns = {
    DEFAULT: {},
    "tempered relevance, not solved": {"compensation": "none"},
    "E abs(R), not solved": {"temper": 1.0, "compensation": "none"},
    "Wanda": {"score": "wanda", "scope": "row", "compensation": "none"},
    "Wanda, solved (SparseGPT-like)": {"score": "wanda", "scope": "row"},
    "magnitude": {"score": "magnitude", "compensation": "none"},
    "magnitude, solved": {"score": "magnitude"},
    "random": {"score": "random", "compensation": "none"},
}
PRECISION: Columns = {
    DEFAULT: {},
    "Fisher information, to nearest": {"rounding": "nearest"},
    "relevance, compensated": {"allocation": "relevance"},
    "error alone, compensated": {"allocation": "error"},
    "uniform, compensated (GPTQ)": {"allocation": "uniform"},
    "uniform, to nearest": {"allocation": "uniform", "rounding": "nearest"},
}
WHOLE_BITS = "4.75 bits"
WHOLE: Columns = {  # what save_compressed_tensors writes for others' kernels
    DEFAULT: {},
    "4 or 8 bits for each map": {"per": "module"},
    "uniform, compensated (GPTQ)": {"allocation": "uniform"},
}
PAPER: Columns = {
    "weights with R ≤ 0 left out": {"variant": "paper"},
    "random, as many": {"sparsity": 0.5, "score": "random", "compensation": "none"},
    "neurons with R ≤ 0 left out": {"variant": "paper", "granularity": "neuron"},
    "8 and 4 bits by the median": {"variant": "paper", "prune": False, "split": (8, 4)},
}


@dataclass(frozen=True)
class Scored:
    """A compressed model's scores, and its stored bytes over the dense model's."""

    result: hfc.EvaluationResult
    share: float


class Scores:
    """The scores of models by what was done to them; the dense one's first."""

    def __init__(self, task: Task) -> None:
        self.task = task
        dense = task.fresh()
        self.size = stored_bytes(dense)
        self.dense = Scored(task.score(dense), 1.0)
        self.all: dict[tuple[str, str], Scored] = {}

    def add(self, title: str, name: str, settings: dict[str, Any]) -> PreTrainedModel:
        task = self.task
        model = hfc.compress(task.fresh(), hfc.LRPConfig(**settings), task.calibration, task.tokenizer)
        self.all[title, name] = Scored(task.score(model), stored_bytes(model) / self.size)
        print(f"{title}, {name}: {self.all[title, name].result.perplexity}", flush=True)
        return model

    def table(self, columns: Columns, titles: list[str]) -> str:
        lines = ["| | " + " | ".join(titles) + " |", "|---" * (len(titles) + 1) + "|"]
        sizes = [f"{next(s.share for (t, _), s in self.all.items() if t == title):.3f}" for title in titles]
        lines.append("| stored bytes | " + " | ".join(sizes) + " |")
        for name in columns:
            lines.append(f"| {name} | " + " | ".join(self._cell(title, name) for title in titles) + " |")
        return "\n".join(lines)

    def _cell(self, title: str, name: str) -> str:
        own = self.all[title, name].result
        text = f"{own.perplexity.value:.2f}"
        if name != DEFAULT and (title, DEFAULT) in self.all:
            gap, error = own.perplexity.loss_difference(self.all[title, DEFAULT].result.perplexity)
            text += f" ({gap:+.4f} ± {error:.4f})"
        return f"{text}, {accuracy(own)}"


def plot(scores: Scores, path: Path) -> None:
    """Perplexity against stored bytes, a line for each column."""
    figure = new_figure(8, 5)
    axes = figure.add_subplot()
    markers = cycle("osD^vP*Xph<>8d")
    for columns, kind in ((PRECISION, "bits"), (PRUNING, "pruned")):
        for name in columns:
            points = sorted(
                (found.share, found.result.perplexity.value)
                for (title, column), found in scores.all.items()
                if column == name and title.endswith("bits" if kind == "bits" else "%") and title != WHOLE_BITS
            )
            axes.plot(*zip(*points, strict=True), marker=next(markers), label=f"{kind}: {name}", linewidth=1)
    axes.axhline(scores.dense.result.perplexity.value, color="black", linewidth=0.8, linestyle=":")
    axes.set(xlabel="stored bytes over the dense model's", ylabel="perplexity", yscale="log")
    axes.legend(fontsize=7)
    write_figure(figure, path)


def main() -> None:
    parser = arguments(__doc__, "manuals-llama-lrp")
    args = parser.parse_args()
    task = task_of(args)
    bits = [8.0, 6.0, 4.25, 3.25, 2.75, 2.5] if args.full else [4.25, 2.75]
    shares = [0.3, 0.5, 0.6, 0.7] if args.full else [0.5, 0.7]
    task = replace(task.shortened(), questions=100)
    scores = Scores(task)
    saved = None
    for name, settings in PAPER.items():
        scores.add("paper", name, settings)
    for number in bits:
        for name, settings in PRECISION.items():
            model = scores.add(f"{number:g} bits", name, settings | {"bits": number})
            saved = model if name == DEFAULT and number == 4.25 else saved
    for name, settings in WHOLE.items():
        scores.add(WHOLE_BITS, name, settings | {"bits": 4.75})
    for share in shares:
        for name, settings in PRUNING.items():
            scores.add(f"{share:.0%}", name, settings | {"sparsity": share})
    dense = scores.dense.result
    text = "\n".join(
        [
            f"Perplexity on {dense.perplexity.documents} held-out documents, {dense.perplexity.tokens:,} tokens; "
            f"uncompressed: {dense.perplexity}, cloze accuracy {accuracy(dense)}. Loss differences from the default in "
            "nats, paired by document; then cloze accuracy.\n",
            scores.table(PRECISION, [f"{number:g} bits" for number in bits]) + "\n",
            scores.table(WHOLE, [WHOLE_BITS]) + "\n",
            scores.table(PRUNING, [f"{share:.0%}" for share in shares]) + "\n",
            scores.table(PAPER, ["paper"]),
        ]
    )
    print(text)
    if args.model is None and args.calibration == REFERENCE / "calibration.jsonl":
        made = ", ".join(f"{key} {value}" for key, value in environment().items())
        command = "python examples/lrp_llm.py" + " --full" * args.full
        (RESULTS / "lrp_llm.md").write_text(f"{text}\n\nMade by `{command}` with {made}.\n")
        values = {f"{t}, {n}": [s.share, s.result.perplexity.value] for (t, n), s in scores.all.items()}
        (RESULTS / "lrp_llm.json").write_text(json.dumps(values, indent=1) + "\n")
        plot(scores, RESULTS / "lrp_llm.svg")
    names = ("uniform, compensated (GPTQ)", "uniform, to nearest")
    controls = {"uncompressed": dense, **{name: scores.all["4.25 bits", name].result for name in names}}
    assert saved is not None
    publish(task, saved, args, parser, lambda: controls)


if __name__ == "__main__":
    main()
