"""What the benchmarks share: the reference model, its texts, and how a result is written down."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from time import perf_counter

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from hf_compress import CompressionConfig, compress
from hf_compress.calibration.capture import forward, inference
from hf_compress.calibration.data import prepare
from hf_compress.report.stages import environment

ROOT = Path(__file__).resolve().parent.parent
REFERENCE = ROOT / "examples" / "reference" / "manuals-llama-12l"
VLLM = ROOT / ".venv-vllm" / "bin" / "python"  # of `make vllm`
RESULTS = ROOT / "benchmarks" / "results"
WINDOW = 256  # tokens

logging.set_verbosity_error()


def load(directory: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A fresh model, in the dtype it is stored in, and its tokenizer."""
    return AutoModelForCausalLM.from_pretrained(directory).eval(), AutoTokenizer.from_pretrained(directory)


def texts(split: str) -> list[str]:
    """The bundled documents: "calibration" or "heldout"."""
    file = ROOT / "examples" / "reference" / f"{split}.jsonl"
    return [json.loads(line)["text"] for line in file.read_text().splitlines()]


def held_out_passages() -> list[str]:
    """Characters 1,500 to 3,000 of each held-out document: past the preambles that manual pages share."""
    return [text[1500:3000] for text in texts("heldout") if len(text) > 3000]


def calibration_windows(tokenizer: PreTrainedTokenizerBase, samples: int, seed: int = 0) -> Tensor:
    """(samples, 256) token ids: the calibration documents joined, cut into windows, drawn without replacement."""
    encoded = tokenizer(texts("calibration"), add_special_tokens=False, verbose=False)["input_ids"]
    stream = torch.tensor([token for ids in encoded for token in [*ids, tokenizer.eos_token_id]])
    windows = stream[: len(stream) // WINDOW * WINDOW].view(-1, WINDOW)
    if samples > len(windows):
        raise SystemExit(
            f"the calibration documents hold {len(windows)} windows of {WINDOW} tokens; asked for {samples}"
        )
    return windows[torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))[:samples]]


def plain_pass(model: PreTrainedModel, windows: Tensor) -> None:
    """One forward pass over the batches that `compress` would use."""
    with inference(model):
        for batch in prepare(windows, model, None):
            forward(model, batch)


def seconds(work: Callable[[], object]) -> float:
    """Wall time of some work."""
    start = perf_counter()
    work()
    return perf_counter() - start


def peak_of_this_process() -> float:
    """Largest resident set so far in MiB (Linux). Not getrusage's, which a child inherits from its parent."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1024


def cost_ratios(directory: Path, config: CompressionConfig, windows: Tensor, repeats: int) -> list[float]:
    """Time of `compress` over the mean of the plain passes before and after it."""
    found = []
    reference, _ = load(directory)
    before = seconds(lambda: plain_pass(reference, windows))
    for _ in range(repeats):
        model, _ = load(directory)
        cost = seconds(lambda model=model: compress(model, config, windows))  # type: ignore[misc]
        after = seconds(lambda: plain_pass(reference, windows))
        found.append(cost / ((before + after) / 2))
        before = after
    return found


def write_result(name: str, markdown: str, data: object) -> None:
    """Print a result and put it, with the command that made it, under benchmarks/results."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    given = [Path(word).name if word.startswith("..") else word for word in sys.argv[1:]]
    command = " ".join(["python", str(Path(sys.argv[0]).resolve().relative_to(ROOT)), *given])
    made = ", ".join(f"{key} {value}" for key, value in environment().items())
    text = f"{markdown}\n\nMade by `{command}` with {made}.\n"
    (RESULTS / f"{name}.md").write_text(text)
    (RESULTS / f"{name}.json").write_text(json.dumps(data, indent=1) + "\n")
    print(text)
