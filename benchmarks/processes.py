"""What a second process spares: compress() in one process and in two, of one thread each, in one run.

    python benchmarks/processes.py                  # ILLC, MKA and LRP on 6 blocks of Qwen2.5-0.5B's shape
    python benchmarks/processes.py --only MKA       # the rows whose names begin so
    python benchmarks/processes.py --blocks 4       # fewer blocks

The weights are random, in bfloat16; 32 samples of 256 tokens come in batches of four. On a machine with two cores at
least, and nothing else to do. The first rows say what the machine makes of two processes that have nothing to tell each
other: plain passes of half of the batches each, and products of float32 in both at once over those in one.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from time import perf_counter

import torch
import torch.distributed as dist
from common import peak_of_this_process, write_result
from cost import CASES, POSITIONS, SAMPLES, Shape, windows
from tqdm.auto import tqdm

from hf_compress import DataOptions, compress
from hf_compress.calibration.capture import inference

NAMES = ["ILLC, ratio 0.25", "MKA, 2 merges", "LRP, 4.25 bits"]
PLAIN, PRODUCTS = "(a plain pass)", "(float32 products)"  # what the machine allows
BATCH = 4
_TIMES = 200
BOUND = 1.7  # times as fast, at least
CHECKS = "apply and check"  # what every process does by itself, for its own model


def measured(name: str, blocks: int, processes: int) -> tuple[float, float, float]:
    """The seconds that the slowest of so many processes takes, those without the last checks, and the largest MiB."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--blocks", str(blocks), "--child", name, folder, str(processes)]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        started = [
            subprocess.Popen([*command, str(rank)], env=environment, stdout=subprocess.PIPE, text=True)
            for rank in range(processes)
        ]
        told = [process.communicate()[0] for process in started]
        if any(process.returncode for process in started):
            raise SystemExit(f"{name} has failed in {processes} processes")
    found = [tuple(map(float, text.split()[-3:])) for text in told]
    return max(f[0] for f in found), max(f[1] for f in found), max(f[2] for f in found)


def child(name: str, blocks: int, folder: Path, processes: int, rank: int) -> None:
    """The work of `measured`, in one of the processes."""
    torch.set_num_threads(1)
    model, data = Shape(blocks=blocks).model(), windows()
    if processes > 1:
        dist.init_process_group("gloo", f"file://{folder / 'meeting'}", rank=rank, world_size=processes)
        dist.barrier()
    start = perf_counter()
    checks = 0.0
    if name == PLAIN:
        with inference(model):
            for batch in data.split(BATCH)[rank::processes]:
                model(batch)
    elif name == PRODUCTS:
        matrix = torch.randn(2048, 2048)
        for _ in range(_TIMES // processes):
            matrix @ matrix
    else:
        compress(model, CASES[name].config, data, options=DataOptions(batch_size=BATCH))
        steps = {step.name: step.seconds for step in model.compression_report.stages[-1].steps}
        checks = steps[CHECKS]
    seconds = perf_counter() - start
    print(seconds, seconds - checks, peak_of_this_process())


def table(names: list[str], blocks: int) -> tuple[str, dict[str, object]]:
    """One process beside two."""
    lines = [
        f"{blocks} blocks, hidden 896, FFN 4,864, bfloat16, {SAMPLES} × {POSITIONS} tokens in batches of 4, one thread "
        "a process (gloo). The sweep is all of it but the checks of the finished model, which every process makes.\n",
        "| compress() with | 1 process, s | 2 processes, s | times as fast | the sweep alone | bound | kept "
        "| MiB of 1 process | of each of 2 |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    data: dict[str, object] = {}
    for name in tqdm([PLAIN, PRODUCTS, *names], desc="processes"):
        one, two = (measured(name, blocks, processes) for processes in (1, 2))
        whole, sweep = one[0] / two[0], one[1] / two[1]
        judged = ("", "", "")
        if name in CASES:
            judged = (f"{sweep:.2f}", str(BOUND), "yes" if sweep >= BOUND else "no")
        cells = (f"{one[0]:.0f}", f"{two[0]:.0f}", f"{whole:.2f}", *judged, f"{one[2]:,.0f}", f"{two[2]:,.0f}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
        tqdm.write(lines[-1])
        data[name] = {"seconds": [one[0], two[0]], "sweep": [one[1], two[1]], "peak_mib": [one[2], two[2]]}
    return "\n".join(lines), data


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", help="beginnings of the names of the rows")
    parser.add_argument("--blocks", type=int, default=6)
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child is not None:
        name, folder, processes, rank = args.child
        child(name, args.blocks, Path(folder), int(processes), int(rank))
        return
    names = [name for name in NAMES if not args.only or name.startswith(tuple(args.only))]
    text, data = table(names, args.blocks)
    if args.only:
        print(text)
    else:
        write_result("processes", text, data)


if __name__ == "__main__":
    main()
