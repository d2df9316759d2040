"""Memory of compress() and save(): of models on the disk against the number of their blocks, and of models in memory.

    python benchmarks/memory.py             # 8 and 24 blocks on the disk, 6 in memory
    python benchmarks/memory.py --full      # 8 and 72 blocks on the disk, 6 and 24 in memory
    python benchmarks/memory.py --only ILLC

Checkpoints like Llama's with random weights in bfloat16 are written to a temporary folder: hidden 1,024 and FFN 2,816
for the first table, 896 and 4,864 for the second. Each cell is a process of its own, which loads one, compresses it and
saves the result. What is told is the peak of its anonymous memory, sampled all the time, beyond what it had before it
loaded the model, with every block on the disk; or after that, with all of it in memory. Mapped files are not counted:
the system drops them when it needs the room.

Of freed tensors up to 32 MiB glibc keeps what lies between others that are in use, and how much that comes to is a
matter of chance. So the processes have MALLOC_MMAP_THRESHOLD_ at 1 MiB, with which freed tensors go back; `--kept`
leaves glibc as it is.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import write_result
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, LlamaConfig

from hf_compress import (
    AdaptiveCompressConfig,
    CompressionConfig,
    DropBlocksConfig,
    ILLCConfig,
    LayerCollapseConfig,
    LRPConfig,
    MKAConfig,
    compress,
    save,
)
from hf_compress.storage.save import own_memory

VOCABULARY = 8000
LOADED = "no method: the model is loaded, and nothing done"
GIVEN_BACK = {"MALLOC_MMAP_THRESHOLD_": str(2**20)}  # freed tensors of more bytes go back to the system at once


@dataclass(frozen=True)
class Case:
    """Sizes of models and data."""

    hidden: int
    ffn: int
    groups: int  # key and value heads
    samples: int
    positions: int

    @property
    def block(self) -> float:
        """MiB of a block."""
        attention = 2 * self.hidden * (self.hidden + 64 * self.groups)
        return 2 * (3 * self.hidden * self.ffn + attention) / 2**20

    @property
    def rest(self) -> float:
        """MiB of embeddings and head."""
        return 2 * 2 * VOCABULARY * self.hidden / 2**20


CASES = {"disk": Case(1024, 2816, 4, 16, 128), "memory": Case(896, 4864, 2, 32, 256)}


def settings(case: Case) -> dict[str, CompressionConfig]:
    """What is measured, by name."""
    tokens: Any = {"tokens": case.samples * case.positions}
    return {
        "DropBlocks, block influence": DropBlocksConfig(num_blocks=2),
        "MKA, 2 merges": MKAConfig(num_merges=2, choice_samples=case.samples),
        "MKA, paper, 2 merges": MKAConfig(num_merges=2, variant="paper"),
        "ILLC, ratio 0.25": ILLCConfig(ratio=0.25, **tokens),
        "LayerCollapse, 2 FFNs": LayerCollapseConfig(num_layers=2),
        "LRP, 4.25 bits": LRPConfig(bits=4.25, **tokens),
        "LRP, half sparse": LRPConfig(sparsity=0.5, **tokens),
        "AdaptiveCompress": AdaptiveCompressConfig(),
    }


def write_checkpoint(folder: Path, case: Case, blocks: int) -> None:
    """In shards of one block or so."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=case.hidden,
        intermediate_size=case.ffn,
        num_hidden_layers=blocks,
        num_attention_heads=case.hidden // 64,
        num_key_value_heads=case.groups,
        max_position_embeddings=case.positions,
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder, max_shard_size="64MB")


def anonymous() -> float:
    """MiB of this process's memory that are no file's (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) / 1024


class Peak(threading.Thread):
    """The largest `anonymous()` of two hundred samples a second or so."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.most, self.ended = anonymous(), threading.Event()

    def run(self) -> None:
        while not self.ended.wait(0.004):
            self.most = max(self.most, anonymous())


