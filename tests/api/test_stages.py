"""Several stages in one call: the same as one after another, refused before anything runs, resumed to the same bits."""

import copy
from functools import cache

import pytest
import torch

import hf_compress as hfc
from hf_compress.api.stages import stages_of
from hf_compress.calibration.data import DataOptions
from hf_compress.methods.base.registry import left_by, needs_dense_weights
from tests.helpers import runs
from tests.helpers.disk import offloaded
from tests.helpers.every_method import NAMES, SETTINGS
from tests.helpers.interrupted import Interrupted, interrupt_behind_results
from tests.helpers.models import refusing
from tests.helpers.tiny import tiny_model

IDS = torch.randint(4, 90, (24, 9), generator=torch.Generator().manual_seed(3))
HEAL = hfc.HealConfig(steps=2, rank=2)
STAGES = [hfc.MKAConfig(num_merges=1), HEAL, SETTINGS["bits"]]


def same(model, expected):
    return runs.same(model.state_dict(), expected.state_dict())


@cache
def made():
    return hfc.compress(tiny_model("llama"), STAGES, IDS)


def test_stages_are_the_same_as_calls_one_after_another():
    model, stages = tiny_model("llama"), [SETTINGS["merge"], SETTINGS["clusters"], SETTINGS["bits"]]
    for config in stages:
        hfc.compress(model, config, IDS)
    at_once = hfc.compress(tiny_model("llama"), stages, IDS)
    assert same(at_once, model)
    assert [stage.config for stage in at_once.compression_report.stages] == [config.to_dict() for config in stages]


def test_healing_between_stages_learns_from_the_original():
    told = made().compression_report.stages
    assert [stage.method for stage in told] == ["mka", "heal", "lrp"]
    assert told[1].config == HEAL.to_dict()
    assert told[1].notes["steps"] == 2
    assert told[1].calibration == told[0].calibration
    merged = hfc.compress(tiny_model("llama"), STAGES[0], IDS)
    taught = [
        hfc.compress(
            copy.deepcopy(merged), [hfc.DropBlocksConfig(num_blocks=1, criterion="last"), HEAL], IDS, teacher=by
        )
        for by in (None, merged, tiny_model("llama", seed=1))
    ]
    assert same(taught[0], taught[1])
    assert not same(taught[0], taught[2])


def test_names_mappings_and_settings_are_stages():
    by_name = stages_of(["Adaptive-Compress", "heal", {"method": "lrp", "bits": 4.5}, {"method": "heal", "rank": 4}])
    assert by_name == (hfc.AdaptiveCompressConfig(), hfc.HealConfig(), hfc.LRPConfig(bits=4.5), hfc.HealConfig(rank=4))


@pytest.mark.parametrize(
    ("stages", "error", "message"),
    [
        ([], ValueError, "there are no stages: name methods"),
        (["heal", "adaptive_compress"], ValueError, "stage 1 is heal, and nothing is to be healed yet"),
        (
            [hfc.LRPConfig(bits=4.25), "heal", hfc.MKAConfig(ratio=0.25)],
            ValueError,
            r"stage 3 \(mka\) cannot follow stage 1 \(lrp\), which leaves weights packed: put mka before lrp",
        ),
        ([hfc.LRPConfig(sparsity=0.5), hfc.ILLCConfig(ratio=0.5)], ValueError, "which leaves weights sparse"),
        (["mkaa"], ValueError, r"unknown method 'mkaa' \(did you mean 'mka'\?\); known are .*, and heal"),
        ([{"ratio": 0.5}], TypeError, "a mapping with 'method' and settings; got {'ratio': 0.5}"),
        ([{"method": "mka", "ratoi": 0.5}], TypeError, r"mka has no setting 'ratoi' \(did you mean 'ratio'\?\)"),
        ([{"method": "heal", "epoch": 1}], TypeError, r"heal has no setting 'epoch' \(did you mean 'epochs'\?\)"),
        (
            [hfc.MKAConfig(ratio=0.25), {"method": "heal", "rank": -1}],
            ValueError,
            "rank must be a whole number of at least 0",
        ),
        ([1], TypeError, "a stage is a method's settings, its name"),
    ],
)
def test_stages_that_make_no_sense_are_refused_before_anything_runs(stages, error, message):
    model = tiny_model("llama")
    with refusing(model, error, message):
        hfc.compress(model, stages, IDS)


