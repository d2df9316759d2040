"""Benchmarks and examples: each can be imported without doing any work, and each script says what it is for."""

import ast
import runpy
import sys
from pathlib import Path

import pytest
from transformers import PreTrainedModel
from transformers.utils import logging

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted([*(ROOT / "benchmarks").glob("*.py"), *(ROOT / "examples").glob("*.py")])


@pytest.fixture(autouse=True)
def _as_it_was(monkeypatch):
    """Scripts import their neighbours, and turn Transformers' messages down."""
    level, modules = logging.get_verbosity(), set(sys.modules)
    yield
    logging.set_verbosity(level)
    neighbours = {path.stem for path in FILES}
    for name in (set(sys.modules) - modules) & neighbours:
        del sys.modules[name]


def run(path, name, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", [str(path), *arguments])
    monkeypatch.syspath_prepend(path.parent)
    runpy.run_path(str(path), run_name=name)


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_it_works_only_when_it_is_run_and_has_a_help(path, monkeypatch, capsys):
    def working(*_, **__):
        raise AssertionError("makes a model when it is imported")

    monkeypatch.setattr(PreTrainedModel, "__init__", working)
    run(path, "imported", monkeypatch)
    assert capsys.readouterr().out == ""
    source = path.read_text()
    if "__main__" not in source:  # what several of them share
        return
    with pytest.raises(SystemExit) as done:
        run(path, "__main__", monkeypatch, "--help")
    assert not done.value.code
    about = str(ast.get_docstring(ast.parse(source))).splitlines()[0]
    assert about in capsys.readouterr().out
