"""What is told while a model is compressed: each decision in the log, bars on terminals and in notebooks, no print."""

import io
import logging
import sys
from types import SimpleNamespace

import pytest
import torch
from transformers import Trainer

import hf_compress as hfc
from tests.helpers.every_method import NAMES, SETTINGS
from tests.helpers.runs import arguments, token_rows
from tests.helpers.tiny import tiny_model

IDS = torch.randint(4, 90, (24, 9), generator=torch.Generator().manual_seed(3))
WORDS = {
    "MergeBlocks": "stands for blocks",
    "RemoveBlocks": "left out: ",
    "NarrowFFN": "hidden units",
    "NarrowAttention": "heads of",
    "LinearFFN": "one linear map",
    "InsertBottleneck": "features of a stream of",
    "PackLinear": "bits a weight on average",
    "SparsifyLinear": "weights kept",
}


class Terminal(io.StringIO):
    def isatty(self):
        return True


def terminal(monkeypatch):
    """What stands in for standard error from now on; pytest puts its own there after every fixture."""
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    return terminal


@pytest.fixture
def lines(caplog):
    """What the library has logged so far."""
    caplog.set_level(logging.INFO, "hf_compress")
    return lambda: [record.getMessage() for record in caplog.records if record.levelno == logging.INFO]


@pytest.mark.parametrize("name", NAMES)
def test_every_decision_is_logged_and_nothing_printed(name, lines, monkeypatch, capsys):
    shown = terminal(monkeypatch)
    monkeypatch.setenv("TQDM_DISABLE", "1")
    report = hfc.compress(tiny_model("llama"), SETTINGS[name], IDS).compression_report
    assert (shown.getvalue(), capsys.readouterr().out) == ("", "")
    assert len(lines()) == len(set(lines())) < 2 * len(IDS)
    kinds = {edit["edit"] for edit in report.edits}
    assert kinds
    for kind in kinds:
        assert any(line.startswith(f"{report.method}: ") and WORDS[kind] in line for line in lines()), kind


def test_bars_go_when_they_are_done(monkeypatch):
    shown = terminal(monkeypatch)
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    hfc.compress(tiny_model("llama"), "drop_blocks", IDS, num_blocks=1, criterion="block_influence")
    assert "reading activations: " in shown.getvalue()
    *_, last, end = shown.getvalue().split("\r")
    assert (last.strip(), end) == ("", ""), "what they have written is blanked"


def test_notebooks_have_bars(monkeypatch):
    shown = io.StringIO()
    monkeypatch.setattr(sys, "stderr", shown)
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    hfc.make_plan(tiny_model("llama"), "drop_blocks", IDS, num_blocks=1, criterion="block_influence")
    assert shown.getvalue() == "", "a file has none"
    kernel = SimpleNamespace(get_ipython=lambda: SimpleNamespace(config={"IPKernelApp": {}}))
    monkeypatch.setitem(sys.modules, "IPython", kernel)
    hfc.make_plan(tiny_model("llama"), "drop_blocks", IDS, num_blocks=1, criterion="block_influence")
    assert "reading activations" in shown.getvalue()


def test_training_tells_its_changes(lines, tmp_path):
    callback = hfc.CompressionCallback(hfc.DropBlocksConfig(num_blocks=2, criterion="last"), every=1)
    Trainer(tiny_model("llama"), arguments(tmp_path), train_dataset=token_rows(), callbacks=[callback]).train()
    left_out = [line for line in lines() if line.startswith("drop_blocks: model.layers: left out: ")]
    assert len(left_out) == 2, "one for each change"
