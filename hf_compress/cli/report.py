"""`hf-compress report`: a model's history as a page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hf_compress.cli.app import app
from hf_compress.cli.output import console, quiet_libraries


@app.command()
def report(
    directory: Annotated[Path, typer.Argument(help="A directory with a saved model.", show_default=False)],
    output: Annotated[Path, typer.Option(help="Where the page goes, an .html file; replaced if it exists.")] = Path(
        "report.html"
    ),
) -> None:
    """Write one page that shows what was done to a model: sizes, plots, edits, settings, times, scores.

    The page needs nothing beside it. No model is loaded. Scores are shown if evaluation.json lies in the directory.
    """
    if not directory.is_dir():
        raise FileNotFoundError(f"{directory}: no such directory")
    if output.suffix.lower() not in (".html", ".htm"):
        raise ValueError(f"output must end in .html; got {output}")
    from hf_compress.report.history import read_report
    from hf_compress.report.page import read_evaluation, report_page
    from hf_compress.report.report import REPORT_FILE

    quiet_libraries()
    history = read_report(directory)
    if history is None:
        raise FileNotFoundError(f"{directory} has no {REPORT_FILE}: hf_compress did not save it, or it was left behind")
    page = report_page(history.stages, history.base_model, directory.resolve().name, read_evaluation(directory))
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(page, encoding="utf-8")
    console().print(f"Wrote {output}", markup=False)
