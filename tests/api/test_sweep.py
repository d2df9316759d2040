"""Sweeps: what is measured of each model is what it is, done once, resumed, and never the model itself changed."""

import csv
import io
import itertools
import json
import math
import random

import pytest
import torch
from transformers import BertForMaskedLM

import hf_compress as hfc
from hf_compress.api import sweep as sweeping
from hf_compress.evaluation.comparison import ComparedMetric
from hf_compress.methods.base import journal
from hf_compress.report.measured import Measured
from hf_compress.report.sweep_result import SweepResult
from tests.helpers.every_method import SETTINGS
from tests.helpers.language import tiny_llama, word_tokenizer, words
from tests.helpers.models import refusing
from tests.helpers.tiny import tiny_kind

TEXTS = [words(20, seed) for seed in range(24)]
HELD_OUT = [words(15, seed) for seed in range(100, 106)]
OPTIONS = hfc.DataOptions(batch_size=4)
ONE, TWO = hfc.MKAConfig(num_merges=1), hfc.MKAConfig(num_merges=2)
LAST = hfc.DropBlocksConfig(ratio=0.25, criterion="last")


@pytest.fixture(scope="module")
def tokenizer():
    return word_tokenizer(add_special=False)


def swept(model, configs, tokenizer, **more):
    more = {"texts": HELD_OUT, "speed": False, "controls": False} | more
    return hfc.sweep(model, configs, TEXTS, tokenizer, OPTIONS, **more)


def test_each_is_measured_beside_the_original_document_by_document(tokenizer):
    model = tiny_llama(6)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    stages = [ONE, hfc.HealConfig(steps=1, rank=2)]
    found = swept(model, {"one": ONE, "healed": stages}, tokenizer)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not hasattr(model, "compression_report")
    assert [one.methods for one in found.measured] == ["mka", "mka + heal"]
    original = hfc.perplexity(model, tokenizer, HELD_OUT)
    for one, config in zip(found.measured, (ONE, stages), strict=True):
        by_hand = hfc.compress(tiny_llama(6), config, TEXTS, tokenizer, OPTIONS)
        own, row = hfc.perplexity(by_hand, tokenizer, HELD_OUT), one.get("perplexity")
        gap, error = own.loss_difference(original)
        assert row.value == own.value
        assert row.change == pytest.approx(math.exp(gap))
        assert row.change_error == pytest.approx(math.exp(gap) * error)
        assert one.get("parameters").value == by_hand.num_parameters()
        assert one.stages == [stage.config for stage in by_hand.compression_report.stages]


@pytest.mark.parametrize(
    "configs",
    [
        [hfc.MKAConfig(num_merges=count) for count in (3, 1, 2)],
        pytest.param([hfc.MKAConfig(num_merges=count, variant="paper") for count in (1, 3)], marks=pytest.mark.slow),
        [hfc.LayerCollapseConfig(num_layers=count) for count in (2, 3)],
        [hfc.LRPConfig(bits=bits, group_size=16) for bits in (4.75, 6)],
        pytest.param(
            [hfc.LRPConfig(sparsity=share, granularity="neuron") for share in (0.25, 0.5)], marks=pytest.mark.slow
        ),
    ],
    ids=["mka", "mka, paper", "layer_collapse", "lrp, bits", "lrp, neurons"],
)
def test_what_is_worked_out_once_leaves_every_model_the_same(configs, tokenizer, tmp_path, monkeypatch):
    """The journal writes what amounts have in common once; each model has the bits that it has alone."""
    written = []
    write = journal.write_tensors
    monkeypatch.setattr(journal, "write_tensors", lambda path, *content: (written.append(path), write(path, *content)))
    swept(tiny_llama(6), configs, tokenizer, folder=tmp_path / "sweep", best=len(configs))
    common = [path.name for path in written if path.parts[-2] == "results" and path.parts[-4] == "common"]
    assert common
    assert len(common) == len(set(common))
    for folder in (tmp_path / "sweep" / "models").iterdir():
        saved = tiny_llama(6).from_pretrained(folder)
        config = next(one for one in configs if one.to_dict() == hfc.history_of(saved).config)
        alone = hfc.compress(tiny_llama(6), config, TEXTS, tokenizer, OPTIONS).state_dict()
        assert all(torch.equal(tensor, alone[name]) for name, tensor in saved.state_dict().items())


