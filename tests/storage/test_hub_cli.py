"""`hf-compress push`: what it sends, from the directory alone."""

import json

from huggingface_hub import ModelCard
from typer.testing import CliRunner

from hf_compress.api.compress import compress
from hf_compress.cli import app
from hf_compress.methods.drop_blocks import DropBlocksConfig
from hf_compress.report.report import REPORT_FILE
from hf_compress.storage.save import save


def test_push_sends_model_tokenizer_report_and_an_edited_card(hub, model, tokenizer, tmp_path):
    compress(model, DropBlocksConfig(num_blocks=2, criterion="last"))
    folder = save(model, tmp_path / "small", tokenizer)
    card = ModelCard.load(folder / "README.md")
    card.text += "\nWritten by hand.\n"
    card.save(folder / "README.md")
    result = CliRunner().invoke(app, ["push", str(folder), "me/small", "--message", "Two blocks fewer"])
    assert result.exit_code == 0, result.output
    assert "Pushed to" in result.stdout
    files = hub.files("me/small")
    assert {"model.safetensors", "tokenizer.json", REPORT_FILE, "README.md"} <= files.keys()
    assert b"Written by hand." in files["README.md"]
    assert json.loads(files[REPORT_FILE])["stages"][0]["method"] == "drop_blocks"
    assert files["README.md"].count(b'from_pretrained("me/small")') == 2
    assert not any(word in files["README.md"] for word in (b"path/to", b"Replace the path"))


def test_push_of_what_is_no_model(hub, tmp_path):
    result = CliRunner().invoke(app, ["push", str(tmp_path), "me/small"])
    assert result.exit_code == 2
    assert "config.json" in result.stderr
