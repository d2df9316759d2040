"""Runs that end before their time go on from their workdir, and come to the same bits."""

import json
import subprocess
import sys

import pytest
import torch

import hf_compress as hfc
from tests.helpers import runs
from tests.helpers.disk import offloaded
from tests.helpers.every_method import NAMES, SETTINGS
from tests.helpers.interrupted import Interrupted, interrupt_behind_results
from tests.helpers.tiny import tiny_model

IDS = torch.randint(4, 90, (24, 9), generator=torch.Generator().manual_seed(3))
ONE_OF_EACH = ["merge", "drop by loss", "clusters", "collapse", "features", "bits", "weights"]


def resumed(model, settings, folder, ids=IDS):
    return hfc.compress(model, settings, ids, compute=hfc.Compute(workdir=folder))


def same(model, expected):
    return runs.same(model.state_dict(), expected)


@pytest.mark.parametrize("name", NAMES)
def test_a_run_interrupted_behind_each_of_its_results_comes_to_the_same(name, tmp_path, monkeypatch):
    expected = hfc.compress(tiny_model("llama"), SETTINGS[name], IDS).state_dict()
    results = interrupt_behind_results(monkeypatch)
    for _ in range(100):
        model = tiny_model("llama")
        try:
            resumed(model, SETTINGS[name], tmp_path / "work")
            break
        except Interrupted:
            assert same(model, tiny_model("llama").state_dict()), "the model is as it was"
    assert same(model, expected)
    assert results() == len(list((tmp_path / "work" / "results").iterdir()))


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_a_model_on_the_disk_goes_on_too(name, tmp_path, monkeypatch):
    expected = hfc.compress(tiny_model("llama"), SETTINGS[name], IDS).state_dict()
    first = offloaded(tiny_model("llama"), tmp_path / "first")
    with monkeypatch.context() as patched:
        patched.setattr("hf_compress.rewrite.apply.check_parity", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            resumed(first, SETTINGS[name], tmp_path / "work")
    again = resumed(offloaded(tiny_model("llama"), tmp_path / "again"), SETTINGS[name], tmp_path / "work")
    hfc.save(again, tmp_path / "saved")
    loaded = type(again).from_pretrained(tmp_path / "saved")
    assert same(loaded, expected)


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"ids": IDS + 1}, "data was"),
        ({"settings": hfc.ILLCConfig(ratio=0.25, seed=3)}, "settings: seed was 0 and is 3"),
        ({"model": lambda: tiny_model("llama", seed=1)}, "model was"),
    ],
)
def test_what_differs_of_another_run_is_named(changed, named, tmp_path):
    resumed(tiny_model("llama"), SETTINGS["clusters"], tmp_path / "work")
    given = {"model": lambda: tiny_model("llama"), "settings": SETTINGS["clusters"], "ids": IDS} | changed
    model = given["model"]()
    with pytest.raises(hfc.WorkdirError, match=f"is of another run: {named}"):
        resumed(model, given["settings"], tmp_path / "work", given["ids"])


@pytest.mark.slow
def test_runs_that_are_killed_come_to_the_same_bits(tmp_path):
    command = [sys.executable, "-m", "tests.helpers.run_killed", str(tmp_path), "6", *ONE_OF_EACH]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    assert all(one["same"] for one in found.values()), found
    assert sum(sum(one["kills"]) for one in found.values()) >= 30, found