def test_a_sweep_goes_on_from_its_folder_and_takes_further_settings(tokenizer, tmp_path, monkeypatch):
    made = []
    make = sweeping._Runs.made
    monkeypatch.setattr(sweeping._Runs, "made", lambda self, stages: (made.append(stages), make(self, stages))[1])
    first = swept(tiny_llama(6), [ONE], tokenizer, folder=tmp_path / "sweep")
    second = swept(tiny_llama(6), {"two": TWO, "one": ONE}, tokenizer, folder=tmp_path / "sweep")
    assert made == [(ONE,), (TWO,)]
    assert [one.name for one in second.measured] == ["two", "one"]
    assert second.measured[1].metrics[0].value == first.measured[0].metrics[0].value
    for changes in ({"texts": HELD_OUT[:3]}, {"limit": 2}, {"speed": True}):
        with pytest.raises(hfc.WorkdirError, match="is of another run: measured"):
            swept(tiny_llama(6), [ONE], tokenizer, folder=tmp_path / "sweep", **changes)
    with pytest.raises(hfc.WorkdirError, match="is of another run: model"):
        swept(tiny_llama(5), [ONE], tokenizer, folder=tmp_path / "sweep")


def test_files_controls_speed_and_what_is_refused(tokenizer, tmp_path):
    configs = {"merged": hfc.MKAConfig(ratio=0.25), "too many": hfc.DropBlocksConfig(num_blocks=9)}
    found = swept(tiny_llama(4), configs, tokenizer, controls=True, speed=True, folder=tmp_path, best=1)
    assert [one.name for one in found.measured] == ["merged", "too many", "last blocks left out, ratio=0.25"]
    assert [one.control for one in found.measured] == [False, False, True]
    assert found.measured[1].error.startswith("num_blocks=9 takes 9 of 4 blocks and leaves none")
    assert found.measured[0].get("generated tokens/s").change > 0
    rows = list(csv.DictReader(io.StringIO((tmp_path / "sweep.csv").read_text())))
    assert [row["name"] for row in rows] == ["original", *(one.name for one in found.measured)]
    assert float(rows[1]["perplexity"]) == found.measured[0].get("perplexity").value
    assert json.loads(rows[1]["settings"]) == found.measured[0].stages
    assert rows[2]["refused"].startswith("num_blocks=9")
    assert (tmp_path / "sweep.png").stat().st_size > 1000
    assert json.loads((tmp_path / "sweep.json").read_text())["front"] == [one.name for one in found.front()]
    table = found.table()
    assert "too many" in table
    assert "× 0." in table
    assert "<td>merged" in found._repr_html_()


