"""What several processes do together, for `test_processes` of calibration and of the methods.

python -m tests.helpers.shared_work RUN FOLDER PROCESSES RANK
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

import hf_compress as hfc
from hf_compress.methods.lrp import grams
from hf_compress.numerics import cholesky
from tests.helpers.language import tiny_llama
from tests.helpers.mixtures import mixtral
from tests.helpers.runs import CALIBRATION, dense_rows, same, state_of, tiny_dense
from tests.helpers.tiny import tiny_model

Case = tuple[Callable[[], PreTrainedModel], hfc.CompressionConfig]
OPTIONS = hfc.DataOptions(batch_size=6)  # eleven batches, the last one smaller


def _llama() -> PreTrainedModel:
    return tiny_llama(4)


def _deep() -> PreTrainedModel:
    return tiny_llama(9)


CASES: dict[str, Case] = {
    "drop_blocks by influence": (_llama, hfc.DropBlocksConfig(num_blocks=1)),
    "drop_blocks by angle": (_llama, hfc.DropBlocksConfig(num_blocks=2, criterion="angular")),
    "drop_blocks by loss": (_llama, hfc.DropBlocksConfig(num_blocks=2, criterion="perplexity")),
    "mka": (_llama, hfc.MKAConfig(num_merges=1, refit_tokens=256)),
    "mka by estimates": (_deep, hfc.MKAConfig(num_merges=2)),
    "mka, paper": (_llama, hfc.MKAConfig(num_merges=1, variant="paper")),
    "illc": (_llama, hfc.ILLCConfig(ratio=0.25)),
    "illc of heads": (lambda: tiny_model("qwen2"), hfc.ILLCConfig(ratio=0.25, head_gamma=0.5)),
    "illc with a bias": (_llama, hfc.ILLCConfig(ratio=0.25, reduction="variance", compensation="bias")),
    "illc, paper": (_llama, hfc.ILLCConfig(ratio=0.25, variant="paper")),
    "illc by representatives": (_llama, hfc.ILLCConfig(ratio=0.25, reduction="representative")),
    "illc, adaptive": (_llama, hfc.ILLCConfig(ratio=0.25, allocation="adaptive")),
    "illc around an example": (tiny_dense, hfc.ILLCConfig(ratio=0.25, example=(0.0,) * 8, kernel_width=5)),
    "illc of experts": (mixtral, hfc.ILLCConfig(ratio=0.25)),
    "lrp, bits": (_llama, hfc.LRPConfig(bits=6, group_size=16)),
    "lrp, bits by relevance": (_llama, hfc.LRPConfig(bits=6, group_size=16, allocation="relevance")),
    "lrp, bits of modules": (_llama, hfc.LRPConfig(bits=7, group_size=16, per="module")),
    "lrp, sparse": (_llama, hfc.LRPConfig(sparsity=0.5, compensation="none")),
    "lrp, sparse and solved": (_llama, hfc.LRPConfig(sparsity=0.5)),
    "lrp, sparse by wanda": (_llama, hfc.LRPConfig(sparsity=0.5, score="wanda", compensation="none")),
    "lrp, sparse and packed": (_llama, hfc.LRPConfig(sparsity=0.25, bits=7, group_size=16, compensation="none")),
    "lrp, paper": (_llama, hfc.LRPConfig(variant="paper", split=(8, 4), prune=False)),
    "lrp of units": (_llama, hfc.LRPConfig(sparsity=0.25, granularity="neuron")),
    "lrp of blocks": (_llama, hfc.LRPConfig(sparsity=0.25, granularity="block")),
    "lrp of experts": (mixtral, hfc.LRPConfig(bits=6, group_size=16)),
    "illc, in blocks of rows": (_llama, hfc.ILLCConfig(ratio=0.25)),
    "lrp of experts, in blocks of rows": (mixtral, hfc.LRPConfig(bits=6, group_size=16)),
    "lrp, bits, in blocks of rows": (_llama, hfc.LRPConfig(bits=6, group_size=16)),
    "layer_collapse": (_llama, hfc.LayerCollapseConfig(num_layers=2)),
    "layer_collapse by loss": (_llama, hfc.LayerCollapseConfig(num_layers=1, criterion="loss", rank=4)),
}


@contextmanager
def _in_blocks_of_rows() -> Iterator[None]:
    """Inside, processes factorise and invert narrow matrices together too, as they do wide ones."""
    with patch.object(cholesky, "_ROWS", 8), patch.object(grams, "NARROW", 8):
        yield


def rows_for(model: PreTrainedModel) -> Any:
    """Calibration data: of some samples less, and some longer, than of others."""
    if model.main_input_name == "input_values":
        return torch.stack([row["input_values"] for row in dense_rows(64)])
    ids = CALIBRATION % (model.config.vocab_size - 8) + 4
    return [row[: 4 + number % 5].tolist() for number, row in enumerate(ids)]


def compressed(case: str) -> tuple[dict[str, Tensor], list[Any]]:
    """The tensors that a case ends with, and its edits."""
    build, config = CASES[case]
    with _in_blocks_of_rows() if "in blocks of rows" in case else nullcontext():
        model = hfc.compress(build(), config, rows_for(build()), options=OPTIONS)
    stage = model.compression_report.stages[-1]
    return state_of(model), stage.edits


def agreed(folder: Path, rank: int) -> None:
    """What is refused, and that work goes on afterwards."""
    build, config = CASES["drop_blocks by influence"]
    model, rows = build(), rows_for(build())

    def said(act: Callable[[], object]) -> str:
        try:
            act()
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return "nothing"

    other = hfc.DropBlocksConfig(num_blocks=1 + rank)
    with torch.no_grad():
        moved = build()
        moved.model.layers[2].mlp.up_proj.weight[3, 5] += 1e-3 * rank
    found = {
        "data": said(lambda: hfc.compress(model, config, rows[rank:], options=OPTIONS)),
        "settings": said(lambda: hfc.compress(model, other, rows, options=OPTIONS)),
        "model": said(lambda: hfc.compress(moved, config, rows, options=OPTIONS)),
        "few": said(lambda: hfc.compress(model, config, rows[:6], options=OPTIONS)),
        "failing": said(lambda: hfc.compress(_failing(build(), rank), config, rows, options=OPTIONS)),
        "no data": said(lambda: hfc.compress(model, config, rows if rank else None, options=OPTIONS)),
        "after": said(lambda: hfc.compress(model, config, rows, options=OPTIONS)),
        "saved": said(lambda: hfc.save(model, folder / "saved")),
        "saved again": said(lambda: hfc.save(model, folder / "saved")),
    }
    (folder / f"said {rank}.json").write_text(json.dumps(found))


def _failing(model: PreTrainedModel, rank: int, fail: Callable[[], object] | None = None) -> PreTrainedModel:
    """A model whose third block does not run in the second process."""

    def hook(*_: Any) -> None:
        if rank == 1 and dist.is_initialized() and len(seen) > 4:
            (fail or (lambda: 1 / 0))()
        seen.append(0)

    seen: list[int] = []
    model.model.layers[2].register_forward_pre_hook(hook)
    return model


def dying(folder: Path, rank: int) -> None:
    """A process that ends in the midst of it."""
    build, config = CASES["illc"]
    try:
        hfc.compress(_failing(build(), rank, lambda: os._exit(7)), config, rows_for(build()), options=OPTIONS)
    except hfc.ProcessesError as error:
        (folder / "told").write_text(str(error))


def resumed(folder: Path, rank: int) -> None:
    """A run that goes on from its workdir, in the midst of what several blocks have in common."""
    config, compute = hfc.LRPConfig(bits=6, group_size=16), hfc.Compute(workdir=folder / "work")
    results = folder / "work" / "results"
    states, names = [], []
    for _ in range(2):
        model = hfc.compress(tiny_llama(5), config, rows_for(tiny_llama(5)), options=OPTIONS, compute=compute)
        states.append(state_of(model))
        names.append(sorted(path.name for path in results.iterdir()))
        dist.barrier()
        for path in results.iterdir() if rank == 0 else ():
            if not path.name.startswith("unexplained-inputs-of-block-0"):
                path.unlink()
        dist.barrier()
    (folder / f"resumed {rank}.json").write_text(json.dumps([same(*states), *names]))


def all_cases(folder: Path, rank: int) -> None:
    """Every case."""
    for case in CASES:
        tensors, edits = compressed(case)
        save_file(tensors, folder / f"{case} {rank}.safetensors")
        (folder / f"{case} {rank}.json").write_text(json.dumps(edits))


def start(run: str, folder: Path, processes: int = 2) -> list[int]:
    """The exit codes of so many processes that do a run."""
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, "-m", "tests.helpers.shared_work", run, str(folder), str(processes)]
    started = [subprocess.Popen([*command, str(rank)], env=environment) for rank in range(processes)]
    try:
        return [process.wait(timeout=500) for process in started]
    finally:
        for process in started:
            process.kill()


def main(run: str, folder: Path, processes: int, rank: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder / 'meeting'}", rank=rank, world_size=processes)
    {"agreed": agreed, "dying": dying, "resumed": resumed, "all_cases": all_cases}[run](folder, rank)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
