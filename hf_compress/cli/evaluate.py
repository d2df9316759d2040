"""`hf-compress evaluate` and `hf-compress demo`."""

from __future__ import annotations

from math import inf
from pathlib import Path
from typing import Annotated

import typer

from hf_compress.cli.app import app
from hf_compress.cli.output import BatchSize, Model, TextColumn, console, quiet_libraries


@app.command()
def evaluate(
    model: Model,
    tasks: Annotated[str, typer.Option(help="lm-eval tasks, with commas between; manuals_cloze is built in.")] = "",
    include_path: Annotated[Path | None, typer.Option(help="Folder with further lm-eval task files.")] = None,
    texts: Annotated[str | None, typer.Option(help="Texts for perplexity; kinds as for `compress`.")] = None,
    text_column: TextColumn = None,
    limit: Annotated[
        float | None,
        typer.Option(help="Documents of each task and texts; below 1, a share of each task."),
    ] = None,
    batch_size: BatchSize = 8,
    output: Annotated[Path | None, typer.Option(help="Folder for evaluation.json and lm-eval's files.")] = None,
) -> None:
    """Measure size, speed, perplexity, and scores on lm-eval tasks, with standard errors."""
    from hf_compress.calibration.files import load_texts
    from hf_compress.cli.loading import check_folder
    from hf_compress.evaluation.evaluate import evaluate
    from hf_compress.storage.staging import check_writable

    quiet_libraries()
    check_folder(model)
    if output is not None:
        check_writable(output)  # before any work is done
    if limit is not None and not 0 < limit < inf:
        raise ValueError(f"limit must be a number above 0; got {limit}")
    whole = int(limit) if limit is not None and limit >= 1 else None
    result = evaluate(
        model,
        tasks=[name.strip() for name in tasks.split(",") if name.strip()],
        texts=load_texts(texts, text_column, whole) if texts else None,
        include_path=include_path,
        batch_size=batch_size,
        limit=whole or limit,
        output_dir=output,
    )
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


@app.command()
def demo(
    quick: Annotated[bool, typer.Option(help="Less data, for a look in half a minute.")] = False,
    output: Annotated[Path, typer.Option(help="Where the smaller model goes; replaced if it exists.")] = Path(
        "out/demo"
    ),
) -> None:
    """Take a quarter of the blocks out of a small trained model, and score it beside its controls."""
    quiet_libraries()
    from hf_compress.cli.demo import run

    run(console(), output, quick=quick)
