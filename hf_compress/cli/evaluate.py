"""`hf-compress evaluate` and `hf-compress demo`."""

from __future__ import annotations

from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hf_compress.cli.app import app
from hf_compress.cli.output import BatchSize, Device, console, quiet_libraries
from hf_compress.cli.reference import require_reference

if TYPE_CHECKING:
    from hf_compress.evaluation.comparison import Comparison
    from hf_compress.evaluation.evaluate import EvaluationResult


@app.command()
def evaluate(  # noqa: PLR0913 (each of them is an option of the command)
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL",
            help="Directories with models, or names on the Hub. Of several, the others are held against the first: "
            "give the uncompressed one first.",
            show_default=False,
        ),
    ],
    tasks: Annotated[str, typer.Option(help="lm-eval tasks, with commas between; manuals_cloze is built in.")] = "",
    include_path: Annotated[Path | None, typer.Option(help="Folder with further lm-eval task files.")] = None,
    texts: Annotated[str | None, typer.Option(help="Texts for perplexity; kinds as for `compress`.")] = None,
    labelled: Annotated[
        str | None,
        typer.Option(
            help="Labelled texts, pairs of texts or images, for a classifier's accuracy and F1: a .jsonl, .json, .csv "
            "or .parquet file, a folder, or a dataset on the Hub."
        ),
    ] = None,
    label_column: Annotated[
        str | None, typer.Option(help="The column of --labelled with the labels; else label or labels.")
    ] = None,
    text_column: Annotated[
        list[str] | None,
        typer.Option(help="The column with the texts, where there are several; given twice for pairs of --labelled."),
    ] = None,
    limit: Annotated[
        float | None,
        typer.Option(help="Documents of each task, of --texts and of --labelled; below 1, a share of them."),
    ] = None,
    batch_size: BatchSize = 8,
    device: Device = None,
    speed: Annotated[bool, typer.Option(help="Time the models; of several, in turn, and watch their memory.")] = True,
    output: Annotated[
        Path | None, typer.Option(help="Folder for evaluation.json (of several, comparison.json) and lm-eval's files.")
    ] = None,
    card: Annotated[
        bool,
        typer.Option(
            "--card",
            help="Put the scores into the README.md of every model after the first that has a compression report: its "
            "Evaluation section and metadata are replaced, all else stays. The first model stands there as the "
            "uncompressed one, the others by name.",
        ),
    ] = False,
) -> None:
    """Measure size, speed, perplexity, accuracy, and scores on lm-eval tasks, with standard errors.

    Several models are measured on the same data, and compared with the first document by document.
    """
    from hf_compress.calibration.files import load_texts
    from hf_compress.cli.loading import check_folder
    from hf_compress.evaluation.labelled import Labelled, read_labelled
    from hf_compress.evaluation.loading import default_device
    from hf_compress.storage.staging import check_writable

    quiet_libraries()
    for model in models:
        check_folder(model)
    folders = _with_cards(models) if card else []
    if output is not None:
        check_writable(output)  # before any work is done
    if limit is not None and not 0 < limit < inf:
        raise ValueError(f"limit must be a number above 0; got {limit}")
    whole = int(limit) if limit is not None and limit >= 1 else None
    column, columns = _text_columns(text_column, texts, labelled)
    data = Labelled(labelled, label_column, columns) if labelled else None
    given: dict[str, Any] = {
        "tasks": [name.strip() for name in tasks.split(",") if name.strip()],
        "texts": load_texts(texts, column, whole) if texts else None,
        "labelled": read_labelled(data, whole or limit) if data else None,
        "include_path": include_path,
        "batch_size": batch_size,
        "limit": whole or limit,
        "speed": speed,
        "device": device or default_device(),
        "output_dir": output,
    }
    if len(models) == 1:
        from hf_compress.evaluation.evaluate import evaluate

        _show(evaluate(models[0], **given), output)
        return
    from hf_compress.evaluation.compare import compare

    comparison = compare(models, **given)
    _show_comparison(comparison, output)
    if card:
        from hf_compress.storage.scored_cards import texts_told, write_scores

        places = dict(zip(comparison.results, models, strict=True))
        chosen = {name: Path(place) for name, place in places.items() if place in folders}
        for path in write_scores(comparison, chosen, texts_told(texts, whole)):
            console().print(f"Wrote the scores into {path}", markup=False)


def _with_cards(models: list[str]) -> list[str]:
    """The models after the first that have a compression report, whose cards are to be written."""
    from hf_compress.report.report import REPORT_FILE

    found = [model for model in models[1:] if (Path(model) / REPORT_FILE).is_file()]
    if not found:
        raise ValueError(
            "--card writes into the cards of compressed models after the first, and no directory there has a "
            f"{REPORT_FILE}: give the uncompressed model first, then directories that `compress` has written"
        )
    return found


def _text_columns(given: list[str] | None, texts: str | None, labelled: str | None) -> tuple[str | None, Any]:
    """The column of the texts for perplexity, and the columns of the labelled ones."""
    if not given:
        return None, None
    if texts and len(given) > 1:
        raise ValueError(f"--texts has one column of texts, but --text-column names {', '.join(given)}: name one")
    if not texts and not labelled:
        raise ValueError(f"--text-column {given[0]} names a column of --texts or --labelled, and neither is given")
    return given[0], tuple(given)


def _show(result: EvaluationResult, output: Path | None) -> None:
    from rich.table import Table

    table = Table("", title=result.name)
    table.add_column("value", justify="right")
    table.add_column("std. error", justify="right")
    for row in result.rows():
        table.add_row(*row)
    out = console()
    out.print(table)
    if output is not None:
        out.print(f"Wrote {output / 'evaluation.json'}", markup=False)


def _show_comparison(comparison: Comparison, output: Path | None) -> None:
    from hf_compress.evaluation.compare import COMPARISON_FILE

    out = console()
    out.print(comparison_table(comparison))
    out.print(comparison.note(), markup=False)
    if output is not None:
        out.print(f"Wrote {output / COMPARISON_FILE}", markup=False)


def comparison_table(comparison: Comparison) -> Any:
    """A comparison, for `rich.print`."""
    from rich.markup import escape
    from rich.table import Table

    table = Table("", "model", title=f"{len(comparison.results)} models, on the same data")
    table.add_column("value", justify="right")
    table.add_column(escape(f"against {comparison.reference}"))
    for number, (what, *cells) in enumerate(comparison.cells()):
        if what and number:
            table.add_section()
        table.add_row(*map(escape, (what, *cells)))
    return table


@app.command()
def demo(
    quick: Annotated[bool, typer.Option(help="Less data, for a look in half a minute.")] = False,
    output: Annotated[Path, typer.Option(help="Where the smaller model goes; replaced if it exists.")] = Path(
        "out/demo"
    ),
) -> None:
    """Take a quarter of the blocks out of a small trained model, and score it beside its controls."""
    require_reference()
    quiet_libraries()
    from hf_compress.cli.demo import run

    run(console(), output, quick=quick)
