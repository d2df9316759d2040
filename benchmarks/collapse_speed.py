"""What a collapsed FFN saves in time, against what it saves in FLOPs: alone, in its block, and in a small model.

    python benchmarks/collapse_speed.py              # some four minutes on two cores
    python benchmarks/collapse_speed.py --seconds 10 # longer for each cell

Models of common shapes with random weights: four blocks, of which one FFN is collapsed, by the library's own edits, to
a full map and to one of a quarter of the rank. Dense and collapsed run in turns, in pairs, the one and then the other
going first; a pair gives one ratio of times, and the median over pairs is printed with its quartiles. The ideal is the
ratio of FLOPs (of matrix products, as torch counts them). The control is the dense FFN of a copy over that of the
model, which shows the noise. It does not show another process that takes a core for a while, so a cell in which others
used more than a tenth of a core (Linux) is measured again, once, and marked if that was no better.
"""

from __future__ import annotations

import argparse
import copy
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from time import perf_counter, sleep
from typing import Any

import torch
from common import write_result
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from tqdm.auto import tqdm
from transformers import AutoModel, BertConfig, LlamaConfig, PreTrainedConfig, PreTrainedModel, ViTConfig

from hf_compress.anatomy.anatomy import Anatomy
from hf_compress.anatomy.parts import hidden_size
from hf_compress.anatomy.undo import Undo
from hf_compress.calibration.capture import inference
from hf_compress.rewrite.apply import carry_out
from hf_compress.rewrite.builders import linear_ffn

BLOCKS, COLLAPSED = 4, 1
LEAST_PAIRS = 8
DISTURBED, TRIES, PAUSE = 0.1, 2, 3.0  # cores, times, seconds
DTYPES = (torch.float32, torch.bfloat16)
VOCABULARY = 1000
# which model, what of it -> the column's title
COLUMNS = {
    ("full", "FFN"): "FFN",
    ("low rank", "FFN"): "FFN, rank ¼",
    ("full", "block"): "block",
    ("full", "model"): f"model, 1 of {BLOCKS} FFNs",
    ("copy", "FFN"): "control: FFN, a copy",
}

Work = Callable[[], object]


@dataclass(frozen=True)
class Shape:
    """A model of a common shape.

    Attributes:
        config: four blocks of it.
        ffn: runs a block's FFN, from the input of its first projection to the output of its last.
        inputs: tokens -> what the model is called with.
    """

    config: PreTrainedConfig
    ffn: Callable[[nn.Module, Tensor], Tensor]
    inputs: dict[int, dict[str, Any]]


def text(*tokens: int) -> dict[int, dict[str, Any]]:
    return {count: {"input_ids": torch.randint(5, VOCABULARY, (1, count))} for count in tokens}


def images(*counts: int) -> dict[int, dict[str, Any]]:
    return {197 * count: {"pixel_values": torch.randn(count, 3, 224, 224)} for count in counts}


def shapes() -> dict[str, Shape]:
    return {
        "BERT-base, GELU 768/3072": Shape(
            BertConfig(vocab_size=VOCABULARY, num_hidden_layers=BLOCKS),
            lambda block, x: block.output.dense(block.intermediate(x)),
            text(1, 16, 512),
        ),
        "Llama-like, SwiGLU 2048/5632": Shape(
            LlamaConfig(
                vocab_size=VOCABULARY,
                hidden_size=2048,
                intermediate_size=5632,
                num_hidden_layers=BLOCKS,
                num_attention_heads=32,
                num_key_value_heads=4,
                use_cache=False,  # a block that is run again would find its own keys there
            ),
            lambda block, x: block.mlp(x),
            text(1, 16, 512),
        ),
        "ViT-small, GELU 384/1536": Shape(
            ViTConfig(hidden_size=384, intermediate_size=1536, num_hidden_layers=BLOCKS, num_attention_heads=6),
            lambda block, x: block.mlp(x),
            images(1, 4),
        ),
    }


def collapsed(model: PreTrainedModel, rank: int | None) -> PreTrainedModel:
    """A copy with one FFN made a linear map; its numbers do not matter for the time."""
    small = copy.deepcopy(model)
    hidden = hidden_size(model.config)
    sizes = [(hidden, hidden)] if rank is None else [(hidden, rank), (rank, hidden)]
    maps = [0.02 * torch.randn(size) for size in sizes]
    carry_out(linear_ffn(Anatomy(small).block(COLLAPSED), maps, torch.zeros(hidden)), small, Undo())
    return small


