"""How fast a smaller model reads and writes in each engine, over the uncompressed one in the same engine and run.

    python benchmarks/engine_speed.py                       # 8 blocks of Qwen2.5-0.5B's shape, random weights
    python benchmarks/engine_speed.py --full                # all 24
    python benchmarks/engine_speed.py --quantize PROGRAM    # llama.cpp's own llama-quantize: Q4_K_M on top

A prompt of 256 tokens and 32 after it, one sequence, on all cores; in turns, A B A B …, so that a busy machine slows
both alike. Beside the ratios stand the ideal ones: of products for reading, and of bytes for writing. Weights are
random: whether an engine says what Transformers says is a question for engines.py.
"""

from __future__ import annotations

import argparse
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from time import sleep
from typing import Any

import torch
from common import REFERENCE, VLLM, seconds, write_result
from torch import nn
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedModel

import hf_compress as hfc
from hf_compress.engines.gguf import FILE, Gguf
from hf_compress.engines.graphs import Onnx
from hf_compress.engines.vllm.target import Vllm
from hf_compress.evaluation.speed import median, speeds_in_turn
from hf_compress.modules.compact import CompactLinear
from hf_compress.rewrite.dense import write_out

PROMPT, NEW, ROUNDS = 256, 32, 5
PAUSE = 0.5  # seconds, until the threads of the other model have ceased to wait for work at full speed
Timed = Callable[[list[int]], tuple[float, float]]  # seconds to read a prompt, and to write the tokens after it

KINDS: dict[str, hfc.CompressionConfig] = {
    "a quarter of the blocks less (MKA, DropBlocks)": hfc.DropBlocksConfig(ratio=0.25, criterion="last"),
    "half of the blocks less": hfc.DropBlocksConfig(ratio=0.5, criterion="last"),
    "FFNs narrower by a quarter (ILLC)": hfc.ILLCConfig(ratio=0.25, reduction="random", compensation="none"),
    "FFNs narrower by half": hfc.ILLCConfig(ratio=0.5, reduction="random", compensation="none"),
    "a quarter of the FFNs linear (LayerCollapse)": hfc.LayerCollapseConfig(ratio=0.25),
    "half of the FFNs linear": hfc.LayerCollapseConfig(ratio=0.5),
    "8 bits a weight (LRP)": hfc.LRPConfig(bits=8, allocation="uniform", rounding="nearest"),
    "4.5 bits a weight": hfc.LRPConfig(bits=4.5, allocation="uniform", rounding="nearest"),
    "bottlenecks (AdaptiveCompress)": hfc.AdaptiveCompressConfig(),
}


