"""A model of Llama-3-8B's shape compressed from folder to folder under a cap of memory, by the command line.

    python examples/llama_8b_shape.py             # 2 blocks of the 32
    python examples/llama_8b_shape.py --full      # all: 16 GB of random weights, and as much again for what is made

The weights are random: what is looked at is time, memory, and what is read and written, not quality. Each run is a
process of its own in a control group of Linux that has 8 GiB, its cache of files included; that takes root. Without one
nothing is capped, and the table says so. The checkpoint is deleted in the end.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from llm import REFERENCE
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm
from transformers import LlamaConfig

RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"
CAP = 8 * 2**30
BUDGET = "6GiB"  # of --max-memory; the rest is for Python, PyTorch and the texts
BLOCKS = 32
GROUPS = (Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup"))  # of versions 1 and 2
METHODS = {"illc": ["--set", "tokens={tokens}"], "mka": ["--set", "refit_tokens={tokens}"]}


def shape(blocks: int) -> LlamaConfig:
    """Of meta-llama/Meta-Llama-3-8B."""
    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=128_256,
        hidden_size=4096,
        intermediate_size=14_336,
        num_hidden_layers=blocks,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        rope_theta=500_000.0,
        dtype="bfloat16",
    )


def write_checkpoint(folder: Path, blocks: int) -> int:
    """Random weights in a shard for each block, and one for the rest; their bytes."""
    folder.mkdir()
    config = shape(blocks)
    config.save_pretrained(folder)
    for path in (REFERENCE / "manuals-llama-12l").glob("*token*"):
        shutil.copy(path, folder)
    wide, ffn, heads = config.hidden_size, config.intermediate_size, config.hidden_size // 4
    attention = {"q_proj": (wide, wide), "k_proj": (heads, wide), "v_proj": (heads, wide), "o_proj": (wide, wide)}
    mlp = {"gate_proj": (ffn, wide), "up_proj": (ffn, wide), "down_proj": (wide, ffn)}
    sizes = {f"self_attn.{name}": size for name, size in attention.items()}
    sizes |= {f"mlp.{name}": size for name, size in mlp.items()}
    norms = dict.fromkeys(("input_layernorm", "post_attention_layernorm"), (wide,))
    shards: dict[str, dict[str, tuple[int, ...]]] = {}
    for index in range(blocks):
        names = {f"model.layers.{index}.{name}.weight": size for name, size in (sizes | norms).items()}
        shards[f"model-{index}.safetensors"] = names
    around = {"model.embed_tokens": (128_256, wide), "model.norm": (wide,), "lm_head": (128_256, wide)}
    shards["model-rest.safetensors"] = {f"{name}.weight": size for name, size in around.items()}
    generator = torch.Generator().manual_seed(0)
    for file, names in tqdm(shards.items(), desc="writing the checkpoint"):
        save_file({name: weights(size, generator) for name, size in names.items()}, folder / file, {"format": "pt"})
    index = {name: file for file, names in shards.items() for name in names}
    total = sum((folder / file).stat().st_size for file in shards)
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": index})
    )
    return total


def weights(size: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Ones for a norm, and else normal with the spread that Llama begins with."""
    if len(size) == 1:
        return torch.ones(size, dtype=torch.bfloat16)
    return torch.empty(size, dtype=torch.bfloat16).normal_(std=0.02, generator=generator)


@contextmanager
def capped(size: int) -> Iterator[Callable[[], None] | None]:
    """What a process calls to have no more than so many bytes; None where it cannot be done here."""
    home = next((group for group in GROUPS if (group / "cgroup.procs").exists()), None)
    group = home and home / f"hf_compress-{os.getpid()}"
    try:
        if group is None:
            raise OSError
        group.mkdir()
        limit = next(group / name for name in ("memory.limit_in_bytes", "memory.max") if (group / name).exists())
        limit.write_text(str(size))
    except (OSError, StopIteration):
        if group is not None and group.is_dir():
            group.rmdir()
        yield None
        return
    try:
        yield lambda: (group / "cgroup.procs").write_text(str(os.getpid())) and None
    finally:
        group.rmdir()


