"""Draw quality against size: the perplexities that `benchmarks/depth_quality.py` measured, as one picture.

    python benchmarks/quality_plot.py                                      # docs/img/quality.png, the README's

Nothing is measured here: the figures are those of benchmarks/results/NAME.json, and sizes are counted in the file of
the model's weights. The scale ends at --top; a rule that leaves it is named with the worst that it comes to.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

from common import REFERENCE, RESULTS, ROOT
from safetensors import safe_open

from hf_compress.report.canvas import BLUE, INK, VERMILION, new_figure, write_figure

OURS: dict[str, dict[str, Any]] = {
    "MKA (default)": {"color": BLUE, "linewidth": 2.5, "marker": "o"},
    "MKA (paper)": {"color": VERMILION, "linewidth": 1.8, "marker": "s"},
    "MKA (paper, CKA, alpha 0.5)": {"color": VERMILION, "linewidth": 1.2, "marker": "s", "linestyle": ":"},
}
CONTROL = {"color": "#7A828B", "linewidth": 1.0, "zorder": 1}
MARKERS = "v^D*x"


def shares_left(weights: Path, removed: list[int]) -> list[float]:
    """Share of the parameters that are left when so many blocks have gone, of a model whose blocks are all alike."""
    with safe_open(weights, "np") as file:
        sizes = {name: math.prod(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    block = sum(size for name, size in sizes.items() if name.startswith("model.layers.0."))
    return [1 - count * block / sum(sizes.values()) for count in removed]


def draw(results: dict[str, Any], weights: Path, top: float, output: Path) -> None:
    """Draw the held-out perplexity of every method at every size."""
    dense = results.pop("dense")["heldout"]
    sizes = sorted({int(size) for by_size in results.values() for size in by_size})
    removed = [0, *sizes]
    figure = new_figure(6.6, 3.4)
    axis = figure.add_subplot()
    markers = iter(MARKERS)
    for name, by_size in results.items():
        values = [dense, *(_mean([score["heldout"] for score in by_size[str(size)]]) for size in sizes)]
        label = name if max(values) <= top else f"{name} (up to {max(values):,.0f})"
        style = OURS.get(name) or {**CONTROL, "marker": next(markers)}
        axis.plot(removed, values, markersize=4, label=label, **style)
    axis.axhline(dense, color=INK, linewidth=1, linestyle="--", label=f"uncompressed: {dense:.1f}")
    axis.set(yscale="log", ylim=(0.95 * dense, top))
    ticks = [tick for tick in (20, 25, 30, 40, 50, 70, 100, 150, 200) if 0.95 * dense <= tick <= top]
    axis.set_yticks(ticks, [str(tick) for tick in ticks])
    axis.set_yticks([], minor=True)
    shares = shares_left(weights, removed)
    axis.set_xticks(removed, [f"{count}\n{share:.0%}" for count, share in zip(removed, shares, strict=True)])
    axis.set_xlabel("blocks removed, and share of the parameters left", fontsize=8)
    axis.set_ylabel("perplexity, held-out documents (log scale)", fontsize=8)
    axis.tick_params(labelsize=8)
    axis.grid(axis="y", color="#E5E8EB", linewidth=0.8)
    figure.legend(fontsize=7.5, frameon=False, loc="outside right upper")
    write_figure(figure, output)


def _mean(values: list[float]) -> float:
    """Of the perplexities of several seeds, as the table has it: that of their mean loss."""
    return math.exp(sum(map(math.log, values)) / len(values))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", default="depth_quality", help="which table of benchmarks/results")
    parser.add_argument("--model", type=Path, default=REFERENCE, help="the model that it is of")
    parser.add_argument("--top", type=float, default=200.0, help="the largest perplexity that is shown")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "img" / "quality.png", help=".png or .svg")
    args = parser.parse_args()
    results = json.loads((RESULTS / f"{args.name}.json").read_text(encoding="utf-8"))
    draw(results, args.model / "model.safetensors", args.top, args.output)
    print(f"Wrote {args.output}")


if __name__ == "__main__":
    main()
