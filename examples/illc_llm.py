"""ILLC on a language model: perplexity, cloze accuracy and speed against the width of its FFNs, beside every control.

    python examples/illc_llm.py                                     # the bundled 11 M model; widths 0.7 and 0.5
    python examples/illc_llm.py --full                              # 0.9 to 0.5, whole documents, all questions
    python examples/illc_llm.py --model gpt2 --calibration my_calibration.jsonl --heldout my_heldout.jsonl

All columns keep the same number of hidden units in every FFN, chosen and compensated on the same texts. For the bundled
model the table goes to benchmarks/results/, and the card of the model at --width to model_cards/.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path

import torch
from illc_columns import COLUMNS, DEFAULT
from llm import REFERENCE, Task, accuracy, arguments, publish, task_of
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

import hf_compress as hfc
from hf_compress.evaluation.size import parameter_count
from hf_compress.evaluation.speed import speed_ratio
from hf_compress.report.stages import environment

RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"
Scores = dict[tuple[str, float], hfc.EvaluationResult]


def score_all(task: Task, gammas: list[float]) -> tuple[Scores, dict[float, PreTrainedModel]]:
    """The scores of every column at every width, and the default's models."""
    scores: Scores = {("dense", 1.0): task.score(task.fresh())}
    models = {}
    for gamma in gammas:
        for name, settings in COLUMNS.items():
            config = hfc.ILLCConfig(gamma=gamma, **settings)
            model = hfc.compress(task.fresh(), config, task.calibration, task.tokenizer)
            scores[name, gamma] = task.score(model)
            if name == DEFAULT:
                models[gamma] = model
            print(f"{gamma:g} {name}: {scores[name, gamma].perplexity}", flush=True)
    return scores, models


def table(scores: Scores, gammas: list[float], shares: dict[float, str]) -> str:
    dense = scores["dense", 1.0]
    lines = [
        f"Perplexity on {dense.perplexity.documents} held-out documents, {dense.perplexity.tokens:,} tokens; "
        f"uncompressed: {dense.perplexity}. Loss differences from the default in nats, paired by document; cloze: "
        f"accuracy (uncompressed {accuracy(dense)}).",
        "",
        "| hidden units kept | " + " | ".join(f"{gamma:g}" for gamma in gammas) + " |",
        "|---" * (len(gammas) + 1) + "|",
        "| " + " | ".join(["parameters; FLOPs → time of a forward pass", *(shares[gamma] for gamma in gammas)]) + " |",
    ]
    for name in COLUMNS:
        lines.append(f"| {name} | " + " | ".join(cell(scores, name, gamma) for gamma in gammas) + " |")
    return "\n".join(lines)


def cell(scores: Scores, name: str, gamma: float) -> str:
    own, other = scores[DEFAULT, gamma], scores[name, gamma]
    text = f"{other.perplexity.value:.2f}"
    if name != DEFAULT:
        gap, error = other.perplexity.loss_difference(own.perplexity)
        text += f" ({gap:+.4f} ± {error:.4f})"
    return f"{text}, {accuracy(other)}"


def share(model: PreTrainedModel, dense: PreTrainedModel) -> str:
    """Parameters, FLOPs and time of a model as shares of the dense one's; the time measured in pairs."""
    ids = torch.randint(dense.config.vocab_size, (1, 256), generator=torch.Generator().manual_seed(0))
    flops = []
    for one in (model, dense):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            one(input_ids=ids, use_cache=False)
        flops.append(counter.get_total_flops())
    time = speed_ratio(dense, model, repeats=31)
    return (
        f"{parameter_count(model) / parameter_count(dense):.3f}; {flops[0] / flops[1]:.3f} → "
        f"{time.value:.3f} ± {time.standard_error:.3f}"
    )


def main() -> None:
    parser = arguments(__doc__, "manuals-llama-illc")
    parser.add_argument("--gammas", type=float, nargs="+", help="shares of the hidden units to keep")
    parser.add_argument("--width", type=float, default=0.7, help="the one of them whose model is saved")
    args = parser.parse_args()
    gammas = args.gammas or ([0.9, 0.8, 0.7, 0.6, 0.5] if args.full else [0.7, 0.5])
    gammas = sorted({*gammas, args.width}, reverse=True)
    task = task_of(args)
    if not args.full:
        task = task.shortened()
    scores, models = score_all(task, gammas)
    dense = task.fresh()
    text = table(scores, gammas, {gamma: share(copy.deepcopy(models[gamma]), dense) for gamma in gammas})
    made = ", ".join(f"{key} {value}" for key, value in environment().items())
    print(text)
    if args.model is None and args.calibration == REFERENCE / "calibration.jsonl":
        command = "python examples/illc_llm.py" + " --full" * args.full
        command += f" --gammas {' '.join(map(str, args.gammas))}" if args.gammas else ""
        (RESULTS / "illc_llm.md").write_text(f"{text}\n\nMade by `{command}` with {made}.\n")
        values = {f"{name} {gamma:g}": result.perplexity.value for (name, gamma), result in scores.items()}
        (RESULTS / "illc_llm.json").write_text(json.dumps(values, indent=1) + "\n")
    controls = {"uncompressed": scores["dense", 1.0]}
    controls |= {
        name: scores[name, args.width] for name in ("variance + ridge", "variance + bias (FLAP-like)", "random")
    }
    publish(task, models[args.width], args, parser, lambda: controls)


if __name__ == "__main__":
    main()
