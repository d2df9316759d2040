"""Quality against FFNs collapsed in closed form: three ways to choose them, the naive product, nothing at all.

    python benchmarks/collapse_quality.py            # 1, 2, 3, 4 and 6 of the reference model's 12 FFNs
    python benchmarks/collapse_quality.py --full     # 1 to 12

All collapse the same number of FFNs. The controls collapse those that the default chose: "naive product" multiplies the
projections with the mean of the gate between them, as a collapse without any fit would; "left out" puts the mean output
in an FFN's place. Perplexity on documents that nothing has seen, in windows of 256 tokens; differences from the default
are paired by document.
"""

from __future__ import annotations

import argparse
from statistics import mean

import torch
from common import REFERENCE, WINDOW, calibration_windows, held_out_passages, load, write_result
from torch import Tensor
from transformers import PreTrainedModel

from hf_compress import LayerCollapseConfig, Plan, make_plan, perplexity
from hf_compress.anatomy.anatomy import Anatomy, Block
from hf_compress.evaluation.perplexity import Perplexity
from hf_compress.rewrite.apply import apply
from hf_compress.rewrite.builders import linear_ffn

CRITERIA = {"default (stream)": "stream", "loss": "loss", "linearity (R²)": "linearity"}


def means(model: PreTrainedModel, data: Tensor) -> list[tuple[Tensor, Tensor]]:
    """The mean of each FFN's activated gate and of its output over calibration tokens."""
    sums: dict[tuple[int, str], Tensor] = {}
    handles = []
    for index, block in enumerate(model.model.layers):
        for name in ("act_fn", "down_proj"):

            def hook(module: object, args: object, output: Tensor, key: tuple[int, str] = (index, name)) -> None:
                sums[key] = sums.get(key, 0) + output.double().mean(dim=(0, 1))

            handles.append(getattr(block.mlp, name).register_forward_hook(hook))
    batches = data.split(8)
    with torch.no_grad():
        for ids in batches:
            model(ids)
    for handle in handles:
        handle.remove()
    return [
        tuple((sums[index, name] / len(batches)).float() for name in ("act_fn", "down_proj"))
        for index in range(len(model.model.layers))
    ]


def naive(model: PreTrainedModel, blocks: list[int], of: list[tuple[Tensor, Tensor]]) -> Plan:
    """W = W_down · diag(c) · W_up, c the mean of the activated gate."""
    stack = Anatomy(model).stack()
    plan = Plan()
    for index in blocks:
        mlp = model.model.layers[index].mlp
        product = mlp.down_proj.weight.float() @ (of[index][0][:, None] * mlp.up_proj.weight.float())
        plan += linear_ffn(Block(model, stack, index), [product.T])
    return plan


def left_out(model: PreTrainedModel, blocks: list[int], of: list[tuple[Tensor, Tensor]]) -> Plan:
    """The mean output, whatever the input."""
    stack, hidden = Anatomy(model).stack(), model.config.hidden_size
    nothing = torch.zeros(hidden, hidden)
    return sum((linear_ffn(Block(model, stack, index), [nothing], of[index][1]) for index in blocks), start=Plan())


def some(plan: Plan, count: int) -> Plan:
    """The first `count` collapses of a plan, which were chosen without knowing of the rest."""
    edits = plan.edits[:count]
    names = tuple(edit.output.rpartition(".")[0] for edit in edits)
    return Plan(edits, {name: tensor for name, tensor in plan.tensors.items() if name.startswith(names)})


def score(plan: Plan, held_out: list[str]) -> tuple[Perplexity, int]:
    model, tokenizer = load(REFERENCE)
    if plan.edits:
        apply(plan, model)
    return perplexity(model, tokenizer, held_out, max_length=WINDOW), sum(p.numel() for p in model.parameters())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=256, help="calibration windows of 256 tokens")
    parser.add_argument("--full", action="store_true", help="1 to 12 FFNs instead of 1, 2, 3, 4 and 6")
    args = parser.parse_args()
    sizes = list(range(1, 13)) if args.full else [1, 2, 3, 4, 6]
    model, tokenizer = load(REFERENCE)
    data = calibration_windows(tokenizer, args.samples)
    held_out = held_out_passages()
    plans = {
        name: make_plan(model, LayerCollapseConfig(num_layers=max(sizes), criterion=criterion), data)
        for name, criterion in CRITERIA.items()
    }
    of = means(model, data)
    chosen = [step["block"] for step in plans["default (stream)"].notes["collapsed"]]
    rows: dict[str, list[tuple[Perplexity, int]]] = {
        name: [score(some(plan, size), held_out) for size in sizes] for name, plan in plans.items()
    }
    rows["naive product"] = [score(naive(model, chosen[:size], of), held_out) for size in sizes]
    rows["left out (mean output)"] = [score(left_out(model, chosen[:size], of), held_out) for size in sizes]
    dense, parameters = score(Plan(), held_out)
    ours = rows["default (stream)"]
    lines = [
        f"Perplexity on {dense.documents} held-out documents, {dense.tokens:,} tokens; uncompressed: {dense}.",
        "",
        "| FFNs collapsed of 12 | " + " | ".join(map(str, sizes)) + " |",
        "|---" * (len(sizes) + 1) + "|",
        "| parameters | " + " | ".join(f"{100 * (n / parameters - 1):+.1f}%" for _, n in ours) + " |",
    ]
    for name, scores in rows.items():
        lines.append(f"| {name} | " + " | ".join(f"{result.value:.1f}" for result, _ in scores) + " |")
        if name != "default (stream)":
            gaps = [result.loss_difference(own) for (result, _), (own, _) in zip(scores, ours, strict=True)]
            cells = " | ".join(f"{gap:+.3f} ± {error:.3f}" for gap, error in gaps)
            lines.append(f"| … loss above the default's | {cells} |")
    chosen_by = {name: [step["block"] for step in plan.notes["collapsed"]] for name, plan in plans.items()}
    lines += ["", "Chosen, in this order: " + "; ".join(f"{name} {blocks}" for name, blocks in chosen_by.items()) + "."]
    first = plans["linearity (R²)"].notes["collapsed"][0]["r2"]
    lines.append("R² of each FFN in the whole model: " + ", ".join(f"{i} {r2:.2f}" for i, r2 in first.items()) + ".")
    lines.append(f"Mean R²: {mean(first.values()):.2f}.")
    values = {name: [result.value for result, _ in scores] for name, scores in rows.items()}
    write_result("collapse_quality", "\n".join(lines), {"sizes": sizes, "dense": dense.value, "perplexity": values})


if __name__ == "__main__":
    main()
