"""`hf-compress compress` and `hf-compress methods`."""

from __future__ import annotations

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
from hf_compress.cli.settings import config_from
from hf_compress.cli.work import MaxMemory, Resume, Workdir, WorkFolder, where, with_others

if TYPE_CHECKING:
    from rich.console import Console
    from transformers import PreTrainedModel

    from hf_compress.calibration.media import Processor
    from hf_compress.methods.base.settings import CompressionConfig


@app.command()
def compress(  # noqa: PLR0913 (each of them is an option of the command)
    model: Model,
    method: Annotated[str | None, typer.Option(help="See `hf-compress methods`.", show_default="mka")] = None,
    ratio: Annotated[float | None, typer.Option(help="Share to take out, in (0, 1).")] = None,
    num: Annotated[int | None, typer.Option(help="Number to take out, in place of a ratio.")] = None,
    calibration: Data = None,
    output: Annotated[Path | None, typer.Option(help="Where the smaller model goes.")] = None,
    settings: Annotated[
        list[str], typer.Option("--set", metavar="FIELD=VALUE", help="A setting of the method; as often as needed.")
    ] = [],  # noqa: B006 (typer never changes it)
    recipe: Annotated[Path | None, typer.Option(help="YAML file: `method` and its settings. Options win.")] = None,
    samples: Samples = 256,
    max_length: MaxLength = None,
    batch_size: BatchSize = 8,
    text_column: TextColumn = None,
    dtype: Dtype = "auto",
    device: Device = None,
    max_memory: MaxMemory = None,
    workdir: Workdir = None,
    resume: Resume = False,
    dry_run: Annotated[bool, typer.Option(help="Say what it would take: time, memory, disk. Do nothing.")] = False,
    plan: Annotated[bool, typer.Option(help="Show the plan and the sizes; write nothing.")] = False,
    overwrite: Annotated[bool, typer.Option(help="Replace the output directory, if it exists.")] = False,
    portable: Annotated[bool, typer.Option(help="For trust_remote_code=True where the plugin is needed.")] = False,
    seed: Seed = 0,
) -> None:
    """Make a model smaller and save it.

    The new model is saved only if it loads again with identical outputs.
    """
    from hf_compress.calibration.data import DataOptions
    from hf_compress.calibration.files import load
    from hf_compress.evaluation.processors import kind_read_by
    from hf_compress.storage.save import check_target

    config = config_from(method, recipe, ratio, num, settings, seed)
    options = DataOptions(batch_size, max_length, text_column)
    if output is None and not (dry_run or plan):
        raise ValueError("say where the model goes: --output DIR; or --plan or --dry-run to see what would be done")
    if output is not None:
        check_target(output, overwrite)  # before any work is done
    looks = output is None or dry_run or plan
    work = WorkFolder.of(None if looks else output, workdir, resume)
    quiet_libraries()
    data = load(calibration, text_column, samples, seed, kind_read_by(model)) if calibration else None
    out = console()
    with with_others(device) as own, work.opened() as folder:
        place, compute = where(own, max_memory, work.path)
        given, processor = _loaded(model, dtype, place, folder, data is not None, seed)
        if dry_run:
            _tell(out, given, config, data, processor, options, compute)
            return
        small = _compressed(given, config, data, processor, options, compute)
        _show(out, small.compression_report)
        if looks or output is None:
            out.print("The smaller model was made in memory and checked; nothing was written.")
            return
        _save(small, output, processor, out, overwrite=overwrite, portable=portable)
    work.delete()


def _loaded(
    name: str, dtype: str, place: str | None, folder: Path, data: bool, seed: int
) -> tuple[PreTrainedModel, Processor | None]:
    """The model, in memory or on the disk, and what reads data for it."""
    from accelerate.utils import set_seed  # Transformers' own comes with its Trainer, PEFT and bitsandbytes

    from hf_compress.cli.loading import load_model
    from hf_compress.evaluation.processors import load_processor

    set_seed(seed)
    return load_model(name, dtype, place, folder), load_processor(name, needed=data)


def _compressed(model: PreTrainedModel, config: CompressionConfig, *given: Any) -> PreTrainedModel:
    from hf_compress.api.compress import compress

    return compress(model, config, *given)


def _tell(out: Console, model: PreTrainedModel, config: CompressionConfig, *given: Any) -> None:
    """Say what a run would take."""
    from hf_compress.api.estimate import estimate

    out.print(str(estimate(model, config, *given)), markup=False, soft_wrap=True)
    out.print("Dry run: nothing was done.")


def _show(out: Console, report: Any) -> None:
    out.print(edits_table(report.edits))
    out.print(str(report), markup=False, soft_wrap=True)


def _save(
    model: PreTrainedModel,
    output: Path,
    processor: Processor | None,
    out: Console,
    *,
    overwrite: bool,
    portable: bool,
) -> None:
    from hf_compress.cli.loading import how_to_load
    from hf_compress.storage.save import save

    save(model, output, processor, overwrite=overwrite, portable=portable)
    out.print(f"Saved to {output}; loaded again with identical outputs. In Python:", markup=False)
    out.print(f"  {how_to_load(output)}", markup=False)


def edits_table(edits: list[dict[str, Any]], title: str = "plan") -> Any:
    """Edits, for `rich.print`."""
    from rich.markup import escape
    from rich.table import Table

    from hf_compress.report.edits import in_rows

    table = Table("edit", "where", "what", title=title)
    for row in in_rows(edits):
        table.add_row(*map(escape, row))
    return table


@app.command()
def methods() -> None:
    """List the methods, their papers, and their settings."""
    from dataclasses import fields
    from typing import get_type_hints

    from rich.table import Table

    from hf_compress.checks import expected
    from hf_compress.methods.base.settings import config_class, method_names

    out = console()
    for name in method_names():
        cls = config_class(name)
        summary = (cls.__doc__ or "").strip().splitlines()[0]
        title = f"{name}: {summary} {cls.paper or ''}"
        table = Table("setting", "default", "values", "", title=title, title_justify="left")
        kinds = get_type_hints(cls)
        for field in fields(cls):
            values = expected(kinds[field.name], field.metadata.get("within", ""))
            table.add_row(field.name, str(field.default), values, field.metadata.get("help", ""))
        out.print(table)
