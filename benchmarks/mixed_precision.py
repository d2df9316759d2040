"""Models in mixed precision: bytes in the file, memory after loading, and the speed of decoding, against bfloat16.

    python benchmarks/mixed_precision.py             # a random Llama of 205 M parameters in its blocks; some minutes
    python benchmarks/mixed_precision.py --layers 8  # twice as large

What is stored is held against the bits asked for. Memory is what a process of its own has more after loading than
before. Decoding is timed in turns; the linear maps of the blocks are bound by memory there, so the ratio of their bytes
is the limit of their speed-up; that of the model follows from how much of its time is theirs, which is measured by
leaving them out. Each model is measured as it is loaded, its weights unpacked in every pass; after `hfc.use_kernels`,
with which weights of up to four bits take four in memory, and those of more take eight; and with room for matrices that
are kept beside them for long inputs.
"""

from __future__ import annotations

import argparse
import copy
import gc
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

BITS = (8.0, 4.5, 4.25, 3.25)
PROMPTS = (512, 2048)  # tokens of the inputs that are read at once


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


def memory_of(folder: Path, room: int | None = None) -> float:
    """MiB that a process gains by loading a model; with kernels and room for matrices, and a long input then."""
    command = [sys.executable, __file__, "--worker", str(folder)]
    command += [] if room is None else ["--room", str(room)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


def worker(folder: str, room: int | None) -> None:
    torch.zeros(1).sum()
    before = resident()
    model = AutoModelForCausalLM.from_pretrained(folder)
    if room is not None:
        hfc.use_kernels(model, room=room)
        gc.collect()
    if room:
        prefill(model, PROMPTS[0])
    for tensor in (*model.parameters(), *model.buffers()):  # what is only mapped does not count before it is read
        tensor.view(-1)[:: 4096 // tensor.element_size()].sum()
    print((resident() - before) / MEBIBYTE)


@torch.no_grad()
def decode(model: PreTrainedModel, tokens: int) -> None:
    ids = torch.arange(8)[None]
    model.generate(input_ids=ids, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0)


@torch.no_grad()
def prefill(model: PreTrainedModel, tokens: int) -> None:
    model(input_ids=torch.arange(tokens)[None] % model.config.vocab_size, use_cache=False, logits_to_keep=1)


class Nothing(torch.nn.Module):
    """In the place of a linear map: takes no time."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.outputs = outputs

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return inputs.new_empty(()).expand(*inputs.shape[:-1], self.outputs)


def share_of_maps(dense: PreTrainedModel, tokens: int, pairs: int) -> float:
    """What part of the time of decoding is that of the linear maps in the blocks."""
    hollow = copy.deepcopy(dense)
    for path, module in list(hollow.model.layers.named_modules()):
        if isinstance(module, torch.nn.Linear):
            hollow.model.layers.set_submodule(path, Nothing(module.out_features))
    return 1 - 1 / median(_ratio(dense, hollow, decode, tokens) for _ in range(pairs))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=6)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--room", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return worker(args.worker, args.room)
    dense = random_llama(args.layers)
    maps = [module for module in dense.model.layers.modules() if isinstance(module, torch.nn.Linear)]
    weights = sum(module.weight.numel() for module in maps)
    rest = stored_bytes(dense) - 2 * weights
    share = share_of_maps(dense, args.tokens, args.pairs)
    lines = [
        f"{weights / 1e6:.0f} M weights in the blocks, {2 * weights / MEBIBYTE:.0f} MiB in bfloat16. Files: bytes of "
        "their linear maps over the bits asked for. Decoding, and inputs of so many tokens: times as fast as bfloat16. "
        f"The maps take {share:.0%} of bfloat16's time of decoding.",
        "",
        "| bits | computed | file over theory | bytes over bfloat16's | memory over bfloat16's | decoding | limit "
        f"of the maps | limit of the model | {PROMPTS[0]} tokens | {PROMPTS[1]:,} tokens |",
        "|---" * 10 + "|",
    ]
    data: dict[str, dict[str, float]] = {}
    with TemporaryDirectory() as folder:
        dense.save_pretrained(f"{folder}/dense")
        memory = memory_of(Path(folder) / "dense")
        for bits in BITS:
            config = hfc.LRPConfig(bits=bits, allocation="uniform", rounding="nearest")
            model = hfc.compress(AutoModelForCausalLM.from_pretrained(f"{folder}/dense"), config)
            saved = Path(hfc.save(model, f"{folder}/{bits}"))
            stored = stored_bytes(model) - rest
            sizes = [stored / (weights * bits / 8), stored / (2 * weights)]
            for name, room in (("unpacked", None), ("by the kernel", 0), ("with room", 2 * weights)):
                if room is not None:
                    hfc.use_kernels(model := AutoModelForCausalLM.from_pretrained(saved), room=room)
                decode(model, 1)
                prefill(model, PROMPTS[0])
                held = sum(buffer.nbytes for buffer in model.model.layers.buffers())
                own = {
                    "memory": memory_of(saved, room) / memory,
                    "decoding": median(_ratio(dense, model, decode, args.tokens) for _ in range(args.pairs)),
                    "limit of the maps": (limit := 2 * weights / held),
                    "limit of the model": 1 / (1 - share + share / limit),
                }
                for count in PROMPTS:
                    own[f"{count} tokens"] = median(_ratio(dense, model, prefill, count) for _ in range(args.pairs))
                data[f"{bits:g}, {name}"] = {"stored": stored, **own}
                cells = " | ".join(f"{cell:.3f}" for cell in [*sizes, *own.values()])
                lines.append(f"| {bits:g} | {name} | {cells} |")
                print(lines[-1], flush=True)
    write_result("mixed_precision", "\n".join(lines), data)
    return None


def _ratio(dense: PreTrainedModel, model: PreTrainedModel, work: Callable[..., None], *arguments: int) -> float:
    """How many times as fast a model does its work as the dense one."""
    return seconds(lambda: work(dense, *arguments)) / seconds(lambda: work(model, *arguments))


if __name__ == "__main__":
    main()
