"""AdaptiveCompress on a language model: what is left of its streams, and of its perplexity, at every retention.

    python examples/adaptive_compress_llm.py                    # the bundled model, one seed; some 15 minutes
    python examples/adaptive_compress_llm.py --seeds 3
    python examples/adaptive_compress_llm.py --full             # three seeds, four times the training, whole documents
    python examples/adaptive_compress_llm.py --model gpt2 --calibration my.jsonl --heldout other.jsonl

Bottlenecks of every kind and size learn behind the same three blocks in one pass over the calibration texts: the
default, the paper's, and as controls of as many (active) features PCA, PCA with the default's skip, a linear
autoencoder, TopK and BatchTopK dictionaries. Explained variance, error, and active features are each block's own;
perplexity and KL are the model's with all three spliced in. For the bundled model the tables go to benchmarks/results/,
and the card of the model with the default's bottlenecks at 95% to model_cards/.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass, replace
from math import exp
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from llm import Task, arguments, publish, task_of

import hf_compress as hfc
from hf_compress.features.reconstruction import Reconstruction, SpliceQuality, reconstruction, splice_qualities
from hf_compress.report.stages import environment

RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"
ROUNDING = 1e-4  # an error a token below this is one of float32, of streams whose norms are around 100
PIECE = 1500  # characters: texts are cut to what about fits the model's positions, so that none of them goes to waste
COLUMNS: dict[str, dict[str, Any]] = {
    "default": {},
    "PCA": {"variant": "pca"},
    "PCA, the default's skip": {"variant": "pca", "skip": 0.1},
    "linear autoencoder": {"variant": "linear"},
    "TopK, 4 × the width": {"variant": "topk"},
    "BatchTopK, 4 × the width": {"variant": "batchtopk"},
    "paper": {"variant": "paper"},
}


@dataclass(frozen=True)
class Row:
    """One column at one retention and seed."""

    blocks: dict[int, Reconstruction]
    splice: SpliceQuality


Rows = dict[tuple[str, float, int], Row]


def pieces(texts: list[str]) -> list[str]:
    """The texts, cut."""
    return [text[start : start + PIECE] for text in texts for start in range(0, len(text), PIECE)]


def run(task: Task, retentions: list[float], seeds: int, epochs: int) -> Rows:
    """Fit every bottleneck in one pass, and score each on texts that none has seen."""
    keys = [(name, share, seed) for seed in range(seeds) for share in retentions for name in COLUMNS]
    keys = [key for key in keys if not (key[0].startswith("PCA") and key[2])]  # nothing in it is random
    configs = [
        hfc.AdaptiveCompressConfig(**COLUMNS[name], retention_final=share, retention_init=max(0.999, share), seed=seed)
        for name, share, seed in keys
    ]
    configs = [hfc.AdaptiveCompressConfig.from_dict(config.to_dict() | {"epochs": epochs}) for config in configs]
    model = task.fresh()
    fitted = hfc.fit(model, configs, pieces(task.calibration), task.tokenizer)
    splices = splice_qualities(model, fitted, task.heldout, task.tokenizer)
    return {
        key: Row(reconstruction(model, found, task.heldout, task.tokenizer), splice)
        for key, found, splice in zip(keys, fitted, splices, strict=True)
    }


def table(rows: Rows, share: float) -> str:
    """One retention: a line for each column, means over blocks and seeds, ± the standard deviation over seeds."""
    pca = mean(one.token_error for one in rows["PCA", share, 0].blocks.values())
    lines = [
        "| | features active | explained variance | error a token | … over PCA's | KL | perplexity | recovered |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in COLUMNS:
        own = [row for (column, retention, _), row in sorted(rows.items()) if (column, retention) == (name, share)]
        errors = [mean(one.token_error for one in row.blocks.values()) for row in own]
        cells = [
            spread([mean(one.l0 for one in row.blocks.values()) for row in own], "{:.0f}"),
            spread([mean(one.explained_variance for one in row.blocks.values()) for row in own], "{:.4f}"),
            spread(errors, "{:.4g}"),
            over(mean(errors), pca),
            spread([row.splice.divergence for row in own], "{:.4f}"),
            spread([row.splice.perplexities[1] for row in own], "{:.2f}"),
            spread([row.splice.recovered for row in own], "{:.4f}"),
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def over(error: float, pca: float) -> str:
    """The ratio, where PCA's error is more than what float32 makes of 0."""
    if pca > ROUNDING:
        return f"{error / pca:.3f}"
    return "both 0, rounded" if error < ROUNDING else "PCA's is 0"


def spread(values: list[float], form: str) -> str:
    """The mean, and the standard deviation where there are several."""
    text = form.format(mean(values))
    return text + (f" ± {form.format(stdev(values))}" if len(values) > 1 and stdev(values) > 0 else "")


def main() -> None:
    parser = arguments(__doc__, "out/manuals-llama-adaptive-compress")
    parser.add_argument("--seeds", type=int, help="1 by default, 3 with --full")
    parser.add_argument("--no-card", action="store_true", help="the tables alone")
    args = parser.parse_args()
    task = task_of(args)
    if not args.full:
        task = task.shortened()
        task = replace(task, heldout=task.heldout[::2], calibration=pieces(task.calibration)[::2])
    retentions = [0.999, 0.95, 0.5, 0.25, 0.1]
    seeds = args.seeds or (3 if args.full else 1)
    rows = run(task, retentions, seeds, epochs=2 if args.full else 1)
    clean = next(iter(rows.values())).splice
    layers = sorted(next(iter(rows.values())).blocks)
    text = "\n\n".join(
        [
            f"Behind blocks {layers}, {seeds} seed(s); {clean.tokens:,} predictions on held-out texts, perplexity of "
            f"the model as it is {clean.perplexities[0]:.2f}, with zeros in these places {exp(clean.zeroed):,.0f}.",
            *(f"**{share:.1%} of the width**\n\n{table(rows, share)}" for share in retentions),
        ]
    )
    print(text)
    if args.model is None:
        write(text, rows, args)
    if not args.no_card:
        publish_default(task, args, parser)


def write(text: str, rows: Rows, args: argparse.Namespace) -> None:
    """Tables and figures, with the command that made them, for the bundled model."""
    command = "python examples/adaptive_compress_llm.py" + (" --full" if args.full else "")
    command += f" --seeds {args.seeds}" if args.seeds else ""
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "adaptive_compress_llm.md").write_text(f"`{command}`\n\n{text}\n", encoding="utf-8")
    figures = [
        {"column": name, "retention": share, "seed": seed, "splice": asdict(row.splice)}
        | {"blocks": {str(layer): asdict(one) for layer, one in row.blocks.items()}}
        for (name, share, seed), row in rows.items()
    ]
    whole = {"command": command, "environment": environment(), "rows": figures}
    (RESULTS / "adaptive_compress_llm.json").write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")


def publish_default(task: Task, args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """The model with the default's bottlenecks at 95%, and its card."""

    def spliced(**settings: Any) -> Any:
        config = hfc.AdaptiveCompressConfig(**settings)
        return hfc.compress(task.fresh(), config, pieces(task.calibration), task.tokenizer)

    def controls() -> dict[str, hfc.EvaluationResult]:
        return {
            "uncompressed": task.score(task.fresh()),
            "PCA, as many features": task.score(spliced(variant="pca")),
            "the paper's variant": task.score(spliced(variant="paper")),
        }

    publish(task, spliced(), args, parser, controls)


if __name__ == "__main__":
    main()