def child(name: str, kind: str, folder: Path) -> None:
    """Compress a checkpoint and save it; prints the peaks of both beyond what there was before, in MiB."""
    case = CASES[kind]
    seeded = torch.Generator().manual_seed(1)
    windows = torch.randint(3, VOCABULARY, (case.samples, case.positions), generator=seeded)
    torch.ones(64, 64) @ torch.ones(64, 64)  # what is set up once
    before = anonymous()
    with tempfile.TemporaryDirectory() as scratch:
        peak = Peak()
        if kind == "disk":
            peak.start()
            blocks = LlamaConfig.from_pretrained(folder).num_hidden_layers
            rest = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
            places = rest | {f"model.layers.{index}": "disk" for index in range(blocks)}
            model = AutoModelForCausalLM.from_pretrained(folder, device_map=places, offload_folder=scratch)
        else:
            model = AutoModelForCausalLM.from_pretrained(folder)
            own_memory(model)  # instead of mapped files
            before = anonymous()
            peak.start()
        if name != LOADED:
            compress(model, settings(case)[name], windows)
        compressed = peak.most - before
        if name != LOADED:
            save(model, Path(scratch) / "smaller")
    peak.ended.set()
    print(compressed, peak.most - before)


def measured(name: str, kind: str, folder: Path, kept: bool) -> tuple[float, float]:
    command = [sys.executable, __file__, "--child", name, kind, str(folder)]
    environment = os.environ | ({} if kept else GIVEN_BACK)
    words = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout.split()
    return float(words[-2]), float(words[-1])


def table(
    kind: str, depths: list[int], only: list[str] | None, kept: bool
) -> tuple[str, dict[str, list[tuple[float, float]]]]:
    """Measure models of so many blocks; the table, and the figures in MiB."""
    case = CASES[kind]
    names = [name for name in (LOADED, *settings(case)) if not only or name.startswith(tuple(only))]
    sizes = [depth * case.block + case.rest for depth in depths]
    what, units, form = {
        "disk": ("with every block on the disk, beyond the start, MiB", [1.0] * len(sizes), "{:.0f}"),
        "memory": ("of models in memory, beyond the model, times its size", sizes, "{:.2f}"),
    }[kind]
    cells = [f"{depth} blocks ({size:.0f} MiB)" for depth, size in zip(depths, sizes, strict=True)]
    lines = [
        f"Peak anonymous memory {what}. A block has {case.block:.0f} MiB, embeddings and head {case.rest:.0f}; "
        f"{case.samples} × {case.positions} tokens. {'glibc as it is' if kept else 'Freed tensors go back'}.\n",
        "| compress() with | " + " | ".join(f"{cell} | and save()" for cell in cells) + " |",
        "|---" * (2 * len(depths) + 1) + "|",
    ]
    found: dict[str, list[tuple[float, float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        folders = [Path(folder) / str(depth) for depth in depths]
        for path, depth in zip(folders, depths, strict=True):
            write_checkpoint(path, case, depth)
        for name in tqdm(names, desc=kind):
            found[name] = [measured(name, kind, path, kept) for path in folders]
            told = [form.format(peak / unit) for pair, unit in zip(found[name], units, strict=True) for peak in pair]
            lines.append(f"| {name} | {' | '.join(told)} |")
            tqdm.write(lines[-1])  # should a later one fail
    return "\n".join(lines), found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="deeper models")
    parser.add_argument("--disk", nargs="*", type=int, help="other numbers of blocks, on the disk")
    parser.add_argument("--memory", nargs="*", type=int, help="and in memory")
    parser.add_argument("--only", nargs="+", help="beginnings of the names of the rows")
    parser.add_argument("--kept", action="store_true", help="what glibc keeps of freed memory is counted")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args.child[0], args.child[1], Path(args.child[2]))
        return
    depths = {
        "disk": args.disk if args.disk is not None else [8, 72 if args.full else 24],
        "memory": args.memory if args.memory is not None else [6, 24] if args.full else [6],
    }
    tables = {kind: table(kind, own, args.only, args.kept) for kind, own in depths.items() if own}
    text = "\n\n".join(text for text, _ in tables.values())
    if args.only or args.kept or args.disk is not None or args.memory is not None:
        print(text)
    else:
        write_result("memory", text, {kind: found for kind, (_, found) in tables.items()})


if __name__ == "__main__":
    main()
