"""The sixth method that CONTRIBUTING.md shows works as it stands there: one file, one name."""

import ast
import importlib
import re
import sys
from pathlib import Path
from textwrap import dedent

import pytest
import torch
from transformers import LlamaForCausalLM
from typer.testing import CliRunner

import hf_compress
from hf_compress import methods
from hf_compress.api.compress import compress
from hf_compress.cli import app
from hf_compress.errors import CalibrationError
from hf_compress.methods.base import registry, settings
from hf_compress.storage.save import save

PAGE = Path(__file__).resolve().parent.parent / "CONTRIBUTING.md"
METHOD, NAME = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
MODULE = "hf_compress.methods.quiet_attention"


@pytest.fixture
def quiet_attention(tmp_path, monkeypatch):
    """The file beside those of the other methods, and its name among the public ones; gone again afterwards."""
    (tmp_path / "quiet_attention.py").write_text(METHOD, encoding="utf-8")
    settings.method_names()  # the methods that are there have to be registered before the tables are copied
    monkeypatch.setattr(methods, "__path__", [*methods.__path__, str(tmp_path)])
    monkeypatch.setattr(settings, "_REGISTRY", dict(settings._REGISTRY))
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))
    for name, home in ast.literal_eval("{" + dedent(NAME) + "}").items():
        monkeypatch.setitem(hf_compress._PUBLIC, name, home)
    yield importlib.import_module(MODULE)
    del sys.modules[MODULE], methods.quiet_attention
    vars(hf_compress).pop("QuietAttentionConfig", None)


def test_it_compresses_saves_and_loads(quiet_attention, model, tokenizer, texts, tmp_path):
    for quiet in (1, 3):
        model.model.layers[quiet].self_attn.o_proj.weight.data *= 1e-3
    kept = [model.model.layers[index] for index in (0, 2, 4)]
    compress(model, hf_compress.QuietAttentionConfig(ratio=0.4), texts, tokenizer)
    assert list(model.model.layers) == kept
    assert model.compression_report.stages[-1].method == "quiet_attention"
    save(model, tmp_path / "smaller", tokenizer)
    inputs = tokenizer(texts[0], return_tensors="pt")
    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "smaller")
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)


def test_what_it_measures(quiet_attention, model, tokenizer, texts):
    config = quiet_attention.QuietAttentionConfig()
    measured = hf_compress.make_plan(model, config, texts, tokenizer).notes["attention_writes"]
    seen = []
    for layer in model.model.layers:
        layer.self_attn.register_forward_hook(lambda _, args, output: seen.append(output[0].double().square().sum()))
    with torch.no_grad():
        for text in texts:  # one at a time, so that there is no padding
            model(**tokenizer(text, return_tensors="pt"))
    expected = torch.stack(seen).view(len(texts), -1).sum(dim=0)
    assert measured == pytest.approx(expected.tolist(), rel=1e-5)


def test_it_refuses(quiet_attention, model):
    with pytest.raises(ValueError, match=r"ratio must be .*; got 1\.5"):
        quiet_attention.QuietAttentionConfig(ratio=1.5)
    with pytest.raises(CalibrationError, match="pass calibration="):
        compress(model, quiet_attention.QuietAttentionConfig())


def test_the_command_line_knows_it(quiet_attention):
    shown = CliRunner().invoke(app, ["methods"])
    assert "quiet_attention" in shown.output
    assert "share of the blocks to leave out" in " ".join(shown.output.split())


def test_it_leaves_nothing_behind():
    assert "quiet_attention" not in settings.method_names()
