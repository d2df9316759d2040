"""What lc, the weight of LayerCollapse's penalty, buys and costs: digits, three activations, a plot.

    python examples/layer_collapse_lc.py             # 5 seeds; some minutes on one core
    python examples/layer_collapse_lc.py --full      # 10 seeds, more values

All FFNs of a trained network take part in the paper's training, for each value of lc: how linear they become (the mean
of α, and how many are within the tolerance) and the accuracy once all of them are collapsed, however linear they are.
"""

from __future__ import annotations

import argparse
import copy
from statistics import mean

from collapse_columns import RESULTS, Task, save_table
from layer_collapse_digits import BLOCKS, KINDS, digits_task
from transformers import PreTrainedModel

import hf_compress as hfc
from hf_compress.report.canvas import new_figure

Row = tuple[float, float, float]  # mean α, FFNs within the tolerance, accuracy


def measure(task: Task, dense: list[PreTrainedModel], lc: float) -> Row:
    """Means over the seeds, from a dense model of each."""
    rows = []
    for seed, trained in enumerate(dense):
        model = copy.deepcopy(trained)
        config = hfc.LayerCollapseConfig(variant="paper", lc=lc, tolerance=1e9)  # collapse all, whatever α is
        callback = hfc.CompressionCallback(config, task.calibration, options=hfc.DataOptions(batch_size=64))
        task.fit(model, task.again, task.learning_rate_again, seed, callback)
        alphas = [step["alpha"] for step in model.compression_report.notes["collapsed"]]
        near = sum(abs(1 - alpha) < hfc.LayerCollapseConfig(num_layers=1).tolerance for alpha in alphas)
        rows.append((mean(alphas), float(near), task.score(model)["accuracy"]))
    return tuple(mean(column) for column in zip(*rows, strict=True))  # type: ignore[return-value]


def draw(rows: dict[str, list[Row]], values: list[float]) -> None:
    figure = new_figure(7, 3.2)
    for place, label in ((0, "mean α after training"), (2, "accuracy, all collapsed")):
        axis = figure.add_subplot(1, 2, 1 if place == 0 else 2)
        for name, results in rows.items():
            axis.plot(values, [row[place] for row in results], marker="o", markersize=4, label=name)
        axis.set_xscale("log")
        axis.set_xlabel("lc")
        axis.set_ylabel(label)
        axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)
    figure.savefig(RESULTS / "layer_collapse_lc.svg", metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, help="5 by default, 10 with --full")
    parser.add_argument("--full", action="store_true")
    args = parser.parse_args()
    seeds = args.seeds or (10 if args.full else 5)
    values = [0.001, 0.01, 0.1, 1.0, 3.0, 10.0, 30.0, 100.0] if args.full else [0.01, 0.1, 1.0, 10.0, 100.0]
    rows: dict[str, list[Row]] = {}
    lines = [f"{seeds} seeds; all {BLOCKS} FFNs.", "", "| activation | lc | mean α | linear FFNs | accuracy |"]
    lines.append("|---|---|---|---|---|")
    for name, (activation, gated) in KINDS.items():
        task = digits_task(activation, gated)
        dense = [task.dense(seed) for seed in range(seeds)]
        accuracy = mean(task.score(model)["accuracy"] for model in dense)
        lines.append(f"| {name} | dense | | | {accuracy:.3f} |")
        rows[name] = [measure(task, dense, lc) for lc in values]
        lines += [
            f"| | {lc:g} | {a:.3f} | {n:.1f} | {s:.3f} |" for lc, (a, n, s) in zip(values, rows[name], strict=True)
        ]
    draw(rows, values)
    save_table("layer_collapse_lc", "\n".join(lines))


if __name__ == "__main__":
    main()
