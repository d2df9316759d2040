"""The command line, `hf-compress`: it parses, calls, and prints. Nothing slow is imported until a command runs."""

from hf_compress.cli import (  # noqa: F401 (each adds its commands to `app`)
    compress,
    evaluate,
    export,
    hub,
    inspect,
    recipes,
    report,
    sweep,
)
from hf_compress.cli.app import app


def main() -> None:
    """What the `hf-compress` script calls."""
    app(prog_name="hf-compress")


__all__ = ["app", "main"]
