"""MKA on a trained language model: look at the blocks, merge a quarter, save, load, score, write the model card.

    python examples/mka_llm.py                        # the bundled model and texts; some minutes on two cores
    python examples/mka_llm.py --full                 # the whole cloze task
    python examples/mka_llm.py --model gpt2 --calibration my.jsonl --heldout other.jsonl --output out/gpt2-9l

Writes the model and a heatmap of its blocks' similarity to --output, and its card, with the scores measured in this run
and those of its controls, to model_cards/ (for the bundled model) and into the model's folder.
"""

from __future__ import annotations

from llm import Task, arguments, publish, task_of

import hf_compress as hfc


def controls(task: Task, ratio: float) -> dict[str, hfc.EvaluationResult]:
    """The scores of the uncompressed model, of the paper's variant, and of the simplest things of the same size."""
    return {
        "uncompressed": task.score(task.fresh()),
        "MKA (paper): averaging": task.compressed(hfc.MKAConfig(ratio=ratio, variant="paper")),
        "last blocks left out": task.compressed(hfc.DropBlocksConfig(ratio=ratio, criterion="last")),
        "block influence (ShortGPT)": task.compressed(hfc.DropBlocksConfig(ratio=ratio, criterion="block_influence")),
    }


def main() -> None:
    parser = arguments(__doc__, "out/manuals-llama-9l-mka")
    parser.add_argument("--ratio", type=float, default=0.25)
    args = parser.parse_args()
    task = task_of(args)
    model = task.fresh()
    analysis = hfc.analyze(model, task.calibration, task.tokenizer)
    model = hfc.compress(model, hfc.MKAConfig(ratio=args.ratio), task.calibration, task.tokenizer)
    publish(task, model, args, parser, lambda: controls(task, args.ratio))
    analysis.plot(args.output / "similarity.png")


if __name__ == "__main__":
    main()