BAD = {
    "nothing": ([], {}, ValueError, "there is nothing to sweep over"),
    "twice": ([ONE, ONE], {}, ValueError, "have the same settings: leave one of them out"),
    "sequence": ([["heal"]], {}, ValueError, "stage 1 is heal"),
    "workdir": ([ONE], {"compute": hfc.Compute(workdir="x")}, ValueError, "a sweep keeps its work in folder="),
    "best": ([ONE], {"best": 2}, ValueError, "best=2 models are to be saved, but not where: give folder="),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_are_refused_before_any_work(case, tokenizer):
    configs, more, error, message = BAD[case]
    model = tiny_llama(4)
    with refusing(model, error, message):
        hfc.sweep(model, configs, TEXTS, tokenizer, texts=HELD_OUT, **more)


def test_the_front_is_what_nothing_smaller_beats():
    """Against the definition, over random sizes and losses with ties."""
    draw = random.Random(0)
    for _ in range(200):
        points = [(draw.randint(1, 6), draw.randint(1, 6), draw.random() < 0.2) for _ in range(draw.randint(1, 8))]
        measured = [
            Measured(str(i), [], [_row("stored bytes", size), _row("perplexity", loss)], control=control)
            for i, (size, loss, control) in enumerate(points)
        ]
        found = SweepResult([_row("perplexity", 1)], measured).front()
        kept = {points[int(one.name)][:2] for one in found}
        beaten = {
            (size, loss)
            for size, loss, _ in points
            if any(one <= size and other <= loss and (one, other) != (size, loss) for one, other, _ in points)
        }
        best = {(size, loss) for size, loss, control in points if (size, loss) not in beaten and not control}
        assert kept == best
        losses = [one.get("perplexity").value for one in found]
        assert all(first <= then for first, then in itertools.pairwise(losses))


def _row(metric, value):
    return ComparedMetric(metric, "m", value, higher_is_better=False)


def test_settings_are_named_by_what_is_not_the_default():
    assert sweeping.told(hfc.MKAConfig(ratio=0.25)) == "mka ratio=0.25"
    assert sweeping.told(hfc.HealConfig()) == "heal"
    assert len({sweeping.told(config) for config in SETTINGS.values()}) == len(SETTINGS)


# --- what is not taken for the same, and what is no fault of the settings ---------------------------------------------


def test_a_control_that_is_asked_for_is_measured_once_and_nothing_made_draws_nothing(tokenizer, tmp_path):
    found = swept(tiny_llama(4), [LAST, hfc.DropBlocksConfig(num_blocks=9)], tokenizer, controls=True)
    assert [one.control for one in found.measured] == [False, False]
    refused = swept(tiny_llama(4), [hfc.DropBlocksConfig(num_blocks=9)], tokenizer, folder=tmp_path)
    assert "leaves none" in refused.table()
    assert not (tmp_path / "sweep.png").exists()
    with pytest.raises(ValueError, match="no model was made, so there is nothing to draw"):
        refused.plot(tmp_path / "sweep.png")


def test_what_r2_decides_is_not_shared(tokenizer):
    """FFNs that a ratio has collapsed may be none that R² would let go, and the other way round."""
    by_ratio, by_r2 = hfc.LayerCollapseConfig(ratio=0.5), hfc.LayerCollapseConfig(target_r2=0.9999)
    for configs in ([by_ratio, by_r2], [by_r2, by_ratio]):
        found = {one.name: one.error for one in swept(tiny_llama(4), configs, tokenizer).measured}
        assert found[sweeping.told(by_ratio)] == ""
        assert "no FFN has R² of at least 0.9999" in found[sweeping.told(by_r2)]


def test_a_full_disk_says_nothing_of_the_settings(tokenizer, tmp_path, monkeypatch):
    def full(*_, **__):
        raise hfc.WorkdirError("no space")

    with monkeypatch.context() as patched:
        patched.setattr(sweeping, "compress_in_stages", full)
        with pytest.raises(hfc.WorkdirError, match="no space"):
            swept(tiny_llama(4), [ONE], tokenizer, folder=tmp_path)
    assert swept(tiny_llama(4), [ONE], tokenizer, folder=tmp_path).measured[0].error == ""


def test_the_callers_dtype_changes_nothing(tokenizer):
    model = tiny_llama(4)
    usual = swept(model, [ONE], tokenizer).measured[0].metrics
    torch.set_default_dtype(torch.bfloat16)
    try:
        other = swept(model, [ONE], tokenizer).measured[0].metrics
    finally:
        torch.set_default_dtype(torch.float32)
    assert [row.value for row in usual] == [row.value for row in other]


def test_a_metric_that_does_not_fit_is_told_before_anything_is_compressed(monkeypatch):
    monkeypatch.setattr(sweeping, "compress_in_stages", lambda *_, **__: 1 / 0)
    with pytest.raises(hfc.UnsupportedModelError, match="perplexity needs a model that predicts the next token"):
        hfc.sweep(tiny_kind(BertForMaskedLM, "bert"), [LAST], texts=HELD_OUT)
