"""The `hf-compress` command: its subcommands, and what becomes of their errors."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from hf_compress import __version__
from hf_compress.cli.output import errors
from hf_compress.errors import HubError

# What a wrong argument, a file, or a missing package leads to. Anything else is a bug, and shows where it comes from.
_EXPECTED = (ValueError, TypeError, OSError, ImportError, MemoryError, HubError)


class _Commands(TyperGroup):
    """Prints errors in one line, with exit code 2; an interruption ends with 130."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            errors().print("\nInterrupted: nothing was left half-written.")
            raise typer.Exit(130) from None
        except _EXPECTED as error:
            if ctx.params.get("debug") or isinstance(error, BrokenPipeError):
                raise
            message = " ".join(str(error).split()) or type(error).__name__
            errors().print(f"Error: {message}", style="bold red", markup=False, highlight=False, soft_wrap=True)
            raise typer.Exit(2) from None


app = typer.Typer(
    cls=_Commands,
    help="Make Hugging Face models smaller by changing their structure, and leave ordinary Hugging Face models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(asked: bool) -> None:
    if asked:
        print(f"hf-compress {__version__}")
        raise typer.Exit


@app.callback()
def _common(
    debug: Annotated[bool, typer.Option("--debug", help="Show where an error comes from.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass
