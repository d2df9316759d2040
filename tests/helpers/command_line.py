"""The command line in this process."""

from pathlib import Path

from typer.testing import CliRunner, Result

from hf_compress.cli import app

LAST = ("--method", "drop_blocks", "--set", "criterion=last")  # a method that needs no data


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def done(*arguments: str | Path) -> str:
    """What a command prints that does its work."""
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


def refused(*arguments: str | Path) -> str:
    """The one line with which a command refuses its arguments."""
    result = run(*arguments)
    assert result.exit_code == 2, result.exception or result.output
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("Error: ")
    return line
