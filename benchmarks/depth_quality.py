"""Quality against blocks removed: MKA, in its default and in the paper's form, beside every control of the same size.

    python benchmarks/depth_quality.py                                     # the reference model
    python benchmarks/depth_quality.py --wikitext wiki.test.txt            # and a second domain
    python benchmarks/depth_quality.py --model examples/reference/manuals-gpt2-12l --name depth_quality_gpt2
    python benchmarks/depth_quality.py --full                              # every size, more seeds, the whole cloze

Every method sees the same calibration windows (greedy search, the slowest, half of them). Perplexity is measured on
documents that neither the model nor any method has seen, in windows of 256 tokens, and compared document by document
with the best control of the same size.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

from common import REFERENCE, WINDOW, calibration_windows, held_out_passages, load, write_result
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_compress import DropBlocksConfig, MKAConfig, Plan, compress, make_plan, perplexity
from hf_compress.evaluation.harness import run_tasks
from hf_compress.evaluation.perplexity import Perplexity
from hf_compress.plan.edits import RemoveBlocks
from hf_compress.rewrite.apply import apply

OURS = ("MKA (default)", "MKA (paper)", "MKA (paper, CKA, alpha 0.5)")
GREEDY_SAMPLES = 128  # windows for the greedy search, as many as its paper uses


@dataclass(frozen=True)
class Score:
    """One model's quality."""

    heldout: Perplexity
    wikitext: Perplexity | None
    cloze: float
    cloze_error: float


class Bench:
    """A model, its calibration windows, and what it is scored on."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.directory: Path = args.model
        _, self.tokenizer = load(self.directory)
        self.calibration: Tensor = calibration_windows(self.tokenizer, args.samples)
        self.heldout = held_out_passages()
        self.wikitext = _articles(args.wikitext, self.tokenizer) if args.wikitext else []
        self.limit: int | None = args.cloze

    def fresh(self) -> PreTrainedModel:
        return load(self.directory)[0]

    def score(self, model: PreTrainedModel) -> Score:
        """Perplexities and cloze accuracy of a model."""
        cloze = run_tasks(model, self.tokenizer, ["manuals_cloze"], limit=self.limit)["results"]["manuals_cloze"]
        wikitext = perplexity(model, self.tokenizer, self.wikitext, max_length=WINDOW) if self.wikitext else None
        heldout = perplexity(model, self.tokenizer, self.heldout, max_length=WINDOW)
        return Score(heldout, wikitext, cloze["acc,none"], cloze["acc_stderr,none"])

    def candidates(
        self, size: int, greedy: list[int], seeds: int
    ) -> dict[str, list[MKAConfig | DropBlocksConfig | Plan]]:
        """The methods at one size; of a random one, one for every seed."""
        return {
            "MKA (default)": [MKAConfig(num_merges=size)],
            "MKA (paper)": [MKAConfig(num_merges=size, variant="paper")],
            "MKA (paper, CKA, alpha 0.5)": [MKAConfig(num_merges=size, variant="paper", similarity="cka", alpha=0.5)],
            # Greedy choice is nested: the first blocks of one long search are those of every shorter one.
            "greedy perplexity (SLEB)": [Plan((RemoveBlocks(self.stack, tuple(greedy[:size])),))],
            "block influence (ShortGPT)": [DropBlocksConfig(num_blocks=size, criterion="block_influence")],
            "angular, contiguous": [DropBlocksConfig(num_blocks=size, criterion="angular")],
            "last blocks": [DropBlocksConfig(num_blocks=size, criterion="last")],
            "random": [DropBlocksConfig(num_blocks=size, criterion="random", seed=seed) for seed in range(seeds)],
        }

    def greedy_order(self, size: int) -> list[int]:
        """Blocks in the order in which greedy search by calibration loss leaves them out."""
        config = DropBlocksConfig(num_blocks=size, criterion="perplexity")
        plan = make_plan(self.fresh(), config, self.calibration[:GREEDY_SAMPLES], self.tokenizer)
        self.stack = plan.stacks[0]
        return [step["removed"] for step in plan.notes["greedy"]]

    def compressed(self, how: MKAConfig | DropBlocksConfig | Plan) -> PreTrainedModel:
        model = self.fresh()
        if isinstance(how, Plan):
            apply(how, model)
            return model
        return compress(model, how, self.calibration, self.tokenizer)


def _articles(file: Path, tokenizer: PreTrainedTokenizerBase, count: int = 20, characters: int = 3000) -> list[str]:
    """The beginnings of WikiText's articles; a heading of the first level starts one."""
    articles: list[str] = []
    for line in file.read_text().splitlines():
        if line.startswith(" = ") and not line.startswith(" = = "):
            articles.append("")
        if articles:
            articles[-1] += line + "\n"
    return [article[:characters] for article in articles if len(article) > 500][:count]


