"""Models in mixed precision: bytes in the file, memory after loading, and the speed of decoding, against bfloat16.

    python benchmarks/mixed_precision.py             # a random Llama of 205 M parameters in its blocks; some minutes
    python benchmarks/mixed_precision.py --layers 8  # twice as large

What is stored is held against the bits asked for. Memory is what a process of its own has more after loading than
before. Decoding is timed in turns; it is bound by memory where a kernel reads packed weights, so the ratio of bytes is
the limit of the speed-up. There is no such kernel here: weights are unpacked in every pass, and the table says what
that costs.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import torch
from common import seconds, write_result
from lrp_cost import MEBIBYTE, resident
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

import hf_compress as hfc
from hf_compress.evaluation.size import stored_bytes

BITS = (8.0, 4.25, 3.25)


def random_llama(layers: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1000,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=16,
        dtype=torch.bfloat16,
    )
    return LlamaForCausalLM(config).to(torch.bfloat16).eval()


def memory_of(folder: Path) -> float:
    """MiB that a process gains by loading a model."""
    command = [sys.executable, __file__, "--worker", str(folder)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


def worker(folder: str) -> None:
    torch.zeros(1).sum()
    before = resident()
    model = AutoModelForCausalLM.from_pretrained(folder)
    for tensor in (*model.parameters(), *model.buffers()):  # what is only mapped does not count before it is read
        tensor.view(-1)[:: 4096 // tensor.element_size()].sum()
    print((resident() - before) / MEBIBYTE)


@torch.no_grad()
def decode(model: PreTrainedModel, tokens: int) -> None:
    ids = torch.arange(8)[None]
    model.generate(input_ids=ids, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0)


@torch.no_grad()
def prefill(model: PreTrainedModel) -> None:
    model(input_ids=torch.arange(512)[None], use_cache=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=6)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return worker(args.worker)
    dense = random_llama(args.layers)
    maps = [module for module in dense.model.layers.modules() if isinstance(module, torch.nn.Linear)]
    weights = sum(module.weight.numel() for module in maps)
    rest = stored_bytes(dense) - 2 * weights
    lines = [
        f"{weights / 1e6:.0f} M weights in the blocks, {2 * weights / MEBIBYTE:.0f} MiB in bfloat16. Files: bytes of "
        "their linear maps over the bits asked for. Decoding and prefill (512 tokens): times as fast as bfloat16.",
        "",
        "| bits | file over theory | bytes over bfloat16's | memory over bfloat16's | decoding | limit | prefill |",
        "|---" * 7 + "|",
    ]
    data: dict[str, object] = {}
    with TemporaryDirectory() as folder:
        dense.save_pretrained(f"{folder}/dense")
        memory = memory_of(Path(folder) / "dense")
        for bits in BITS:
            config = hfc.LRPConfig(bits=bits, allocation="uniform", rounding="nearest")
            model = hfc.compress(AutoModelForCausalLM.from_pretrained(f"{folder}/dense"), config)
            saved = Path(hfc.save(model, f"{folder}/{bits}"))
            stored = stored_bytes(model) - rest
            own = memory_of(saved)
            decode(model, 1)
            times = (args.tokens,)
            decoding = median(_time(decode, dense, *times) / _time(decode, model, *times) for _ in range(args.pairs))
            filling = median(_time(prefill, dense) / _time(prefill, model) for _ in range(args.pairs))
            data[str(bits)] = {"stored": stored, "memory": own, "decoding": decoding, "prefill": filling}
            cells = [stored / (weights * bits / 8), stored / (2 * weights), own / memory]
            cells += [decoding, 2 * weights / stored, filling]
            lines.append(f"| {bits:g} | " + " | ".join(f"{cell:.3f}" for cell in cells) + " |")
            print(json.dumps(data), flush=True)
    write_result("mixed_precision", "\n".join(lines), data)
    return None


def _time(work: Callable[..., None], *arguments: object) -> float:
    return seconds(lambda: work(*arguments))


if __name__ == "__main__":
    main()
