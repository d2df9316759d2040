"""What scoring by relevance costs: time and peak memory over an ordinary forward and backward pass on the same batches.

    python benchmarks/lrp_cost.py                # some three minutes on two cores

Scoring (E |R| of every weight of the blocks' linear maps, per sample) and the ordinary pass (the gradient of the loss
at all parameters) take turns; a pair gives a ratio. Peak memory is that of a process of its own for each, beyond what
it had when the model and the data were loaded, sampled every millisecond; the score tensors, one float32 a weight,
are part of it. Scoring begins with the check that the rules cover the model, a pass over one batch more.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from statistics import median
from threading import Event, Thread

import torch
from common import REFERENCE, calibration_windows, load, seconds, write_result
from torch import Tensor
from transformers import PreTrainedModel

from hf_compress.anatomy.anatomy import Anatomy
from hf_compress.attribution.passes import check_conserved
from hf_compress.attribution.scores import relevance_sums
from hf_compress.calibration.data import Batch, prepare
from hf_compress.methods.lrp.linears import block_linears

MEBIBYTE = 2**20


def batches_of(model: PreTrainedModel, windows: Tensor) -> list[Batch]:
    return list(prepare(windows, model, None))


def ordinary(model: PreTrainedModel, batches: list[Batch]) -> None:
    """Gradients of the loss at all parameters, as in a step of training."""
    for batch in batches:
        ids = batch.inputs["input_ids"].long()
        model.zero_grad()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()


def scoring(model: PreTrainedModel, batches: list[Batch]) -> int:
    """Scores of all weights in the blocks; the bytes that they take."""
    sums = relevance_sums(model, batches, block_linears(Anatomy(model).stack()), target="label", signed=False)
    return sum(values.nbytes for values in sums.absolute.values())


def prepared(samples: int, dtype: torch.dtype) -> tuple[PreTrainedModel, list[Batch]]:
    model, tokenizer = load(REFERENCE)
    model = model.to(dtype)
    return model, batches_of(model, calibration_windows(tokenizer, samples))


def peak(work: str, samples: int, dtype: str) -> tuple[float, float]:
    """Peak memory of one kind of work in a process of its own, and of its score tensors, in MiB."""
    command = [sys.executable, __file__, "--samples", str(samples), "--dtype", dtype, "--worker", work]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    return float(lines[-2]), float(lines[-1])


def worker(work: str, samples: int, dtype: torch.dtype) -> None:
    model, batches = prepared(samples, dtype)
    before, seen, done = resident(), [], Event()

    def watch() -> None:
        while not done.wait(0.001):
            seen.append(resident())

    watcher = Thread(target=watch)
    watcher.start()
    scores = scoring(model, batches) if work == "scoring" else ordinary(model, batches)
    done.set()
    watcher.join()
    print((max(seen) - before) / MEBIBYTE, (scores or 0) / MEBIBYTE)


def resident() -> int:
    """Bytes of this process that are in memory (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=64, help="windows of 256 tokens, in batches of 8")
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--dtype", help="float32 or bfloat16; both by default")
    parser.add_argument("--worker", choices=("scoring", "ordinary"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return worker(args.worker, args.samples, getattr(torch, args.dtype))
    lines = [
        "| | time: median (least, most) | peak memory, MiB | of that, scores | ordinary, MiB |",
        "|---|---|---|---|---|",
    ]
    data: dict[str, object] = {}
    for dtype in (args.dtype,) if args.dtype else ("float32", "bfloat16"):
        model, batches = prepared(args.samples, getattr(torch, dtype))
        check_conserved(model, batches[0])
        ordinary(model, batches)
        ratios = []
        for _ in range(args.pairs):
            cost = seconds(lambda: scoring(model, batches))  # noqa: B023  it runs at once
            ratios.append(cost / seconds(lambda: ordinary(model, batches)))  # noqa: B023
        (most, scores), (plain, _) = peak("scoring", args.samples, dtype), peak("ordinary", args.samples, dtype)
        times = f"{median(ratios):.2f} ({min(ratios):.2f}, {max(ratios):.2f})"
        lines.append(f"| {dtype} | {times} | {most:.0f} | {scores:.0f} | {plain:.0f} |")
        data[dtype] = {"time": ratios, "peak": most, "scores": scores, "ordinary peak": plain}
    write_result("lrp_cost", "\n".join(lines), data)
    return None


if __name__ == "__main__":
    main()
