"""The `hf-compress` command: its subcommands, and what becomes of their errors."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any, cast

import typer
from typer.core import TyperGroup

from hf_compress import __version__
from hf_compress.cli.output import errors
from hf_compress.cli.words import in_its_words, unloadable
from hf_compress.errors import HubError, ProcessesError, one_line

# What a wrong argument, a file, or a missing package leads to. Anything else is a bug, and shows where it comes from,
# unless it comes from loading a model: then the model is.
_EXPECTED = (ValueError, TypeError, OSError, ImportError, MemoryError, HubError, ProcessesError)
_OURS = HubError.__module__
_UsageError: Any = typer.BadParameter.__base__  # click's; late versions of typer bring one of their own


class _Commands(TyperGroup):
    """Prints errors in one line, with exit code 2; an interruption ends with 130."""

    def make_context(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().make_context(*args, **kwargs)
        except _UsageError as error:
            raise _refused(error) from None

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            errors().print("\nInterrupted: nothing was left half-written.")
            raise typer.Exit(130) from None
        except _UsageError as error:
            raise _refused(error) from None
        except Exception as error:
            name = unloadable(error)
            if ctx.params.get("debug") or isinstance(error, BrokenPipeError):
                raise
            if not isinstance(error, _EXPECTED) and name is None:
                raise
            message = str(error) or type(error).__name__
            if name is not None:
                message = f"{name} does not load: {error if type(error).__module__ == _OURS else one_line(error)}"
            command = self.get_command(ctx, ctx.invoked_subcommand or "") or self
            _print(in_its_words(message, command))
            raise typer.Exit(2) from None


def _refused(error: Any) -> Exception:
    """What ends the program after a mistake in how it was called: that in one line, or the help that was asked for."""
    if type(error).__name__ == "NoArgsIsHelpError":
        return cast(Exception, error)
    command = error.ctx.command_path if error.ctx is not None else "hf-compress"
    _print(f"{error.format_message().rstrip('.')}; see `{command} --help`")
    return typer.Exit(2)


def _print(message: str) -> None:
    text = " ".join(message.split())
    errors().print(f"Error: {text}", style="bold red", markup=False, emoji=False, highlight=False, soft_wrap=True)


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


@contextmanager
def _verbosely() -> Iterator[None]:
    """Inside, what the library decides is told on standard error, a line each, above the bars that are there."""
    from tqdm.auto import tqdm

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            tqdm.write(self.format(record), file=sys.stderr)

    logger, handler = logging.getLogger("hf_compress"), Handler()
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


@app.callback()
def _common(
    context: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="Show where an error comes from.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Tell what is decided, a line each.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    if verbose:
        context.with_resource(_verbosely())
