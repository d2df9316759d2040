"""What ILLC costs: compress() over one plain forward pass, and how the choice of units grows with an FFN's width.

    python benchmarks/illc_cost.py           # widths 512 to 4,096
    python benchmarks/illc_cost.py --full    # to 14,336, as in Llama 3 8B; more repetitions

The first table is measured in pairs with plain passes, as in mka_cost.py. The second times the choice alone, to half
the width, on random activations of low rank with noise (2,048 tokens): the seconds are of this machine, the growth is
not.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from statistics import median

import torch
from common import REFERENCE, calibration_windows, cost_ratios, load, seconds, write_result
from torch import Tensor
from tqdm.auto import tqdm

from hf_compress import ILLCConfig
from hf_compress.numerics.clustering import AGGLOMERATIVE_LIMIT, cluster
from hf_compress.numerics.elimination import eliminate
from hf_compress.numerics.ridge import LeastSquares

TOKENS = 2048
RANK = 64
OUTPUTS = 1024
LIMITS = {"agglomerative": AGGLOMERATIVE_LIMIT, "kmeans": 4096}  # widths; at twice as many, k-means takes minutes
CONFIGS = {
    "default (elimination + ridge)": {},
    "variance + ridge": {"reduction": "variance"},
    "clusters, k-means (paper)": {"variant": "paper"},
    "clusters, agglomerative (paper)": {"variant": "paper", "clustering": "agglomerative"},
}


def activations(width: int) -> Tensor:
    """(tokens, width): what hidden units with much in common could look like."""
    generator = torch.Generator().manual_seed(0)
    shared = torch.randn(TOKENS, RANK, generator=generator) @ torch.randn(RANK, width, generator=generator)
    return (shared + 0.5 * RANK**0.5 * torch.randn(TOKENS, width, generator=generator)).clamp(min=0)


def by_elimination(rows: Tensor) -> None:
    sums = LeastSquares(rows.shape[1], OUTPUTS, dtype=torch.float32)
    sums.update(rows, rows @ torch.randn(rows.shape[1], OUTPUTS, generator=torch.Generator().manual_seed(1)))
    eliminate(sums, rows.shape[1] // 2)


def by_clusters(algorithm: str) -> Callable[[Tensor], None]:
    def choose(rows: Tensor) -> None:
        cluster(rows.T, rows.shape[1] // 2, algorithm)

    return choose


CHOICES = {
    "elimination": by_elimination,
    **{name: by_clusters(name) for name in ("minibatch_kmeans", "neighbors", "agglomerative", "kmeans")},
}


def time_of_compress(samples: int, repeats: int) -> None:
    """The first table."""
    _, tokenizer = load(REFERENCE)
    windows = calibration_windows(tokenizer, samples)
    lines = ["| compress() with | time over one plain pass: median (least, most) |", "|---|---|"]
    data = {}
    for name, settings in CONFIGS.items():
        data[name] = cost_ratios(REFERENCE, ILLCConfig(gamma=0.7, **settings), windows, repeats)
        lines.append(f"| {name} | {median(data[name]):.1f} ({min(data[name]):.1f}, {max(data[name]):.1f}) |")
    write_result("illc_cost", "\n".join(lines), data)


def time_to_choose(widths: list[int]) -> None:
    """The second table."""
    lines = ["| seconds to choose half of | " + " | ".join(f"{width:,}" for width in widths) + " |"]
    lines.append("|---" * (len(widths) + 1) + "|")
    data = {}
    for name, choose in CHOICES.items():
        cells = []
        for width in tqdm(widths, desc=name, disable=None):
            if width > LIMITS.get(name, width):
                cells.append("refused" if name == "agglomerative" else "not tried")
                continue
            rows = activations(width)
            data[f"{name} {width}"] = seconds(lambda rows=rows, choose=choose: choose(rows))  # type: ignore[misc]
            cells.append(f"{data[f'{name} {width}']:.1f}")
            print(f"{name} {width}: {cells[-1]} s", flush=True)
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    write_result("illc_choice", "\n".join(lines), data)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=("compress", "choose"), help="one table alone")
    parser.add_argument("--samples", type=int, default=64, help="calibration windows of 256 tokens")
    parser.add_argument("--full", action="store_true")
    args = parser.parse_args()
    if args.part != "choose":
        time_of_compress(args.samples, 5 if args.full else 3)
    if args.part != "compress":
        time_to_choose([512, 1024, 2048, 4096, *([8192, 14336] if args.full else [])])


if __name__ == "__main__":
    main()