def works(shape: Shape, model: PreTrainedModel, inputs: dict[str, Any]) -> dict[str, Work]:
    """What is timed of a model: its FFN, the block around it as the model calls it, and all of it."""
    block = Anatomy(model).stack().blocks[COLLAPSED]
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    handle = block.register_forward_pre_hook(lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
    model(**inputs)
    handle.remove()
    args, kwargs = calls[0]
    stream = args[0] if args else kwargs["hidden_states"]
    x = torch.randn_like(stream)
    return {
        "FFN": lambda: shape.ffn(block, x),
        "block": lambda: block(*args, **kwargs),
        "model": lambda: model(**inputs),
    }


def flops(work: Work) -> int:
    """Of its matrix products, attention's included: the fused kernel of the CPU is not counted."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        work()
    return counter.get_total_flops()


def seconds(work: Work) -> float:
    start = perf_counter()
    work()
    return perf_counter() - start


def ratios(dense: Work, other: Work, budget: float) -> list[float]:
    """Times of `other` over times of `dense` in pairs, until the budget of seconds is used up."""
    for _ in range(3):
        dense(), other()
    found: list[float] = []
    start = perf_counter()
    while len(found) < LEAST_PAIRS or perf_counter() - start < budget:
        if len(found) % 2:
            below, above = seconds(dense), seconds(other)
        else:
            above, below = seconds(other), seconds(dense)
        found.append(above / below)
    return found


def others_cpu() -> float:
    """Seconds of CPU that all processes but this one have used so far; 0 where that is not known."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return 0.0
    user, nice, system = (int(ticks) for ticks in stat.read_text().split()[1:4])
    own = os.times()
    return (user + nice + system) / os.sysconf("SC_CLK_TCK") - own.user - own.system


def undisturbed(dense: Work, other: Work, budget: float) -> tuple[list[float], float]:
    """`ratios` while nobody else needs the machine, and how many cores others used after all."""
    for attempt in range(TRIES):
        if attempt:
            sleep(PAUSE)
        start, used = perf_counter(), others_cpu()
        found = ratios(dense, other, budget)
        others = (others_cpu() - used) / (perf_counter() - start)
        if others <= DISTURBED:
            break
    return found, others


def measure(shape: Shape, dtype: torch.dtype, budget: float, progress: tqdm) -> dict[int, dict[str, dict[str, float]]]:
    """Tokens -> what was timed -> its ratios."""
    torch.manual_seed(0)
    model = AutoModel.from_config(shape.config, dtype=dtype).eval()
    rank = hidden_size(model.config) // 4
    others = {"copy": copy.deepcopy(model), "full": collapsed(model, None), "low rank": collapsed(model, rank)}
    found: dict[int, dict[str, dict[str, float]]] = {}
    with inference(model):
        for tokens, inputs in shape.inputs.items():
            own = {name: value.to(dtype) if value.is_floating_point() else value for name, value in inputs.items()}
            dense = works(shape, model, own)
            found[tokens] = {}
            for which, what in COLUMNS:
                other = works(shape, others[which], own)[what]
                pairs, others_used = undisturbed(dense[what], other, budget)
                low, _, high = quantiles(pairs, n=4)
                found[tokens][f"{what}, {which}"] = {
                    "flops": flops(other) / flops(dense[what]),
                    "time": median(pairs),
                    "low": low,
                    "high": high,
                    "pairs": len(pairs),
                    "others": others_used,
                }
                progress.update()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=1.5, help="of paired runs for each cell, at least")
    args = parser.parse_args()
    torch.manual_seed(0)
    todo = shapes()
    total = len(COLUMNS) * len(DTYPES) * sum(len(shape.inputs) for shape in todo.values())
    lines = [
        "Collapsed over dense: ratio of FLOPs → ratio of times, median of the pairs (quartiles).",
        "",
        "| shape | dtype | tokens | " + " | ".join(COLUMNS.values()) + " |",
        "|---" * (3 + len(COLUMNS)) + "|",
    ]
    data: dict[str, object] = {}
    with tqdm(total=total) as progress:
        for name, shape in todo.items():
            for dtype in DTYPES:
                kind = str(dtype).removeprefix("torch.")
                found = measure(shape, dtype, args.seconds, progress)
                for tokens, cells in found.items():
                    row = [_cell(cells[f"{what}, {which}"]) for which, what in COLUMNS]
                    lines.append(f"| {name} | {kind} | {tokens} | " + " | ".join(row) + " |")
                data[f"{name} {kind}"] = found
    capability = torch.backends.cpu.get_cpu_capability()
    lines += [
        "",
        f"{torch.get_num_threads()} threads, {capability}; one text at a time, without a cache of keys; 1 or 4 images.",
    ]
    write_result("collapse_speed", "\n".join(lines), data)


def _cell(of: dict[str, float]) -> str:
    mark = " disturbed" if of["others"] > DISTURBED else ""
    return f"{of['flops']:.3f} → {of['time']:.2f} ({of['low']:.2f}, {of['high']:.2f}){mark}"


if __name__ == "__main__":
    main()
