"""Where work is done, and within how much memory."""

import shutil
from contextlib import nullcontext
from socket import gethostname
from types import SimpleNamespace

import pytest
import torch

import hf_compress as hfc
from hf_compress.calibration import compute
from hf_compress.calibration.compute import Compute, least_memory
from hf_compress.calibration.memory import WorkingMemory, working_memory
from tests.helpers.disk import offloaded
from tests.helpers.tiny import tiny_model

IDS = torch.randint(4, 90, (24, 9), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize(("given", "size"), [("6GiB", 6 * 2**30), ("500MB", 500_000_000), (7, 7)])
def test_sizes(given, size):
    assert Compute(max_memory=given).budget == size


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_memory": "much"}, "max_memory must be bytes, or a size such as \"6GiB\"; got 'much'"),
        ({"max_memory": -1}, "got -1"),
        ({"max_memory": 1.5}, "got 1.5"),
        ({"device": "abacus"}, "device must be a device of PyTorch"),
    ],
)
def test_what_is_no_size_or_device_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Compute(**settings)


def test_a_budget_is_shared_by_what_is_needed_at_once_by_streams_and_by_sums():
    model = tiny_model("llama")
    block, around, squares = least_memory(model)
    assert block == sum(parameter.nbytes for parameter in model.model.layers[0].parameters())
    assert around == model.model.embed_tokens.weight.nbytes
    assert squares == 6 * 4 * model.config.intermediate_size**2
    assert Compute().memory_for(model) == WorkingMemory()
    assert Compute(max_memory=squares + 1000).memory_for(model) == WorkingMemory(500, squares + 500)
    elsewhere = Compute(max_memory=squares + block + around + 1000, device="meta")
    assert elsewhere.memory_for(model) == WorkingMemory(500, squares + 500)


@pytest.mark.parametrize("on_disk", [False, True])
def test_a_budget_that_is_too_small_says_what_is_needed(on_disk, tmp_path):
    model = offloaded(tiny_model("llama"), tmp_path) if on_disk else tiny_model("llama")
    before = dict(model.named_parameters())
    with pytest.raises(hfc.MemoryBudgetError, match=r"max_memory='1KB' is too little .* takes about 0\.\d+ GiB"):
        hfc.compress(model, hfc.MKAConfig(num_merges=1), IDS, compute=Compute(max_memory="1KB"))
    assert dict(model.named_parameters()) == before


def test_inside_the_budget_holds_and_afterwards_none(tmp_path):
    model = tiny_model("llama")
    with Compute(max_memory="1GiB", workdir=tmp_path).applied(model):
        assert working_memory() == Compute(max_memory="1GiB", workdir=tmp_path).memory_for(model)
        assert working_memory().folder == tmp_path / "streams"
    assert working_memory() == WorkingMemory()


def test_streams_in_files_change_nothing(tmp_path):
    model, other = tiny_model("llama"), tiny_model("llama")
    least = sum(least_memory(model)) + 1
    hfc.compress(model, hfc.ILLCConfig(ratio=0.25), IDS)
    hfc.compress(other, hfc.ILLCConfig(ratio=0.25), IDS, compute=Compute(max_memory=least, workdir=tmp_path))
    assert all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in model.state_dict().items())
    assert list((tmp_path / "streams").iterdir()) == []


def test_a_device_other_than_the_model_s_runs_it_from_there(monkeypatch):
    placed = []
    monkeypatch.setattr(compute, "computed_on", lambda model, device: placed.append(device) or nullcontext())
    with Compute(device="cuda:1").applied(tiny_model("llama")):
        pass
    for same in ("cpu", "cpu:0", torch.device("cpu")):
        with Compute(device=same).applied(tiny_model("llama")):
            pass
    assert placed == [torch.device("cuda:1")]


def test_no_room_for_what_is_finished_is_told_of_before_anything_is_done(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
    model = tiny_model("llama")
    with pytest.raises(hfc.WorkdirError, match=r"has 0\.00 GB left, and what is finished may take .*make room"):
        hfc.compress(model, hfc.ILLCConfig(ratio=0.25), IDS, compute=Compute(workdir=tmp_path))


def test_changed_weights_lie_in_the_workdir_and_those_of_runs_that_are_gone_go(tmp_path):
    changed = tmp_path / "work" / "changed"
    left, others = changed / f"{gethostname()}-999999999", changed / "far-1"
    model = offloaded(tiny_model("llama"), tmp_path / "model")
    hfc.compress(model, hfc.ILLCConfig(ratio=0.25), IDS, compute=Compute(workdir=tmp_path / "work"))
    (own,) = changed.iterdir()
    assert list(own.iterdir()) != []
    for folder in (left, others):
        folder.mkdir()
    again = offloaded(tiny_model("llama"), tmp_path / "again")
    hfc.compress(again, hfc.ILLCConfig(ratio=0.25), IDS, compute=Compute(workdir=tmp_path / "work"))
    assert set(changed.iterdir()) == {own, others}
    hfc.save(again, tmp_path / "saved")
