"""A few runs in as many processes as torchrun starts: `test_processes` compares what each of them writes.

torchrun --nproc_per_node 2 -m tests.helpers.run_in_processes FOLDER
"""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import Trainer

import hf_compress as hfc
from tests.helpers.language import tiny_llama
from tests.helpers.runs import CALIBRATION, arguments, dense_rows, state_of, tiny_dense, token_rows

ROWS = 32
PAPER = hfc.LayerCollapseConfig(variant="paper", alpha_init=0.3, lc=0.7)
# Correlations are those within a process, so without them.
BOTTLENECKS = hfc.AdaptiveCompressConfig(layers=[1], retention_final=0.5, contrastive=0, updates=1)
CASES = {
    "paper": (lambda: tiny_llama(3), PAPER, {"gradient_accumulation_steps": 2}),
    "paper and teacher": (lambda: tiny_llama(3), PAPER, {"teacher": True}),
    "paper, own counts": (lambda: tiny_llama(3), PAPER, {"average_tokens_across_devices": False}),
    "dense": (tiny_dense, PAPER, {"gradient_accumulation_steps": 2, "teacher": True}),
    "gradual": (lambda: tiny_llama(4), hfc.LayerCollapseConfig(num_layers=2, gradual=True), {}),
    "bottlenecks, equal counts": (lambda: tiny_llama(3), BOTTLENECKS, {}),
    "bottlenecks beside": (lambda: tiny_llama(3), replace(BOTTLENECKS, mode="observe"), {}),
    "merged": (lambda: tiny_llama(4), hfc.MKAConfig(num_merges=1), {"teacher": True}),
}


def run(case: str, folder: Path, processes: int) -> dict[str, torch.Tensor]:
    """The weights after four steps of eight rows, with those of α, and the last entry of the log."""
    build, config, settings = CASES[case]
    settings = dict(settings)
    model, equal = build(), case.endswith("counts")
    rows = dense_rows(ROWS) if case == "dense" else token_rows(ROWS, ignored=not equal)
    steps = settings.get("gradient_accumulation_steps", 1)
    calibration = None if case == "dense" else CALIBRATION
    callback = hfc.CompressionCallback(config, calibration, teacher=build() if settings.pop("teacher", False) else None)
    batch = 8 // processes // steps
    args = arguments(folder / "run", per_device_train_batch_size=batch, weight_decay=0.5, **settings)
    trainer = Trainer(model, args, train_dataset=rows, callbacks=[callback])
    trainer.train()
    trainer.save_model(str(folder / "saved"))
    alphas = [entry.get("compression/alpha_2", 0.0) for entry in trainer.state.log_history if "loss" in entry]
    found = getattr(callback.schedule, "found", None)
    beside = {} if found is None else found.places[1].module.state_dict()
    return state_of(model) | {"alphas": torch.tensor(alphas)} | beside


def fitted(processes: int) -> dict[str, torch.Tensor]:
    """Bottlenecks that were fitted to a model as it is, on eight rows a step, in parts of unequal length."""
    rows = [row[: 8 if number % 2 else 5].tolist() for number, row in enumerate(CALIBRATION)]
    config = replace(BOTTLENECKS, epochs=2)
    found = hfc.fit(tiny_llama(3), config, rows, options=hfc.DataOptions(batch_size=8 // processes))
    return found.places[1].module.state_dict() | {"errors": torch.tensor(found.places[1].curve["error"])}


def refusal(folder: Path) -> str:
    """What is said of changes in mid-run."""
    callback = hfc.CompressionCallback(hfc.DropBlocksConfig(num_blocks=1, criterion="last"), every=1)
    trainer = Trainer(tiny_llama(2), arguments(folder), train_dataset=token_rows(), callbacks=[callback])
    try:
        trainer.train()
    except ValueError as error:
        return str(error)
    return "no refusal"


def main(folder: Path) -> None:
    rank, processes = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.set_num_threads(1)
    for case in CASES:
        own = folder / case / f"rank {rank}"
        own.mkdir(parents=True)
        save_file(run(case, own, processes), own / "end.safetensors")
    save_file(fitted(processes), folder / f"fitted {rank}.safetensors")
    (folder / f"refusal {rank}").write_text(refusal(folder / "refused"))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
