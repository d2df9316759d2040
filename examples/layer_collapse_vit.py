"""LayerCollapse on a vision transformer, trained here from nothing on 8,000 images of CIFAR-10.

    python examples/layer_collapse_vit.py                # 2, 4 and all 6 FFNs, one seed; about 15 minutes on two cores
    python examples/layer_collapse_vit.py --full         # 1 to 6, three seeds
    python examples/layer_collapse_vit.py --data cifar10_subset.npz

Accuracy on 2,000 images, in the columns of collapse_columns.py, and a plot of it against the parameters that are left.
The images come from the Hub (uoft-cs/cifar10, the first of each class), or from a file with train_images, train_labels,
test_images and test_labels, in --data or ../shared/data/vision.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from collapse_columns import COLUMNS, RESULTS, Runs, Task, experiment
from sklearn.metrics import accuracy_score
from transformers import ViTConfig, ViTForImageClassification

from hf_compress.report.canvas import new_figure

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data" / "vision" / "cifar10_subset.npz"
BLOCKS = 6


def images(path: Path | None) -> dict[str, np.ndarray]:
    """Images (samples, 32, 32, 3) and labels of both parts."""
    if path is not None:
        return dict(np.load(path))
    arrays = {}
    for part, each in (("train", 800), ("test", 200)):
        whole = datasets.load_dataset("uoft-cs/cifar10", split=part)
        labels = np.array(whole["label"])
        chosen = np.concatenate([np.flatnonzero(labels == label)[:each] for label in range(10)])
        arrays[f"{part}_images"] = np.stack([np.asarray(whole[int(i)]["img"]) for i in chosen])
        arrays[f"{part}_labels"] = labels[chosen]
    return arrays


def vit_task(path: Path | None) -> Task:
    arrays = images(path)
    parts: dict[str, list[dict[str, Any]]] = {}
    pixels = {}
    for part in ("train", "test"):
        values = torch.tensor(arrays[f"{part}_images"]).permute(0, 3, 1, 2).float() / 127.5 - 1
        pixels[part] = values
        labels = arrays[f"{part}_labels"].tolist()
        parts[part] = [{"pixel_values": v, "label": label} for v, label in zip(values, labels, strict=True)]
    config = ViTConfig(
        image_size=32,
        patch_size=8,
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=BLOCKS,
        num_attention_heads=4,
        num_labels=10,
    )

    def build(seed: int) -> ViTForImageClassification:
        torch.manual_seed(seed)
        return ViTForImageClassification(config)

    return Task(
        build=build,
        train=parts["train"],
        test=parts["test"],
        calibration={"pixel_values": pixels["train"][:2048]},
        epochs=30,
        learning_rate=1e-3,
        again=2,
        learning_rate_again=3e-4,
        scores={"accuracy": lambda guesses, labels: accuracy_score(labels, guesses)},
        batch_size=64,
    )


def draw(runs: Sequence[Runs], counts: Sequence[int]) -> None:
    """Parameters against accuracy, a line a column, means over the seeds."""
    figure = new_figure(7, 4.5)
    axis = figure.add_subplot()
    for column in COLUMNS:
        keys = [("dense", 0), *((column, count) for count in counts)]
        sizes = [np.mean([one[key].parameters for one in runs]) / 1e6 for key in keys]
        accuracy = [np.mean([one[key].scores["accuracy"] for one in runs]) for key in keys]
        axis.plot(sizes, accuracy, marker="o", markersize=4, label=column)
    axis.set_xlabel("parameters, millions")
    axis.set_ylabel("accuracy")
    axis.set_title("ViT on CIFAR-10: what is left of it when FFNs are linear")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)
    figure.savefig(RESULTS / "layer_collapse_vit.svg", metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="file with the images, .npz")
    parser.add_argument("--seeds", type=int, help="1 by default, 3 with --full")
    parser.add_argument("--full", action="store_true", help="1 to 6 FFNs, three seeds")
    parser.add_argument("--resume", action="store_true", help="keep the seeds that an earlier run has finished")
    args = parser.parse_args()
    task = vit_task(args.data or (SHARED if SHARED.is_file() else None))
    counts = range(1, BLOCKS + 1) if args.full else (2, 4, BLOCKS)
    seeds = args.seeds or (3 if args.full else 1)
    draw(experiment("layer_collapse_vit", task, counts, seeds, resume=args.resume), counts)


if __name__ == "__main__":
    main()