def random_model(blocks: int, folder: Path) -> Path:
    """Qwen2.5-0.5B's shape, but with the bundled model's tokens and no biases."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(REFERENCE)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=blocks,
        num_attention_heads=14,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return hfc.save(AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16), folder, tokenizer)


@dataclass(frozen=True)
class Ideal:
    """Products a token, and bytes of the weights that are read for it, as they are stored and as matrices."""

    products: int
    bytes: int
    dense_bytes: int

    @staticmethod
    def of(model: PreTrainedModel) -> Ideal:
        embedding = model.get_input_embeddings().weight
        maps = [part for part in model.modules() if isinstance(part, nn.Linear)]
        factors = [p for name, p in model.named_parameters() if "bottleneck" in name and p.ndim == 2]
        entries = sum(part.in_features * part.out_features for part in maps) + sum(p.numel() for p in factors)
        compact = [part for part in maps if isinstance(part, CompactLinear)]
        stored = sum(tensor.nbytes for part in compact for tensor in part.state_dict().values())
        plain = sum(part.weight.nbytes for part in maps if not isinstance(part, CompactLinear))
        own = stored + plain + sum(p.nbytes for p in factors)
        return Ideal(entries, own, entries * embedding.element_size())


def transformers_ratios(base: Path, small: Path) -> tuple[list[float], list[float]]:
    """Of reading and of writing, in each round; packed maps by the kernel."""
    models = [AutoModelForCausalLM.from_pretrained(folder).eval() for folder in (base, small)]
    if any(isinstance(part, CompactLinear) for part in models[1].modules()):
        hfc.use_kernels(models[1])
    one, other = speeds_in_turn(models, prompt=PROMPT, new_tokens=NEW, rounds=ROUNDS)
    reading = [a / b for a, b in zip(one.first_token, other.first_token, strict=True)]
    return reading, [b / a for a, b in zip(one.per_second, other.per_second, strict=True)]


@contextmanager
def vllm(folder: Path, python: str) -> Iterator[Timed]:
    """vLLM in bfloat16, without compiling; two requests, one of which stops at the first token."""
    with Vllm(python, "bfloat16").speaker(folder, None) as speaker:  # type: ignore[arg-type]

        def run(prompt: list[int]) -> tuple[float, float]:
            first = seconds(lambda: speaker.say(prompt, 1))
            # Another prompt, for what was read before is in vLLM's cache.
            return first, seconds(lambda: speaker.say(prompt[::-1], NEW + 1)) - first

        yield run


@contextmanager
def llama_cpp(file: Path) -> Iterator[Timed]:
    """llama.cpp, by its own clock."""
    with Gguf().speaker(file, None) as speaker:  # type: ignore[arg-type]
        asked = {"n_predict": NEW, "temperature": 0, "ignore_eos": True, "cache_prompt": False}

        def run(prompt: list[int]) -> tuple[float, float]:
            told = speaker._ask("completion", {"prompt": prompt, **asked})["timings"]
            return told["prompt_ms"] / 1000, told["predicted_ms"] / 1000

        yield run


@contextmanager
def onnx(folder: Path, model: PreTrainedModel) -> Iterator[Timed]:
    """ONNX Runtime in float32."""
    with Onnx().speaker(folder, model) as speaker:
        ours: Any = speaker

        def run(prompt: list[int]) -> tuple[float, float]:
            def read(ids: list[int], start: int) -> None:
                ours._read(torch.tensor([ids]), torch.arange(start, start + len(ids))[None])

            ours._forget()
            first = seconds(lambda: read(prompt, 0))
            return first, seconds(lambda: [read([5], len(prompt) + place) for place in range(NEW)])

        yield run


def ratios(base: Timed, small: Timed, prompts: Iterator[list[int]]) -> tuple[list[float], list[float]]:
    """Of reading and of writing, in each round, after one to warm up."""
    found = []
    for _ in range(ROUNDS + 1):
        own = []
        for timed in (base, small):
            sleep(PAUSE)
            own.append(timed(next(prompts)))
        found.append(own)
    rounds = found[1:]
    return [one[0] / other[0] for one, other in rounds], [one[1] / other[1] for one, other in rounds]


def random_prompts(vocabulary: int) -> Iterator[list[int]]:
    """Every one another: what an engine has read it may know."""
    generator = torch.Generator().manual_seed(0)
    while True:
        yield torch.randint(10, vocabulary, (PROMPT,), generator=generator).tolist()


def told(measured: tuple[list[float], list[float]]) -> str:
    """Reading / writing."""
    return " / ".join(f"{value:.2f} ± {error:.2f}" for value, error in map(median, measured))


class Engines:
    """The engines, each with the uncompressed model in it."""

    def __init__(self, base: Path, place: Path, python: str, quantize: str | None, stack: ExitStack) -> None:
        self.base, self.place, self.python, self.quantize = base, place, python, quantize
        self.tokenizer = AutoTokenizer.from_pretrained(REFERENCE)
        self.prompts = random_prompts(len(self.tokenizer))
        self.timed = {name: stack.enter_context(opened) for name, opened in self._opened(base)}

    def _opened(self, folder: Path) -> list[tuple[str, AbstractContextManager[Timed]]]:
        """What runs a model, by engine; ones whose form cannot say what it is are left out."""
        found: list[tuple[str, AbstractContextManager[Timed]]] = [("vLLM", vllm(folder, self.python))]
        model = AutoModelForCausalLM.from_pretrained(folder).eval()
        write_out(model)
        prompts = [list(range(10, 34))] * 2
        try:
            Gguf().check(model)
        except hfc.UnsupportedModelError:
            pass
        else:
            gguf = self._empty(folder, "gguf")
            Gguf("bf16").write(model, self.tokenizer, gguf, prompts)
            found.append(("llama.cpp", llama_cpp(gguf)))
            if self.quantize:
                smaller = self._empty(folder, "q4")
                command = [self.quantize, str(gguf / FILE), str(smaller / FILE), "Q4_K_M"]
                subprocess.run(command, check=True, capture_output=True)
                found.append(("llama.cpp, Q4_K_M", llama_cpp(smaller)))
        graph = self._empty(folder, "onnx")
        Onnx().write(model.float(), None, graph, prompts)
        return [*found, ("ONNX Runtime", onnx(graph, model))]

    def _empty(self, folder: Path, form: str) -> Path:
        path = self.place / f"{folder.name}-{form}"
        path.mkdir()
        return path

    def row(self, small: Path) -> dict[str, tuple[list[float], list[float]]]:
        """Ratios by engine; quantized ones over the uncompressed model in bfloat16."""
        found = {"Transformers": transformers_ratios(self.base, small)}
        for name, opened in self._opened(small):
            with opened as timed:
                found[name] = ratios(self.timed[name.partition(",")[0]], timed, self.prompts)
        return found

    def quantized(self) -> tuple[list[float], list[float]]:
        """Of the uncompressed model, Q4_K_M over bfloat16."""
        return ratios(self.timed["llama.cpp"], self.timed["llama.cpp, Q4_K_M"], self.prompts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--full", action="store_true", help="24 blocks")
    parser.add_argument("--vllm", default=str(VLLM), metavar="PYTHON")
    parser.add_argument("--quantize", metavar="PROGRAM")
    parser.add_argument("--only", nargs="+", default=[""], metavar="KIND")
    args = parser.parse_args()
    data = torch.randint(10, 8000, (16, 64), generator=torch.Generator().manual_seed(0))
    with TemporaryDirectory() as folder, ExitStack() as stack:
        base = random_model(24 if args.full else args.blocks, Path(folder) / "base")
        whole = Ideal.of(AutoModelForCausalLM.from_pretrained(base))
        engines = Engines(base, Path(folder), args.vllm, args.quantize, stack)
        columns = ["Transformers", *engines.timed]
        lines = [
            f"{PROMPT} tokens read / {NEW} tokens written, times as fast as the uncompressed model in bfloat16 in the "
            f"same engine ({torch.get_num_threads()} threads; float32 in ONNX Runtime; medians of {ROUNDS} rounds in "
            "turn, with standard errors). Ideal: products / bytes, in brackets with packed weights as matrices.",
            "",
            f"| | ideal | file | {' | '.join(columns)} |",
            "|---" * (len(columns) + 3) + "|",
        ]
        if args.quantize:
            cells = [told(engines.quantized()) if "Q4" in name else "1" for name in columns]
            lines.append(f"| uncompressed | 1 / 1 | 1.00 | {' | '.join(cells)} |")
        results: dict[str, dict[str, str]] = {}
        for number, kind in enumerate(tqdm([kind for kind in KINDS if kind.startswith(tuple(args.only))])):
            model = AutoModelForCausalLM.from_pretrained(base)
            hfc.compress(model, KINDS[kind], data)
            small, own = hfc.save(model, Path(folder) / f"small{number}", engines.tokenizer), Ideal.of(model)
            results[kind] = {name: told(measured) for name, measured in engines.row(small).items()}
            ideal = f"{whole.products / own.products:.2f} / {whole.bytes / own.bytes:.2f}"
            if own.bytes != own.dense_bytes:
                ideal += f" ({whole.bytes / own.dense_bytes:.2f})"
            size = (small / "model.safetensors").stat().st_size / (base / "model.safetensors").stat().st_size
            cells = [results[kind].get(name, "not said") for name in columns]
            lines.append(f"| {kind} | {ideal} | {size:.2f} | {' | '.join(cells)} |")
            print(lines[-1], flush=True)
        write_result("engine_speed", "\n".join(lines), results)


if __name__ == "__main__":
    main()
