"""Memory of compress() and save() on models that lie on the disk, against the number of their blocks.

    python benchmarks/memory.py             # 8 and 24 blocks
    python benchmarks/memory.py --full      # and 72
    python benchmarks/memory.py --only ILLC

Checkpoints like Llama's with random weights in bfloat16 (hidden 1,024, FFN 2,816) are written to a temporary folder.
Each cell is a process of its own, which loads one with every block on the disk, compresses it and saves the result.
What is told is the peak of its anonymous memory, sampled all the time, beyond what it had before it loaded the model.
Mapped files are not counted: the system drops them when it needs the room.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import torch
from common import write_result
from tqdm import tqdm
from transformers import AutoModelForCausalLM, LlamaConfig

from hf_compress import (
    CompressionConfig,
    DropBlocksConfig,
    ILLCConfig,
    LayerCollapseConfig,
    LRPConfig,
    MKAConfig,
    compress,
    save,
)

HIDDEN, FFN, VOCABULARY, SAMPLES, POSITIONS = 1024, 2816, 8000, 16, 128
TOKENS = {"tokens": SAMPLES * POSITIONS}
CASES: dict[str, CompressionConfig] = {
    "DropBlocks, block influence": DropBlocksConfig(num_blocks=2),
    "DropBlocks, perplexity": DropBlocksConfig(num_blocks=2, criterion="perplexity"),
    "MKA, 2 merges": MKAConfig(num_merges=2, choice_samples=SAMPLES),
    "MKA, paper, 2 merges": MKAConfig(num_merges=2, variant="paper"),
    "ILLC, ratio 0.25": ILLCConfig(ratio=0.25, **TOKENS),  # type: ignore[arg-type]
    "LayerCollapse, 2 FFNs": LayerCollapseConfig(num_layers=2),
    "LRP, 4.25 bits": LRPConfig(bits=4.25, **TOKENS),  # type: ignore[arg-type]
    "LRP, half sparse": LRPConfig(sparsity=0.5, **TOKENS),  # type: ignore[arg-type]
}


def write_checkpoint(folder: Path, blocks: int) -> None:
    """In shards of one block or so."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=FFN,
        num_hidden_layers=blocks,
        num_attention_heads=16,
        num_key_value_heads=4,
        max_position_embeddings=POSITIONS,
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder, max_shard_size="64MB")


def anonymous() -> float:
    """MiB of this process's memory that are no file's (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) / 1024


class Peak(threading.Thread):
    """The largest `anonymous()` of a hundred samples a second."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.most, self.ended = anonymous(), threading.Event()

    def run(self) -> None:
        while not self.ended.wait(0.01):
            self.most = max(self.most, anonymous())


def child(name: str, folder: Path) -> None:
    """Compress a checkpoint and save it; prints the peaks of both beyond what there was before loading, in MiB."""
    windows = torch.randint(3, VOCABULARY, (SAMPLES, POSITIONS), generator=torch.Generator().manual_seed(1))
    torch.ones(64, 64) @ torch.ones(64, 64)  # what is set up once
    before, peak = anonymous(), Peak()
    peak.start()
    blocks = LlamaConfig.from_pretrained(folder).num_hidden_layers
    rest = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    places = rest | {f"model.layers.{index}": "disk" for index in range(blocks)}
    with tempfile.TemporaryDirectory() as scratch:
        model = AutoModelForCausalLM.from_pretrained(folder, device_map=places, offload_folder=scratch)
        compress(model, CASES[name], windows)
        compressed = peak.most - before
        save(model, Path(scratch) / "smaller")
    peak.ended.set()
    print(compressed, peak.most - before)


def measured(name: str, folder: Path) -> tuple[float, float]:
    command = [sys.executable, __file__, "--child", name, str(folder)]
    words = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    return float(words[-2]), float(words[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="72 blocks as well")
    parser.add_argument("--only", nargs="+", help="beginnings of the names of the rows")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args.child[0], Path(args.child[1]))
        return
    depths = [8, 24, 72] if args.full else [8, 24]
    names = [name for name in CASES if not args.only or name.startswith(tuple(args.only))]
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as folder:
        for depth in depths:
            write_checkpoint(Path(folder) / str(depth), depth)
            for name in tqdm(names, desc=f"{depth} blocks"):
                found[name].append(measured(name, Path(folder) / str(depth)))
    block = 2 * (3 * HIDDEN * FFN + 2 * HIDDEN * HIDDEN * 5 // 4) / 2**20
    rest = 2 * 2 * VOCABULARY * HIDDEN / 2**20
    lines = [
        f"Peak anonymous memory beyond the start, MiB. A block has {block:.0f} MiB, embeddings and head {rest:.0f}; "
        f"{SAMPLES} × {POSITIONS} tokens.\n",
        "| compress() with | "
        + " | ".join(f"{depth} blocks ({depth * block + rest:.0f})" for depth in depths)
        + " | save |",
        "|---" * (len(depths) + 2) + "|",
    ]
    for name, row in found.items():
        cells = " | ".join(f"{compressed:.0f}" for compressed, _ in row)
        lines.append(f"| {name} | {cells} | {max(saved for _, saved in row):.0f} |")
    text = "\n".join(lines)
    if args.only:
        print(text)
    else:
        write_result("memory", text, found)


if __name__ == "__main__":
    main()
