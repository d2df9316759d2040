"""A recipe in Python: blocks merged, healed, stored in 4.25 bits, compared with the original, the card written.

python examples/recipe.py                    # examples/recipe.yaml on the bundled model; some minutes on two cores
python examples/recipe.py --resume           # after it was killed
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import hf_compress as hfc

RECIPE = Path(__file__).parent / "recipe.yaml"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("out/recipe"))
    parser.add_argument("--resume", action="store_true", help="go on from what a run that was killed has left")
    args = parser.parse_args()
    recipe = replace(hfc.Recipe.from_file(RECIPE), output=str(args.output))
    work = args.output.with_name(f"{args.output.name}.partial")
    outcome = hfc.run(recipe, compute=hfc.Compute(workdir=work), overwrite=not args.resume, resume=args.resume)
    print(outcome.report)
    print(outcome.comparison)
    print(f"The model, with its card, lies in {outcome.folder}; what it was made from can be deleted: {work}")


if __name__ == "__main__":
    main()
