"""`hf-compress sweep`: methods × sizes, measured beside the original and the controls."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hf_compress.cli.app import app
from hf_compress.cli.output import (
    BatchSize,
    Data,
    Device,
    Dtype,
    MaxLength,
    Model,
    Samples,
    Seed,
    TextColumn,
    console,
    quiet_libraries,
)

if TYPE_CHECKING:
    from hf_compress.methods.base.settings import CompressionConfig
    from hf_compress.report.sweep_result import SweepResult


_BETWEEN_METHODS = re.compile(r",(?=\s*[A-Za-z])")  # and not within lists of numbers, as in layers=2,5


@app.command()
def sweep(  # noqa: PLR0913 (each of them is an option of the command)
    model: Model,
    output: Annotated[
        Path, typer.Option(help="Folder for sweep.csv, sweep.json, sweep.png and the models.", show_default=False)
    ],
    methods: Annotated[
        str,
        typer.Option(
            help="With commas between; each may have settings, as in lrp:granularity=neuron. See `hf-compress methods`."
        ),
    ] = "mka,layer_collapse,illc,lrp:granularity=neuron",
    ratios: Annotated[str, typer.Option(help="Shares to take out, with commas between.")] = "0.125,0.25,0.375,0.5",
    calibration: Data = None,
    texts: Annotated[str | None, typer.Option(help="Texts for perplexity; kinds as for --calibration.")] = None,
    tasks: Annotated[str, typer.Option(help="lm-eval tasks, with commas between.")] = "",
    labelled: Annotated[str | None, typer.Option(help="Labelled data for a classifier, as for `evaluate`.")] = None,
    limit: Annotated[int | None, typer.Option(help="Documents of what is measured on.", min=1)] = None,
    speed: Annotated[bool, typer.Option(help="Time each model, in turn with the original.")] = True,
    controls: Annotated[bool, typer.Option(help="Measure the model without its last blocks, for every ratio.")] = True,
    best: Annotated[int | None, typer.Option(help="Save so many models that nothing smaller beats.", min=1)] = None,
    samples: Samples = 256,
    max_length: MaxLength = None,
    batch_size: BatchSize = 8,
    text_column: TextColumn = None,
    dtype: Dtype = "auto",
    device: Device = None,
    seed: Seed = 0,
) -> None:
    """Compress a model in many ways, and measure each beside the original: a table, a CSV file and a picture.

    Started again with the same output, a sweep goes on from what is there, with further methods and ratios, too.
    """
    from accelerate.utils import set_seed

    from hf_compress.api.sweep import sweep
    from hf_compress.calibration.data import DataOptions
    from hf_compress.calibration.files import load, load_texts
    from hf_compress.cli.loading import load_model
    from hf_compress.evaluation.processors import kind_read_by, load_processor
    from hf_compress.storage.staging import check_writable

    configs = _configs(methods, ratios, seed)
    if texts is None and not tasks and labelled is None:
        raise ValueError("say what to measure: --texts, --tasks or --labelled")
    if calibration is not None and calibration in (texts, labelled):
        raise ValueError(f"--calibration and what is measured on are the same, {calibration}: give other texts")
    check_writable(output)
    quiet_libraries()
    data = load(calibration, text_column, samples, seed, kind_read_by(model)) if calibration else None
    held_out = load_texts(texts, text_column, limit) if texts else None
    set_seed(seed)
    loaded = load_model(model, dtype, device)
    result = sweep(
        loaded,
        configs,
        data,
        load_processor(model, needed=bool(data or texts or tasks)),
        DataOptions(batch_size, max_length, text_column),
        texts=held_out,
        tasks=[name.strip() for name in tasks.split(",") if name.strip()],
        labelled=labelled,
        batch_size=batch_size,
        limit=limit,
        speed=speed,
        controls=controls,
        folder=output,
        best=best or 0,
    )
    _show(result, output, best or 0)


def _configs(methods: str, ratios: str, seed: int) -> dict[str, CompressionConfig]:
    """Every method with every ratio."""
    from hf_compress.cli.settings import config_from

    found: dict[str, CompressionConfig] = {}
    shares = [_share(text) for text in ratios.split(",") if text.strip()]
    chosen = [part.strip() for part in _BETWEEN_METHODS.split(methods) if part.strip()]
    if not shares or not chosen:
        raise ValueError("a sweep needs --methods and --ratios: one of each, at least")
    for part in chosen:
        name, *settings = part.split(":")
        for ratio in shares:
            config = config_from(name, ratio=ratio, settings=settings, seed=seed)
            found[" ".join([config.method, *settings, f"ratio={ratio:g}"])] = config
    return found


def _share(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"--ratios takes numbers in (0, 1), with commas between; got {text!r}") from None


def _show(result: SweepResult, output: Path, best: int) -> None:
    out = console()
    out.print(_table(result))
    out.print(result.note(), markup=False)
    out.print(f"Wrote sweep.csv, sweep.json and sweep.png into {output}", markup=False)
    if best:
        saved = [one.name for one in result.front()[:best]]
        out.print(f"Saved in {output / 'models'}: {'; '.join(saved) or 'none'}", markup=False)


def _table(result: SweepResult) -> Any:
    from rich.markup import escape
    from rich.table import Table

    table = Table(*map(escape, result.header()))
    for row in result.rows():
        table.add_row(*map(escape, row))
    return table