@dataclass
class Run:
    """What a process took: seconds on the clock and of the processor's cores, which other processes take none of, and
    in bytes the peak of its anonymous memory, and what it read and wrote."""

    seconds: float
    cores: float = 0
    anonymous: int = 0
    read: int = 0
    written: int = 0


def run(command: list[str], cap: Callable[[], None] | None) -> Run:
    """Run a command, looked at ten times a second."""
    start, cores = time.monotonic(), _core_seconds()
    found = Run(0)
    process = subprocess.Popen(command, preexec_fn=cap)
    while process.poll() is None:
        status = Path(f"/proc/{process.pid}/status").read_text()
        anonymous = next((line.split()[1] for line in status.splitlines() if line.startswith("RssAnon")), "0")
        found.anonymous = max(found.anonymous, 1024 * int(anonymous))
        told = dict(line.split(": ") for line in Path(f"/proc/{process.pid}/io").read_text().splitlines())
        found.read, found.written = (int(told.get(name, 0)) for name in ("read_bytes", "write_bytes"))
        time.sleep(0.1)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
    found.seconds, found.cores = time.monotonic() - start, _core_seconds() - cores
    return found


def _core_seconds() -> float:
    """Seconds of the processor's cores that ended processes of this one have taken."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def compress(method: str, model: Path, output: Path, tokens: int, cap: Callable[[], None] | None) -> Run:
    """What a user would type."""
    windows = ["--samples", str(tokens // 256), "--max-length", "256", "--batch-size", "4"]
    command = [sys.executable, "-m", "hf_compress", "compress", str(model), "--method", method, "--ratio", "0.25"]
    command += ["--calibration", str(REFERENCE / "calibration.jsonl"), *windows, "--max-memory", BUDGET]
    command += [part.format(tokens=tokens) for part in METHODS[method]]
    return run([*command, "--output", str(output)], cap)


def rows(method: str, found: Run, output: Path) -> list[str]:
    """Of the table: each stage, and the whole."""
    (stage,) = json.loads((output / "compression_report.json").read_text())["stages"]
    steps = {step["name"]: step["seconds"] for step in stage["steps"]}
    steps["load, save and check what was saved"] = found.seconds - sum(steps.values())
    lines = [f"| {method} | {name} | {seconds / 60:.1f} | | | | | |" for name, seconds in steps.items()]
    size = sum(path.stat().st_size for path in output.glob("*.safetensors"))
    sizes = [f"{value / 1e9:.1f}" for value in (found.anonymous, found.read, found.written, size)]
    cells = " | ".join([f"{found.cores / 60:.1f}", *sizes])
    return [*lines, f"| {method} | **all of it** | **{found.seconds / 60:.1f}** | {cells} |"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help=f"all {BLOCKS} blocks")
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=4096, help="calibration tokens")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--folder", type=Path, help="where there is room; that for temporary files when not given")
    args = parser.parse_args()
    blocks = BLOCKS if args.full else args.blocks
    with tempfile.TemporaryDirectory(dir=args.folder) as folder, capped(CAP) as cap:
        model = Path(folder) / "llama"
        total = write_checkpoint(model, blocks)
        lines = [
            f"{blocks} blocks of Llama-3-8B's shape, random bfloat16 weights ({total / 1e9:.1f} GB), {args.tokens:,} "
            f"calibration tokens, --max-memory {BUDGET}, {torch.get_num_threads()} threads, "
            f"{'in a control group of 8 GiB' if cap else 'no cap (no control group could be made)'}.\n",
            "| method | | minutes | minutes of a core | anonymous memory, peak, GB | read from the disk, GB "
            "| written, GB | saved, GB |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for method in args.methods:
            output = Path(folder) / method
            lines += (new := rows(method, compress(method, model, output, args.tokens, cap), output))
            print(*new, sep="\n", flush=True)  # the next takes an hour
            shutil.rmtree(output)
    text = "\n".join(lines)
    print(text)
    if args.full:
        command = f"python examples/llama_8b_shape.py --full --tokens {args.tokens}"
        (RESULTS / "llama_8b_shape.md").write_text(f"`{command}`\n\n{text}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
