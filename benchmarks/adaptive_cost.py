"""What fitting bottlenecks costs: tokens a second with three of them, over those of the bare forward pass.

    python benchmarks/adaptive_cost.py               # some four minutes on two cores

A forward pass over the windows and a fit on them take turns; a pair gives a ratio. "whole" is `fit` with all that it
does, the pass for means and principal directions included, which does not grow with the data; "a further pass" is what
two more epochs add, by pass: the throughput of long runs. The fit's own passes end after the last bottleneck; nothing
is kept on disk.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from statistics import median

import torch
from common import REFERENCE, calibration_windows, load, plain_pass, seconds, write_result

import hf_compress as hfc

VARIANTS = {
    "default": {},
    "default, without correlations": {"contrastive": 0.0},
    "paper": {"variant": "paper"},
    "TopK, 4 × the width, 5% active": {"variant": "topk", "retention_final": 0.05},
}
PLACES = {"a quarter, half, three quarters deep": (2, 5, 8), "the last three blocks": (9, 10, 11)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=96, help="windows of 256 tokens, in batches of 8")
    parser.add_argument("--pairs", type=int, default=3)
    args = parser.parse_args()
    lines = ["| model's dtype | places | bottlenecks | whole | a further pass (least, most) |", "|---|---|---|---|---|"]
    data: dict[str, object] = {}
    for dtype in (torch.float32, torch.bfloat16):
        model, tokenizer = load(REFERENCE)
        model = model.to(dtype)
        windows = calibration_windows(tokenizer, args.samples)
        plain_pass(model, windows)
        for place, layers in PLACES.items():
            for name, settings in VARIANTS.items():
                config = hfc.AdaptiveCompressConfig(layers=layers, **settings)
                whole, further = [], []
                for _ in range(args.pairs):
                    bare = seconds(lambda: plain_pass(model, windows))  # noqa: B023  it runs at once
                    once = seconds(lambda: hfc.fit(model, config, windows))  # noqa: B023
                    thrice = seconds(lambda: hfc.fit(model, replace(config, epochs=3), windows))  # noqa: B023
                    bare = (bare + seconds(lambda: plain_pass(model, windows))) / 2  # noqa: B023
                    whole.append(bare / once)
                    further.append(2 * bare / (thrice - once))
                shown = f"{median(further):.2f} ({min(further):.2f}, {max(further):.2f})"
                kind = str(dtype).removeprefix("torch.")
                lines.append(f"| {kind} | {place} | {name} | {median(whole):.2f} | {shown} |")
                data[f"{kind}, {place}, {name}"] = {"whole": whole, "further": further}
                print(lines[-1], flush=True)
    write_result("adaptive_cost", "\n".join(lines), data)


if __name__ == "__main__":
    main()
