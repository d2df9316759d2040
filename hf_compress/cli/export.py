"""`hf-compress export`: a saved model in the form of another engine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hf_compress.cli.app import app
from hf_compress.cli.output import console, quiet_libraries


@app.command()
def export(  # noqa: PLR0913 (an option for each that a form has)
    model: Annotated[
        str, typer.Argument(help="A directory with a model, or a model's name on the Hub.", show_default=False)
    ],
    output: Annotated[Path, typer.Option(help="The folder for what is written.", show_default=False)],
    to: Annotated[
        str,
        typer.Option(
            help="gguf (llama.cpp), onnx (ONNX Runtime), openvino, vllm, compressed-tensors (Transformers, vLLM), or "
            "dense: an ordinary checkpoint, packed and sparse weights written out.",
            show_default=False,
        ),
    ],
    outtype: Annotated[
        str | None,
        typer.Option(
            help="For gguf: how numbers are stored, f32, f16, bf16 or q8_0.", show_default="(as in the model)"
        ),
    ] = None,
    pre_tokenizer: Annotated[
        str | None,
        typer.Option(help="For gguf: llama.cpp's name for how the tokenizer splits texts.", show_default="(found out)"),
    ] = None,
    python: Annotated[
        str | None,
        typer.Option(help="For vllm: the interpreter of the environment with vLLM.", show_default="(this one)"),
    ] = None,
    precision: Annotated[
        str | None,
        typer.Option(help="For vllm: what it computes in when it is compared.", show_default="(float32)"),
    ] = None,
    tolerance: Annotated[
        float | None,
        typer.Option(help="Nats by which log-probabilities may differ.", show_default="(the engine's own)"),
    ] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace the folder, if it exists.")] = False,
) -> None:
    """Write a saved model for another engine, load it there, and compare what it says with Transformers.

    Where the engine cannot run what the model is, or says something else, nothing is written, and the reason is told.
    """
    from hf_compress.engines.export import export as write

    quiet_libraries()
    given = {"outtype": outtype, "pre_tokenizer": pre_tokenizer, "python": python, "precision": precision}
    options = {name: value for name, value in given.items() if value is not None}
    told = write(model, output, to, overwrite=overwrite, tolerance=tolerance, **options)
    console().print(f"Wrote {told}", markup=False)
