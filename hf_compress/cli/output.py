"""What the commands print with, and the options that several of them have."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console


def _checked_device(name: str | None) -> str | None:
    """A device that can compute here; ValueError for any other."""
    if name is None:
        return None
    import torch

    try:
        torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as error:
        raise ValueError(
            f"--device must be one that PyTorch computes on here, such as cpu; got {name!r}: {error}"
        ) from None
    return name


Model = Annotated[
    str, typer.Argument(help="A directory with a model, or a model's name on the Hub.", show_default=False)
]
Data = Annotated[
    str | None,
    typer.Option(
        "--calibration",
        help="Texts: a .txt, .jsonl, .json, .csv or .parquet file, a folder, or a dataset on the Hub "
        "(name:configuration:split); for a model of images or sounds a folder of those, or such a dataset. Never the "
        "data that you will test on.",
    ),
]
Samples = Annotated[int, typer.Option(help="Samples to use; drawn with --seed where there are more.", min=1)]
Seed = Annotated[int, typer.Option(help="Of whatever is random.", min=0, max=2**32 - 1)]
MaxLength = Annotated[
    int | None, typer.Option(help="Tokens to keep of a text; as many as the model has positions.", min=1)
]
BatchSize = Annotated[int, typer.Option(help="Samples that go through the model at once.", min=1)]
TextColumn = Annotated[str | None, typer.Option(help="The column with the texts (or images), where there are several.")]
Dtype = Annotated[str, typer.Option(help="auto (as stored), float32, bfloat16 or float16.")]
Device = Annotated[
    str | None,
    typer.Option(callback=_checked_device, help="cpu, cuda, …; a CUDA device where there is one.", show_default=False),
]


def rank() -> int:
    """The number of this process among those that torchrun has started."""
    return int(os.environ.get("RANK", "0"))


def is_first() -> bool:
    """Whether this process is the one that writes and prints."""
    return rank() == 0


def console() -> Console:
    """Standard output, for results; as wide as the tables need where it is no terminal. One process speaks."""
    from rich.console import Console

    width = None if sys.stdout.isatty() else 160
    return Console(width=width, highlight=False, emoji=False, quiet=not is_first())


def errors() -> Console:
    """Standard error, for messages."""
    from rich.console import Console

    return Console(stderr=True, highlight=False)


def quiet_libraries() -> None:
    """Keep Transformers and datasets from flooding the terminal: bars on terminals alone, and errors of theirs once."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import datasets
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what it raises is told
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