def table(scores: dict[str, dict[int, list[Score]]], dense: Score, sizes: list[int], blocks: int) -> str:
    """All scores as Markdown, one table for each of what was measured."""
    parts = []
    for what in ("heldout", "wikitext", "cloze"):
        if getattr(dense, what) is None:
            continue
        rows = [
            f"| blocks removed of {blocks} | " + " | ".join(map(str, sizes)) + " |",
            "|---" * (len(sizes) + 1) + "|",
        ]
        for name, by_size in scores.items():
            cells = [_cell(by_size[size], what) for size in sizes]
            rows.append(f"| {name} | " + " | ".join(cells) + " |")
        title = {
            "heldout": "Held-out manuals, perplexity",
            "wikitext": "WikiText-2, perplexity",
            "cloze": "Cloze accuracy",
        }
        parts.append(f"### {title[what]} (uncompressed: {_cell([dense], what)})\n\n" + "\n".join(rows))
    return "\n\n".join([*parts, _verdict(scores, sizes)])


def _cell(scores: list[Score], what: str) -> str:
    if what == "cloze":
        return f"{mean(s.cloze for s in scores):.3f} ± {mean(s.cloze_error for s in scores):.3f}"
    losses = [getattr(score, what).loss for score in scores]
    errors = [getattr(score, what).value_standard_error for score in scores]
    return f"{math.exp(mean(losses)):.1f} ± {mean(errors):.1f}"


def _verdict(scores: dict[str, dict[int, list[Score]]], sizes: list[int]) -> str:
    """The default against the best control of each size, in pairs."""
    rows = [
        "| size | domain | best control | loss of MKA (default) minus its loss, nats | wins |",
        "|---|---|---|---|---|",
    ]
    for size in sizes:
        for what in ("heldout", "wikitext"):
            controls = {n: s[size][0] for n, s in scores.items() if n not in OURS and getattr(s[size][0], what)}
            if not controls:
                continue
            best = min(controls, key=lambda name: getattr(controls[name], what).loss)
            ours = getattr(scores["MKA (default)"][size][0], what)
            gap, error = ours.loss_difference(getattr(controls[best], what))
            rows.append(f"| {size} | {what} | {best} | {gap:+.4f} ± {error:.4f} | {'yes' if gap < 0 else 'no'} |")
    return "### MKA (default) against the best control, document by document\n\n" + "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=REFERENCE)
    parser.add_argument("--name", default="depth_quality", help="of the result files")
    parser.add_argument("--wikitext", type=Path, help="the test part of WikiText-2 as plain text; not measured without")
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 2, 3, 4, 6])
    parser.add_argument("--samples", type=int, default=256, help="calibration windows of 256 tokens")
    parser.add_argument("--cloze", type=int, default=100, help="questions of the cloze task")
    parser.add_argument("--full", action="store_true", help="sizes 1 to 6, 5 random seeds, the whole cloze task")
    args = parser.parse_args()
    seeds = 1
    if args.full:
        args.sizes, args.cloze, seeds = [1, 2, 3, 4, 5, 6], None, 5

    context = Bench(args)
    dense_model = context.fresh()
    dense = context.score(dense_model)
    greedy = context.greedy_order(max(args.sizes))
    scores: dict[str, dict[int, list[Score]]] = {}
    for size in tqdm(args.sizes, desc="sizes"):
        for name, hows in context.candidates(size, greedy, seeds).items():
            scores.setdefault(name, {})[size] = [context.score(context.compressed(how)) for how in hows]
    blocks = dense_model.config.num_hidden_layers
    data = {
        name: {size: [_plain(score) for score in found] for size, found in by_size.items()}
        for name, by_size in scores.items()
    }
    write_result(args.name, table(scores, dense, args.sizes, blocks), {"dense": _plain(dense), **data})


def _plain(score: Score) -> dict[str, float | None]:
    return {
        "heldout": score.heldout.value,
        "heldout_error": score.heldout.value_standard_error,
        "wikitext": score.wikitext.value if score.wikitext else None,
        "wikitext_error": score.wikitext.value_standard_error if score.wikitext else None,
        "cloze": score.cloze,
        "cloze_error": score.cloze_error,
    }


if __name__ == "__main__":
    main()
