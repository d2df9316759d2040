"""Perplexity against FFNs collapsed, healed by distillation: the closed form, and FFNs that are only left out.

    python benchmarks/collapse_healed.py           # 2, 4, 6 and 12 of the reference model's 12 FFNs, 512 windows
    python benchmarks/collapse_healed.py --full    # 1 to 12, and all windows of the calibration documents

"Left out" puts the mean output in the place of the FFNs that the closed form chose. Both are healed alike: LoRA of
rank 16 on all linear maps, one epoch over windows of 256 tokens of the calibration documents, the dense model as the
teacher. Differences in loss are paired by document.
"""

from __future__ import annotations

import argparse
import copy

from collapse_quality import left_out, means
from common import REFERENCE, WINDOW, calibration_windows, held_out_passages, load, write_result
from transformers import PreTrainedModel

from hf_compress import LayerCollapseConfig, compress, heal, perplexity
from hf_compress.evaluation.perplexity import Perplexity
from hf_compress.rewrite.apply import apply

NAMES = ("closed form", "closed form, healed", "left out", "left out, healed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--windows", type=int, help="to heal on; 512 by default")
    parser.add_argument("--full", action="store_true", help="1 to 12 FFNs, 2,048 windows")
    args = parser.parse_args()
    sizes = list(range(1, 13)) if args.full else [2, 4, 6, 12]
    dense, tokenizer = load(REFERENCE)
    windows = args.windows or (2048 if args.full else 512)
    data, lessons = calibration_windows(tokenizer, 256), calibration_windows(tokenizer, windows, seed=1)
    held_out = held_out_passages()
    of = means(dense, data)

    def score(model: PreTrainedModel) -> Perplexity:
        return perplexity(model, tokenizer, held_out, max_length=WINDOW)

    rows: dict[str, list[Perplexity]] = {name: [] for name in NAMES}
    for size in sizes:
        closed, without = copy.deepcopy(dense), copy.deepcopy(dense)
        compress(closed, LayerCollapseConfig(num_layers=size), data)
        apply(left_out(without, [step["block"] for step in closed.compression_report.notes["collapsed"]], of), without)
        for name, model in (("closed form", closed), ("left out", without)):
            rows[name].append(score(model))
            heal(model, dense, lessons, tokenizer)
            rows[f"{name}, healed"].append(score(model))
            print(f"{size} FFNs, {name}: {rows[name][-1]}, healed {rows[f'{name}, healed'][-1]}", flush=True)
    whole = score(dense)
    lines = [
        f"Perplexity on {whole.documents} held-out documents, {whole.tokens:,} tokens; uncompressed: {whole}.",
        f"Healed on {windows} windows of 256 tokens, once.",
        "",
        "| FFNs collapsed of 12 | " + " | ".join(map(str, sizes)) + " |",
        "|---" * (len(sizes) + 1) + "|",
    ]
    for name, scores in rows.items():
        lines.append(f"| {name} | " + " | ".join(f"{result.value:.1f}" for result in scores) + " |")
    for name, other in (("closed form", "left out"), ("closed form, healed", "left out, healed")):
        gaps = [theirs.loss_difference(own) for theirs, own in zip(rows[other], rows[name], strict=True)]
        cells = " | ".join(f"{gap:+.3f} ± {error:.3f}" for gap, error in gaps)
        lines.append(f"| loss of {other} above {name} | {cells} |")
    values = {name: [result.value for result in scores] for name, scores in rows.items()}
    write_result("collapse_healed", "\n".join(lines), {"sizes": sizes, "dense": whole.value, "perplexity": values})


if __name__ == "__main__":
    main()
