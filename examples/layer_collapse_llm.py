"""LayerCollapse on a trained language model: make FFNs linear, heal, save, load, score, write the model card.

    python examples/layer_collapse_llm.py                      # the bundled model and texts; some minutes on two cores
    python examples/layer_collapse_llm.py --ffns 6 --full      # half of the FFNs; the whole cloze task
    python examples/layer_collapse_llm.py --model gpt2 --calibration my.jsonl --heldout other.jsonl --output out/gpt2

Writes the model to --output, and its card, with the scores measured in this run and those of its controls, into the
model's folder and, for the bundled model, to model_cards/.
"""

from __future__ import annotations

from llm import Task, arguments, publish, task_of

import hf_compress as hfc
from hf_compress.evaluation.size import parameter_count


def controls(task: Task, ffns: int, parameters: int) -> dict[str, hfc.EvaluationResult]:
    """The uncompressed model, the collapse without healing, and as small a model with fewer blocks, healed alike."""
    dense = task.fresh()
    size = parameter_count(dense)
    block = sum(parameter.numel() for parameter in hfc.Anatomy(dense).stack().blocks[0].parameters())
    count = max(1, (size - parameters) // block)  # rather more parameters than fewer: the control is not to suffer
    healed = hfc.compress(task.fresh(), hfc.DropBlocksConfig(num_blocks=count), task.calibration, task.tokenizer)
    hfc.heal(healed, dense, task.calibration, task.tokenizer)
    return {
        "uncompressed": task.score(dense),
        "collapsed, not healed": task.compressed(hfc.LayerCollapseConfig(num_layers=ffns)),
        f"{count} blocks of least influence left out": task.compressed(hfc.DropBlocksConfig(num_blocks=count)),
        f"{count} blocks of least influence left out, healed alike": task.score(healed),
    }


def main() -> None:
    parser = arguments(__doc__, "out/manuals-llama-layer-collapse")
    parser.add_argument("--ffns", type=int, default=4, help="how many FFNs become linear")
    args = parser.parse_args()
    task = task_of(args)
    config = hfc.LayerCollapseConfig(num_layers=args.ffns)
    model = hfc.compress(task.fresh(), config, task.calibration, task.tokenizer)
    hfc.heal(model, task.fresh(), task.calibration, task.tokenizer)
    parameters = parameter_count(model)
    publish(task, model, args, parser, lambda: controls(task, args.ffns, parameters))


if __name__ == "__main__":
    main()
