"""What compress() costs: wall time over one plain forward pass of the same batches, and memory against the data's size.

    python benchmarks/mka_cost.py
    python benchmarks/mka_cost.py --full     # every number of merges, more repetitions

Every measurement of `compress` stands between two of the plain pass, in one process, and is divided by their mean; the
median over repetitions is printed with the smallest and largest. Peak memory is the resident set of a process of its
own for each cell, and what counts is its growth with the number of samples.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from statistics import median

from common import (
    REFERENCE,
    calibration_windows,
    cost_ratios,
    load,
    peak_of_this_process,
    plain_pass,
    write_result,
)
from tqdm.auto import tqdm

from hf_compress import MKAConfig, compress

ONE_SHOT_BOUND = 1.3
MERGES_FOR_MEMORY = 3


def configs(merges: list[int]) -> dict[str, tuple[MKAConfig, float]]:
    """What is timed, and the ratio that it may cost at most."""
    one_shot = MKAConfig(num_merges=3, variant="paper", iterative=False)
    return {"one-shot, no refit (3 merges)": (one_shot, ONE_SHOT_BOUND)} | {
        f"default, {count} merge{'s' * (count > 1)}": (MKAConfig(num_merges=count), 1.5 * (1 + count))
        for count in merges
    }


def peak_memory(directory: Path, what: str, samples: int) -> float:
    """Peak resident MiB of a process that does one thing to a fresh model."""
    command = [sys.executable, __file__, "--child", what, "--model", str(directory), "--samples", str(samples)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def child(directory: Path, what: str, samples: int) -> None:
    """The work of `peak_memory`, in a process of its own."""
    model, tokenizer = load(directory)
    windows = calibration_windows(tokenizer, samples)
    if what == "plain forward pass":
        plain_pass(model, windows)
    elif what == "one-shot, no refit":
        compress(model, MKAConfig(num_merges=MERGES_FOR_MEMORY, variant="paper", iterative=False), windows)
    else:
        compress(model, MKAConfig(num_merges=MERGES_FOR_MEMORY), windows)
    print(peak_of_this_process())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=REFERENCE)
    parser.add_argument("--samples", type=int, default=256, help="calibration windows of 256 tokens")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--full", action="store_true", help="1, 2, 3, 4 and 6 merges, 5 repetitions")
    parser.add_argument("--part", choices=["time", "memory", "both"], default="both")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args.model, args.child, args.samples)
        return
    if args.part != "memory":
        measure_time(args)
    if args.part != "time":
        measure_memory(args)


def measure_time(args: argparse.Namespace) -> None:
    """Write the table of ratios."""
    merges, repeats = ([1, 2, 3, 4, 6], 5) if args.full else ([1, 3, 6], args.repeats)
    _, tokenizer = load(args.model)
    windows = calibration_windows(tokenizer, args.samples)
    rows = ["| compress() with | time over one plain pass: median (least, most) | bound | kept |", "|---|---|---|---|"]
    data: dict[str, object] = {}
    for name, (config, bound) in tqdm(configs(merges).items(), desc="time"):
        found = cost_ratios(args.model, config, windows, repeats)
        middle = median(found)
        rows.append(
            f"| {name} | {middle:.2f} ({min(found):.2f}, {max(found):.2f}) | {bound:.1f} | "
            f"{'yes' if middle <= bound else 'no'} |"
        )
        data[name] = {"ratios": found, "bound": bound}
    write_result("mka_cost", "\n".join(rows), data)


def measure_memory(args: argparse.Namespace) -> None:
    """Write the table of peak memory at a quarter and at twice the samples."""
    small, large = args.samples // 4, args.samples * 2
    rows = [f"| peak memory, MiB | {small} samples | {large} samples | growth |", "|---|---|---|---|"]
    data: dict[str, object] = {}
    for what in tqdm(("plain forward pass", "one-shot, no refit", "default"), desc="memory"):
        peaks = [peak_memory(args.model, what, samples) for samples in (small, large)]
        rows.append(f"| {what} | {peaks[0]:.0f} | {peaks[1]:.0f} | {peaks[1] - peaks[0]:+.0f} |")
        data[what] = {str(small): peaks[0], str(large): peaks[1]}
    model, _ = load(args.model)
    pooled = (large - small) * model.config.hidden_size * model.config.num_hidden_layers * 4 / 2**20
    note = f"Pooled states of {large - small} more samples take {pooled:.1f} MiB (samples x width x blocks x 4 bytes)."
    write_result("mka_memory", "\n".join([*rows, "", note]), data)


if __name__ == "__main__":
    main()
