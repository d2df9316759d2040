"""`hf-compress run` and `hf-compress schema`: recipes carried out, and what they may say."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hf_compress.cli.app import app
from hf_compress.cli.output import Device, console, quiet_libraries
from hf_compress.cli.work import MaxMemory, Resume, Workdir, WorkFolder, where, with_others

if TYPE_CHECKING:
    from rich.console import Console

    from hf_compress.api.run import Outcome


@app.command()
def run(
    recipe: Annotated[
        Path,
        typer.Argument(
            help="A YAML or JSON file; or a folder with a compressed model, whose report is a recipe that makes it "
            "again.",
            show_default=False,
        ),
    ],
    output: Annotated[Path | None, typer.Option(help="Where the smaller model goes, in place of the recipe's.")] = None,
    device: Device = None,
    max_memory: MaxMemory = None,
    workdir: Workdir = None,
    resume: Resume = False,
    overwrite: Annotated[bool, typer.Option(help="Replace the output directory, if it exists.")] = False,
) -> None:
    """Carry a recipe out: compress a model stage by stage, save it, compare it with the original, write its card.

    See `hf-compress schema` for what a recipe may say.
    """
    from hf_compress.api.recipe import Recipe
    from hf_compress.api.run import output_of, run
    from hf_compress.cli.loading import check_folder

    chosen = Recipe.from_file(recipe)
    if output is not None:
        chosen = replace(chosen, output=str(output))
    check_folder(chosen.model)
    work = WorkFolder.of(output_of(chosen), workdir, resume)
    quiet_libraries()
    with with_others(device) as own, work.opened():
        place, compute = where(own, max_memory, work.path)
        outcome = run(chosen, compute=compute, device=place, overwrite=overwrite, resume=resume)
        _show(console(), outcome)
    work.delete()


def _show(out: Console, outcome: Outcome) -> None:
    from hf_compress.cli.compress import edits_table
    from hf_compress.cli.evaluate import comparison_table
    from hf_compress.cli.loading import how_to_load

    for number, stage in enumerate(outcome.report.stages, 1):
        if stage.edits:
            out.print(edits_table(stage.edits, title=f"{number}. {stage.method}"))
    out.print(str(outcome.report), markup=False, soft_wrap=True)
    if outcome.comparison is not None:
        out.print(comparison_table(outcome.comparison))
        out.print(outcome.comparison.note(), markup=False)
    out.print(f"Saved to {outcome.folder}; loaded again with identical outputs. In Python:", markup=False)
    out.print(f"  {how_to_load(outcome.folder)}", markup=False)


@app.command()
def schema() -> None:
    """Print the JSON schema of recipes, for editors that complete and check them."""
    import json

    from hf_compress.api.schema import recipe_schema

    print(json.dumps(recipe_schema(), indent=2))
