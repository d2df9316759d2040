"""`hf-compress run` and `hf-compress schema`: a recipe in one command, killed and resumed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

import hf_compress as hfc
from tests.helpers.command_line import done, run
from tests.helpers.language import words
from tests.helpers.runs import same

STAGES = [
    {"method": "mka", "num_merges": 2},
    {"method": "heal", "steps": 2, "rank": 2},
    {"method": "lrp", "bits": 6, "group_size": 16},
]


def recipe(home: Path, folder: Path, **changes) -> Path:
    (home / "heldout.jsonl").write_text("".join(json.dumps({"text": words(20, s)}) + "\n" for s in range(50, 58)))
    values = {
        "model": str(home / "model"),
        "stages": STAGES,
        "calibration": {"data": str(home / "texts.jsonl"), "samples": 16, "batch_size": 4},
        "evaluate": {"texts": str(home / "heldout.jsonl"), "limit": 4},
        "output": str(folder / "smaller"),
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({name: value for name, value in (values | changes).items() if value is not None}))
    return path


@pytest.mark.slow
def test_a_recipe_does_all_of_it(home, tmp_path):
    printed = done("run", recipe(home, tmp_path))
    for told in ("1. mka", "3. lrp", "perplexity", "against model", "import hf_compress; AutoModelForCausalLM"):
        assert told in printed
    folder = tmp_path / "smaller"
    report = hfc.CompressionReport.from_json((folder / "compression_report.json").read_bytes())
    assert [stage.method for stage in report.stages] == ["mka", "heal", "lrp"]
    card = (folder / "README.md").read_text()
    assert "## Evaluation" in card
    assert "uncompressed" in card
    assert not (tmp_path / "smaller.partial").exists()
    done("verify", folder)
    again = done("run", folder, "--output", tmp_path / "again")
    assert "against model" not in again, "a report does not say what was measured"
    _same(folder, tmp_path / "again")


def _same(first: Path, second: Path) -> None:
    one, other = (load_file(folder / "model.safetensors") for folder in (first, second))
    assert same(one, other)


@pytest.mark.slow
def test_a_run_that_is_killed_between_stages_goes_on(home, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir()
    killed.mkdir()
    done("run", recipe(home, whole, evaluate=None))
    path, work = recipe(home, killed, evaluate=None), killed / "smaller.partial"
    for stage in ("1-mka", "2-heal", "3-lrp"):
        command = [sys.executable, "-m", "hf_compress", "run", str(path), "--resume"]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and not list((work / stage / "results").glob("*.safetensors")):
            time.sleep(0.005)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert not (killed / "smaller").exists()
    refused = run("run", path)
    assert refused.exit_code == 2
    assert "has what an earlier run has finished: give --resume" in refused.output
    done("run", path, "--resume")
    assert not work.exists()
    _same(whole / "smaller", killed / "smaller")


@pytest.mark.slow
def test_what_was_saved_before_it_was_measured_is_not_made_again(home, tmp_path, monkeypatch):
    path = recipe(home, tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr("hf_compress.api.run.compare", lambda *_, **__: 1 / 0)
        assert run("run", path).exit_code == 1
    monkeypatch.setattr("hf_compress.api.run.compress", lambda *_: 1 / 0)
    assert "against model" in done("run", path, "--resume")
    assert not (tmp_path / "smaller.partial").exists()


@pytest.mark.slow
def test_another_recipe_does_not_take_over_what_is_there(home, tmp_path, monkeypatch):
    path = recipe(home, tmp_path, stages=STAGES[:1])
    with monkeypatch.context() as patched:
        patched.setattr("hf_compress.api.run.compare", lambda *_, **__: 1 / 0)
        assert run("run", path).exit_code == 1
    path = recipe(home, tmp_path, stages=STAGES[:1], seed=1)
    result = run("run", path, "--resume")
    assert result.exit_code == 2
    assert "smaller exists and is not empty" in result.output.replace("\n", " ")


def test_finished_stages_stay_when_a_later_one_fails(home, tmp_path, monkeypatch):
    monkeypatch.setattr("hf_compress.training.heal_stage.heal_by", lambda *_: 1 / 0)
    assert run("run", recipe(home, tmp_path, evaluate=None)).exit_code == 1
    assert list((tmp_path / "smaller.partial" / "1-mka" / "results").iterdir())


REFUSED = {
    "key": ({"evalaute": {}}, "a recipe has no setting 'evalaute' (did you mean 'evaluate'?)"),
    "sequence": ({"stages": [STAGES[2], STAGES[0]]}, "stage 2 (mka) cannot follow stage 1 (lrp), which leaves weights"),
    "model": ({"model": "./nowhere"}, "./nowhere: no such directory"),
    "no output": ({"output": None}, "the recipe does not say where the model goes: give it output: FOLDER"),
    "data": ({"calibration": "nowhere.jsonl"}, "nowhere.jsonl: no such file or folder"),
    "texts": ({"evaluate": {"texts": "nowhere.jsonl"}}, "nowhere.jsonl: no such file or folder"),
    "no data": (
        {"calibration": None},
        "heal learns from data, and the recipe has none: give it calibration",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_recipes_are_refused_in_one_line_before_any_work(case, home, tmp_path):
    changes, message = REFUSED[case]
    result = run("run", recipe(home, tmp_path, **changes))
    assert result.exit_code == 2
    assert message in result.output.replace("\n", " ")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["recipe.yaml"]


def test_an_output_that_exists_and_a_metric_that_does_not_fit_are_refused(home, tmp_path):
    (tmp_path / "smaller").mkdir()
    (tmp_path / "smaller" / "file").touch()
    result = run("run", recipe(home, tmp_path))
    assert result.exit_code == 2
    assert "smaller exists and is not empty: choose another, or pass --overwrite" in result.output.replace("\n", " ")
    (tmp_path / "smaller" / "file").unlink()
    from transformers import BertConfig, BertForSequenceClassification

    sizes = {"num_hidden_layers": 2, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16}
    BertForSequenceClassification(BertConfig(vocab_size=64, **sizes)).save_pretrained(tmp_path / "classifier")
    result = run("run", recipe(home, tmp_path, model=str(tmp_path / "classifier")))
    assert result.exit_code == 2
    assert "perplexity needs a model that predicts the next token" in result.output.replace("\n", " ")


def test_the_schema_is_printed():
    assert json.loads(done("schema"))["title"] == "hf_compress recipe"
