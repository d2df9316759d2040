"""What fitting bottlenecks costs: tokens a second with three of them, over those of the bare forward pass.

    python benchmarks/adaptive_cost.py               # some ten minutes on two cores

A forward pass over the windows and a fit on them take turns; a pair gives a ratio. "whole" is `fit` with all that it
does, the pass for means and principal directions included, whose tokens are learnt from; "a further pass" is what two
more epochs add, by pass, when nothing is kept of the first: the throughput of long runs, which read most batches once.
The fit's own passes end after the last bottleneck.

Where EleutherAI's sparsify is installed (`pip install --no-deps eai-sparsify einops natsort simple-parsing
docstring-parser schedulefree`), it trains dictionaries of the same size behind the same blocks on the same windows,
with one update a batch, as ours do in the line before it; of a further pass, too.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import replace
from io import StringIO
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from common import REFERENCE, calibration_windows, load, plain_pass, seconds, write_result
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel

import hf_compress as hfc
from hf_compress.calibration.memory import WorkingMemory, working_within

try:
    import sparsify
except ImportError:
    sparsify = None

VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "default, without correlations": {"contrastive": 0.0},
    "paper": {"variant": "paper"},
    "TopK, 4 × the width, 5% active": {"variant": "topk", "retention_final": 0.05},
    "… one update a batch": {"variant": "topk", "retention_final": 0.05, "updates": 1},
}

PEER = "sparsify: the same"
LAYERS = (2, 5, 8)  # of twelve


def peer(model: PreTrainedModel, windows: Tensor, layers: tuple[int, ...], epochs: int) -> None:
    """sparsify's training of the last of `VARIANTS`."""
    hidden = model.config.hidden_size
    coder = sparsify.SparseCoderConfig(expansion_factor=4, k=math.ceil(0.05 * hidden))
    with TemporaryDirectory() as folder, redirect_stdout(StringIO()):
        settings = sparsify.TrainConfig(
            sae=coder,
            batch_size=8,
            layers=list(layers),
            optimizer="adam",
            log_to_wandb=False,
            save_dir=folder,
            save_every=10**9,
            auxk_alpha=1 / 32,
        )
        rows = Dataset.from_dict({"input_ids": windows.repeat(epochs, 1).tolist()}).with_format("torch")
        sparsify.Trainer(settings, rows, model).fit()


def fits(model: PreTrainedModel, windows: Tensor, layers: tuple[int, ...]) -> dict[str, Callable[[int], object]]:
    """By name, what fits bottlenecks for so many epochs."""

    def ours(config: hfc.AdaptiveCompressConfig) -> Callable[[int], object]:
        return lambda epochs: hfc.fit(model, replace(config, epochs=epochs), windows)

    found = {name: ours(hfc.AdaptiveCompressConfig(layers=layers, **settings)) for name, settings in VARIANTS.items()}
    if sparsify is not None:
        found[PEER] = lambda epochs: peer(model, windows, layers, epochs)
    return found


def ratios(model: PreTrainedModel, windows: Tensor, fit: Callable[[int], object], pairs: int) -> dict[str, list[float]]:
    """Throughput over the bare forward pass's of a whole fit of one epoch, and of a further pass."""
    found: dict[str, list[float]] = {"whole": [], "further": []}
    for _ in range(pairs):
        bare = seconds(lambda: plain_pass(model, windows))
        whole = seconds(lambda: fit(1))
        with working_within(WorkingMemory(streams=0)):
            once, thrice = seconds(lambda: fit(1)), seconds(lambda: fit(3))
        bare = (bare + seconds(lambda: plain_pass(model, windows))) / 2
        found["whole"].append(bare / whole)
        found["further"].append(2 * bare / (thrice - once))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=16, help="windows of 256 tokens, in batches of 8")
    parser.add_argument("--pairs", type=int, default=3)
    args = parser.parse_args()
    lines = ["| model's dtype | bottlenecks | whole | a further pass (least, most) |", "|---|---|---|---|"]
    data: dict[str, object] = {}
    for dtype in (torch.float32, torch.bfloat16):
        model, tokenizer = load(REFERENCE)
        model = model.to(dtype)
        windows = calibration_windows(tokenizer, args.samples)
        plain_pass(model, windows)
        for name, fit in fits(model, windows, LAYERS).items():
            own = ratios(model, windows, fit, args.pairs)
            further = own["further"]
            shown = f"{median(further):.2f} ({min(further):.2f}, {max(further):.2f})"
            kind = str(dtype).removeprefix("torch.")
            lines.append(f"| {kind} | {name} | {median(own['whole']):.2f} | {shown} |")
            data[f"{kind}, {name}"] = own
            print(lines[-1], flush=True)
    write_result("adaptive_cost", "\n".join(lines), data)


if __name__ == "__main__":
    main()
