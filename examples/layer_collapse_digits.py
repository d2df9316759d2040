"""LayerCollapse on a plain dense network for scikit-learn's digits: ReLU, GELU and SwiGLU, over ten seeds.

    python examples/layer_collapse_digits.py            # 1 and all 3 FFNs; 10 seeds; about ten minutes on two cores
    python examples/layer_collapse_digits.py --full     # 1, 2 and 3

First the paper's error identity, on the trained ReLU network: what an FFN with PReLU loses by its collapse is
−(1 − α)·W₂·min(z, 0), exactly. Then accuracy on a held-out part, in the columns of collapse_columns.py.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
from collapse_columns import Task, run, save_table, table
from sklearn.datasets import load_digits
from sklearn.metrics import accuracy_score
from torch import Tensor
from transformers import PreTrainedModel

import hf_compress as hfc

KINDS = {"ReLU": ("relu", False), "GELU": ("gelu", False), "SwiGLU": ("silu", True)}
BLOCKS = 3


def digits_task(activation: str, gated: bool) -> Task:
    data = load_digits()
    x, y = (data.data / 16).astype(np.float32), data.target
    order = np.random.default_rng(0).permutation(len(x))
    rows = [{"input_values": x[i], "label": int(y[i])} for i in order]
    config = hfc.DenseConfig(
        input_size=64,
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=BLOCKS,
        hidden_act=activation,
        gated=gated,
        num_labels=10,
    )
    return Task(
        build=lambda seed: hfc.DenseForClassification(config),
        train=rows[:1200],
        test=rows[1200:],
        calibration={"input_values": torch.tensor(x[order[:1200]])},
        epochs=20,
        learning_rate=2e-3,
        again=8,
        learning_rate_again=1e-3,
        scores={"accuracy": lambda guesses, labels: accuracy_score(labels, guesses)},
    )


@torch.no_grad()
def identity_error(model: PreTrainedModel, x: Tensor, alpha: float) -> tuple[float, float]:
    """Largest error of a collapse at α that the identity does not explain, and the largest that there is."""
    ffn, stream = model.layers[0].mlp.double(), model.embedding.double()(x.double())
    z = ffn.up_proj(stream)
    trained = ffn.down_proj(z.clamp(min=0) + alpha * z.clamp(max=0))
    collapsed = ffn.down_proj(z)  # W₂(W₁x + b₁) + b₂
    predicted = -(1 - alpha) * z.clamp(max=0) @ ffn.down_proj.weight.T
    error = trained - collapsed
    return float((error - predicted).abs().max()), float(error.abs().max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--full", action="store_true", help="2 FFNs too")
    args = parser.parse_args()
    counts = range(1, BLOCKS + 1) if args.full else (1, BLOCKS)
    parts = []
    for name, (activation, gated) in KINDS.items():
        task = digits_task(activation, gated)
        if name == "ReLU":
            model = task.dense(0)
            for alpha in (0.0, 0.5, 0.95):
                left, whole = identity_error(model, task.calibration["input_values"], alpha)
                parts.append(f"Error identity at α = {alpha}: largest error {whole:.3g}, not explained {left:.1e}.")
        runs = [run(task, counts, seed) for seed in range(args.seeds)]
        parts += [f"\n## {name}, {args.seeds} seeds\n", table(runs, counts)]
    save_table("layer_collapse_digits", "\n".join(parts))


if __name__ == "__main__":
    main()
