"""What compress() costs at the widths that people run: time over one plain pass of the same batches in the same run.

    python benchmarks/cost.py                       # 6 blocks of Qwen2.5-0.5B's shape, every method
    python benchmarks/cost.py --only ILLC LRP       # the rows whose names begin so
    python benchmarks/cost.py --full                # and the growth with the width, 512 to 2,048
    python benchmarks/cost.py --growth --only ILLC  # the growth alone
    python benchmarks/cost.py --peer PYTHON         # and llm-compressor's GPTQ, in the environment of that interpreter

The weights are random, in bfloat16; the batches hold 32 samples of 256 tokens. Every run of `compress` stands between
two plain passes and is divided by their mean. Where a processor multiplies bfloat16 fast, a plain pass is short, and
what is solved in float32 weighs the more: so its speeds stand above the table. Memory is the largest resident set of a
process of its own beyond that of one that loads the model and runs the plain pass.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import mean

import torch
from common import peak_of_this_process, plain_pass, seconds, write_result
from torch import Tensor
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen2Config

from hf_compress import (
    AdaptiveCompressConfig,
    CompressionConfig,
    ILLCConfig,
    LayerCollapseConfig,
    LRPConfig,
    MKAConfig,
    compress,
    estimate,
)

SAMPLES, POSITIONS = 32, 256
VOCABULARY = 32_000
PEER = Path(__file__).with_name("cost_peer.py")


@dataclass(frozen=True)
class Case:
    """Settings, and how many plain passes they may take at most."""

    config: CompressionConfig
    bound: float


CASES = {
    "MKA, 2 merges": Case(MKAConfig(num_merges=2), 8),
    "MKA, paper, 2 merges": Case(MKAConfig(num_merges=2, variant="paper"), 2),
    "ILLC, ratio 0.25": Case(ILLCConfig(ratio=0.25), 10),
    "LRP, 4.25 bits": Case(LRPConfig(bits=4.25), 10),
    "LRP, half sparse": Case(LRPConfig(sparsity=0.5), 12),
    "LayerCollapse, 2 FFNs": Case(LayerCollapseConfig(num_layers=2), 3),
    "AdaptiveCompress": Case(AdaptiveCompressConfig(), 2.5),
}


@dataclass(frozen=True)
class Shape:
    """Of a model: Qwen2.5-0.5B's, but for the blocks and the vocabulary, unless another width is given."""

    hidden: int = 896
    ffn: int = 4864
    heads: int = 14
    groups: int = 2
    blocks: int = 6

    @staticmethod
    def of_width(hidden: int) -> Shape:
        """The same proportions at another width, a multiple of 64."""
        return Shape(hidden, hidden * 4864 // 896 // 64 * 64, hidden // 64, 2)

    def model(self) -> PreTrainedModel:
        """One with random weights."""
        torch.manual_seed(0)
        config = Qwen2Config(
            vocab_size=VOCABULARY,
            hidden_size=self.hidden,
            intermediate_size=self.ffn,
            num_hidden_layers=self.blocks,
            num_attention_heads=self.heads,
            num_key_value_heads=self.groups,
            max_position_embeddings=POSITIONS,
            tie_word_embeddings=True,
        )
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


def windows() -> Tensor:
    """(samples, positions) token ids."""
    return torch.randint(3, VOCABULARY, (SAMPLES, POSITIONS), generator=torch.Generator().manual_seed(1))


def ratio(shape: Shape, case: Case) -> tuple[float, float]:
    """Time of `compress` over a plain pass, and the time that `estimate` says over the one that it measures."""
    reference, data = shape.model(), windows()
    plain_pass(reference, data[:8])  # what is set up once
    before = seconds(lambda: plain_pass(reference, data))
    told = estimate(model := shape.model(), case.config, data)
    assert told.seconds is not None
    cost = seconds(lambda: compress(model, case.config, data))
    plain = mean([before, seconds(lambda: plain_pass(reference, data))])
    return cost / plain, told.seconds / told.pass_seconds


def speeds() -> str:
    """Of the products of this processor, in words."""
    told = []
    for dtype in (torch.bfloat16, torch.float32):
        matrix = torch.randn(2048, 2048).to(dtype)
        matrix @ matrix  # what is set up once
        taken = min(seconds(lambda matrix=matrix: matrix @ matrix) for _ in range(5))  # type: ignore[misc]
        told.append(f"{2 * 2048**3 / taken / 1e9:.0f} GFLOP/s in {str(dtype).removeprefix('torch.')}")
    return "Products of 2,048 × 2,048: " + ", ".join(told)


def peak(name: str) -> float:
    """Largest resident MiB of a process that compresses a model; of a plain pass where no case is named."""
    command = [sys.executable, __file__, "--child", name]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def child(name: str) -> None:
    """The work of `peak`, in a process of its own."""
    model = Shape().model()
    if name in CASES:
        compress(model, CASES[name].config, windows())
    else:
        plain_pass(model, windows())
    print(peak_of_this_process())


def table_of_costs(names: list[str], peer: str | None) -> tuple[str, dict[str, object]]:
    """Every case beside its bound, and the plain pass, which nothing can be faster than."""
    size = sum(p.numel() * p.element_size() for p in Shape().model().parameters()) / 2**20
    plain = peak("")
    lines = [
        f"6 blocks, hidden 896, FFN 4,864, bfloat16 ({size:.0f} MiB), {SAMPLES} × {POSITIONS} tokens, "
        f"{torch.get_num_threads()} threads. A plain pass: time 1, {plain:.0f} MiB resident in all. {speeds()}.\n",
        "| compress() with | time over a plain pass | bound | kept | estimate | memory beyond it, MiB | of the model |",
        "|---|---|---|---|---|---|---|",
    ]
    data: dict[str, object] = {}
    for name in tqdm(names, desc="cost"):
        found, told = ratio(Shape(), CASES[name])
        beyond = peak(name) - plain
        bound = CASES[name].bound
        kept = "yes" if found <= bound else "no"
        cells = (f"{found:.1f}", f"{bound:g}", kept, f"{told:.1f}", f"{beyond:.0f}", f"{beyond / size:.1f} ×")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
        tqdm.write(lines[-1])  # should a later one fail
        data[name] = {"ratio": found, "bound": bound, "estimated": told, "beyond_mib": beyond}
    if peer is not None:
        said = subprocess.run([peer, str(PEER)], check=True, capture_output=True, text=True).stdout.split()
        lines.append(f"| (peer) llm-compressor, GPTQ W4A16 | {float(said[-2]):.1f} | | | | {float(said[-1]):.0f} | |")
        data["peer"] = {"ratio": float(said[-2]), "beyond_mib": float(said[-1])}
    return "\n".join(lines), data


def table_of_growth(names: list[str], widths: list[int]) -> tuple[str, dict[str, object]]:
    """How the seconds of each case grow from width to width, over how those of the plain pass do."""
    lines = [
        "Time over one plain pass at other widths; in brackets, by what it grew with a doubling (bound 1.5).\n",
        "| compress() with | " + " | ".join(f"{width:,}" for width in widths) + " |",
        "|---" * (len(widths) + 1) + "|",
    ]
    found: dict[str, object] = {}
    for name in tqdm(names, "growth"):
        row = [ratio(Shape.of_width(width), CASES[name])[0] for width in widths]
        cells = [f"{row[0]:.1f}", *(f"{after:.1f} ({after / before:.2f} ×)" for before, after in pairwise(row))]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
        tqdm.write(lines[-1])
        found[name] = row
    return "\n".join(lines), found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", help="beginnings of the names of the rows")
    parser.add_argument("--full", action="store_true", help="the growth with the width as well")
    parser.add_argument("--growth", action="store_true", help="the growth alone")
    parser.add_argument("--widths", type=int, nargs="+", default=[512, 1024, 2048])
    parser.add_argument("--peer", metavar="PYTHON", help="interpreter of an environment that has llm-compressor")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child is not None:
        child(args.child)
        return
    names = [name for name in CASES if not args.only or name.startswith(tuple(args.only))]
    if args.growth:
        print(table_of_growth(names, args.widths)[0])
        return
    text, data = table_of_costs(names, args.peer)
    if args.full:
        grown, growth = table_of_growth(names, args.widths)
        text, data = f"{text}\n\n{grown}", data | {"growth": growth}
    if args.only:
        print(text)
    else:
        write_result("cost", text, data)


if __name__ == "__main__":
    main()