def test_healing_needs_data_and_weights_in_memory(tmp_path):
    with pytest.raises(hfc.UnsupportedModelError, match="the model is offloaded"):
        hfc.compress(offloaded(tiny_model("llama"), tmp_path), STAGES, IDS)
    model = tiny_model("llama")
    with refusing(model, ValueError, "heal learns from data: pass calibration="):
        hfc.compress(model, [hfc.DropBlocksConfig(num_blocks=1, criterion="last"), "heal"])
    with refusing(model, TypeError, "ratio: with several stages, settings belong inside each of them"):
        hfc.compress(model, STAGES, IDS, ratio=0.25)


@pytest.mark.parametrize("first", ["bits", "weights", "rows across maps", "neurons"])
@pytest.mark.parametrize("then", NAMES)
def test_what_is_said_of_a_sequence_is_what_happens(first, then):
    """Of every pair: it is refused before it begins if, and only if, the second would refuse what the first leaves."""
    left = _left_by(first)
    if left_by(SETTINGS[first]) and needs_dense_weights(SETTINGS[then]):
        with pytest.raises(ValueError, match="cannot follow stage 1"):
            stages_of([SETTINGS[first], SETTINGS[then]])
        with pytest.raises(hfc.UnsupportedModelError, match="an earlier change has left"):
            hfc.compress(copy.deepcopy(left), SETTINGS[then], IDS)
    else:
        stages_of([SETTINGS[first], SETTINGS[then]])
        hfc.compress(copy.deepcopy(left), SETTINGS[then], IDS)


@cache
def _left_by(name):
    return hfc.compress(tiny_model("llama"), SETTINGS[name], IDS)


def test_the_finished_stages_stay_when_a_later_one_fails(monkeypatch):
    model, merged = tiny_model("llama"), hfc.compress(tiny_model("llama"), STAGES[0], IDS)
    monkeypatch.setattr("hf_compress.training.heal_stage.heal_by", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        hfc.compress(model, STAGES, IDS)
    assert same(model, merged)
    assert model.compression_report.methods == ["mka"]


def test_a_run_interrupted_behind_each_of_its_results_comes_to_the_same(tmp_path, monkeypatch):
    results = interrupt_behind_results(monkeypatch)
    work, finished = hfc.Compute(workdir=tmp_path / "work"), False
    while not finished:
        model = tiny_model("llama")
        try:
            hfc.compress(model, STAGES, IDS, compute=work)
            finished = True
        except Interrupted:
            assert results() < 100
    assert same(model, made())
    folders = {path.parent.parent.name for path in (tmp_path / "work").glob("*/results/*")}
    assert folders == {"1-mka", "2-heal", "3-lrp"}


def test_other_settings_of_a_stage_are_refused_in_its_folder(tmp_path):
    work = hfc.Compute(workdir=tmp_path / "work")
    drop = hfc.DropBlocksConfig(num_blocks=1, criterion="last")
    hfc.compress(tiny_model("llama"), [drop, HEAL], IDS, compute=work)
    for stages, data, message in (
        ([drop, hfc.HealConfig(steps=3, rank=2)], IDS, "2-heal is of another run: settings: steps was 2 and is 3"),
        ([drop, HEAL], IDS[:16], "is of another run: data was"),
    ):
        with pytest.raises(hfc.WorkdirError, match=message):
            hfc.compress(tiny_model("llama"), stages, data, compute=work)


def test_options_reach_every_stage():
    model = hfc.compress(tiny_model("llama"), [SETTINGS["merge"], HEAL], IDS, options=DataOptions(max_length=5))
    assert [stage.calibration["tokens"] for stage in model.compression_report.stages] == [24 * 5] * 2
