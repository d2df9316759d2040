"""What widths cost that are no multiple of a kernel's tile: an FFN's two products, for each unit, over those of one
whose width is.

    python benchmarks/alignment.py     # hidden 896, FFNs of about 3,648 units, bfloat16; a minute
"""

from __future__ import annotations

import argparse

import torch
from common import seconds, write_result
from torch.nn import functional

from hf_compress.evaluation.speed import median

HIDDEN, ALIGNED = 896, 3648  # 57 · 64
WIDTHS = (3647, 3650, 3652, 3656, 3664, 3680, 3712)
TOKENS = {1: 20, 512: 1}  # at once, and how often in a row, for the clock


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=61)
    args = parser.parse_args()
    torch.manual_seed(0)
    maps = {width: torch.randn(2, width, HIDDEN).bfloat16() for width in (ALIGNED, *WIDTHS)}
    transposed = {width: pair[1].T.contiguous() for width, pair in maps.items()}
    lines = [
        f"Time for each unit, over that of {ALIGNED:,} units, in turn; bfloat16, {torch.get_num_threads()} threads.",
        "",
        f"| tokens | {' | '.join(f'{width:,}' for width in WIDTHS)} |",
        "|---" * (len(WIDTHS) + 1) + "|",
    ]
    data: dict[str, dict[str, tuple[float, float]]] = {}
    for tokens, often in TOKENS.items():
        given = torch.randn(tokens, HIDDEN).bfloat16()

        def work(width: int, given: torch.Tensor = given, often: int = often) -> None:
            for _ in range(often):
                functional.linear(functional.linear(given, maps[width][0]), transposed[width])

        for width in maps:
            work(width)
        rounds = [{width: seconds(lambda width=width: work(width)) for width in maps} for _ in range(args.rounds)]
        found = {width: median([ALIGNED / width * one[width] / one[ALIGNED] for one in rounds]) for width in WIDTHS}
        data[str(tokens)] = {str(width): value for width, value in found.items()}
        cells = " | ".join(f"{value:.3f} ± {error:.3f}" for value, error in found.values())
        lines.append(f"| {tokens} | {cells} |")
    write_result("alignment", "\n".join(lines), data)


if __name__ == "__main__":
    main()
