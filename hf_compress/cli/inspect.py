"""`hf-compress analyze` and `hf-compress info`: looking at models, changing nothing."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from hf_compress.cli.app import app
from hf_compress.cli.compress import edits_table
from hf_compress.cli.output import (
    BatchSize,
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
    from transformers import PreTrainedModel

    from hf_compress.report.report import CompressionReport


@app.command()
def analyze(  # noqa: PLR0913 (each of them is an option of the command)
    model: Model,
    calibration: Annotated[str, typer.Option(help="Data; as for `compress`.", show_default=False)],
    output: Annotated[
        Path | None, typer.Option(help="Folder for similarity.png and analysis.json; nothing is written without.")
    ] = None,
    similarity: Annotated[
        str, typer.Option(help="information, cka, cosine, angular or block_influence.")
    ] = "information",
    samples: Samples = 256,
    max_length: MaxLength = None,
    batch_size: BatchSize = 8,
    text_column: TextColumn = None,
    dtype: Dtype = "auto",
    device: Device = None,
    seed: Seed = 0,
) -> None:
    """Show how alike a model's blocks are, how linear their FFNs, and what each ratio would take out.

    Two passes over the data, more for a wide model; the model stays as it is.
    """
    from hf_compress.api.analyze import analyze
    from hf_compress.calibration.data import DataOptions
    from hf_compress.calibration.files import load
    from hf_compress.cli.loading import load_model
    from hf_compress.evaluation.processors import kind_read_by, load_processor
    from hf_compress.methods.mka import MKAConfig
    from hf_compress.storage.staging import check_writable

    quiet_libraries()
    config = MKAConfig(ratio=0.5, similarity=cast(Any, similarity))
    options = DataOptions(batch_size, max_length, text_column)
    if output is not None:
        check_writable(output)  # before any work is done
    data = load(calibration, text_column, samples, seed, kind_read_by(model))
    loaded, processor = load_model(model, dtype, device), load_processor(model, needed=True)
    found = analyze(loaded, data, processor, config=config, options=options)
    out = console()
    out.print(found.table(), found.removals_table())
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        found.to_json(output / "analysis.json")
        picture = found.plot(output / "similarity.png")
        out.print(f"Wrote {picture} and {output / 'analysis.json'}", markup=False)


@app.command()
def info(
    directory: Annotated[Path, typer.Argument(help="A directory with a saved model.", show_default=False)],
    device: Device = None,
) -> None:
    """Show what was done to a model, its sizes, and whether it is what its files say.

    Exit code 1: it does not load as its config and report say.
    """
    from hf_compress.cli.loading import load_model
    from hf_compress.errors import UnsupportedModelError
    from hf_compress.evaluation.size import stored_bytes
    from hf_compress.report.history import read_report
    from hf_compress.report.markdown import human_bytes

    quiet_libraries()
    if not directory.is_dir():
        raise FileNotFoundError(f"{directory}: no such directory")
    report = read_report(directory)
    out = console()
    if report is None:
        out.print(f"{directory} has no compression report: a model as any other.", markup=False)
    else:
        _show(report)
    try:
        model = load_model(str(directory), device=device)
        out.print(f"stored: {human_bytes(stored_bytes(directory))}; parameters: {model.num_parameters():,}")
        _show_record(model)
        _check(model, report)
    except UnsupportedModelError as error:
        out.print(f"parity check FAILED: {error}", style="bold red", markup=False)
        raise typer.Exit(1) from None
    out.print("parity check passed: a model rebuilt from its config gives identical outputs", style="green")


def _show(report: CompressionReport) -> None:
    from hf_compress.report.card_history import amounts

    out = console()
    out.print(str(report), markup=False, soft_wrap=True)
    for number, stage in enumerate(report.stages, 1):
        out.print(edits_table(stage.edits, title=f"{number}. {stage.method}" if len(report.stages) > 1 else "plan"))
        settings = {name: value for name, value in stage.config.items() if value is not None and name != "method"}
        data = (amounts(stage.calibration), str(stage.calibration.get("source", "")))
        lines = {
            "settings": _listed(settings),
            "calibration": "; from ".join(filter(None, data)),
            "made with": _listed(stage.environment),
        }
        for name, told in lines.items():
            out.print(f"{name}: {told or 'none'}", markup=False)


def _listed(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={value}" for key, value in values.items())


def _show_record(model: PreTrainedModel) -> None:
    """Say where a model's structure is kept, and what of it the config's own fields do not say."""
    from hf_compress.rewrite.record import recorded

    if edits := recorded(model.config):
        console().print("loads with `import hf_compress`: its config carries a record of its structure")
        console().print(edits_table([edit.to_dict() for edit in edits], title="record"))
    else:
        console().print("a plain checkpoint: loads with stock Transformers")


def _check(model: PreTrainedModel, report: CompressionReport | None) -> None:
    """Raise unless the model is what its config and its report say.

    Raises:
        UnsupportedModelError: what differs.
    """
    from hf_compress.errors import ParityError
    from hf_compress.report.history import model_size
    from hf_compress.rewrite.parity import check_parity
    from hf_compress.rewrite.probe import Probe

    if report is not None:
        size = model_size(model)
        if (size.parameters, size.blocks) != (report.after.parameters, report.after.blocks):
            raise ParityError(
                f"the report speaks of {report.after.parameters:,} parameters in {report.after.blocks} blocks, the "
                f"model has {size.parameters:,} in {size.blocks}: one of them is not of this directory"
            )
    check_parity(model, Probe.of(model))
