"""A run that is stopped and resumed ends as it would have without the stop, bit for bit."""

import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback

from hf_compress import (
    AdaptiveCompressConfig,
    CompressionCallback,
    DropBlocksConfig,
    LayerCollapseConfig,
    MKAConfig,
)
from hf_compress.training.checkpoint import STATE_FILE
from tests.helpers.language import tiny_llama
from tests.helpers.marks import only_quick
from tests.helpers.runs import (
    CALIBRATION,
    PAPER,
    arguments,
    dropping_llama,
    figures,
    loss_on,
    same,
    state_of,
    token_rows,
)

ROWS = token_rows(ignored=True)
SIMILAR = MKAConfig(num_merges=3, variant="paper", similarity="block_influence")
BOTTLENECKS = AdaptiveCompressConfig(layers=[0, 2], retention_final=0.5)
SAVING = {"save_strategy": "steps", "save_steps": 2, "max_steps": 8, "train_sampling_strategy": "random"}

CASES = {
    "learned": (LayerCollapseConfig(**PAPER), {}, {}),
    "learned, ramp, teacher": (LayerCollapseConfig(**PAPER, ramp=0.7), {"teacher": 4}, {}),
    "scheduled": (LayerCollapseConfig(num_layers=2, gradual=True), {}, {"weight_decay": 0.1}),
    "accumulated": (LayerCollapseConfig(**PAPER), {}, {"gradient_accumulation_steps": 2, "weight_decay": 0.1}),
    "dropped first": (DropBlocksConfig(num_blocks=1), {"teacher": 4}, {}),
    "merging": (SIMILAR, {"every": 2}, {}),
    "refitting": (MKAConfig(num_merges=2), {"every": 2}, {"weight_decay": 0.1}),
    "dropping": (DropBlocksConfig(num_blocks=2), {"every": 3, "teacher": 4}, {"gradient_accumulation_steps": 2}),
    "bottlenecks": (BOTTLENECKS, {}, {"weight_decay": 0.1, "gradient_accumulation_steps": 2}),
    "bottlenecks beside": (replace(BOTTLENECKS, mode="observe"), {"teacher": 4}, {}),
    "dictionaries": (replace(BOTTLENECKS, variant="batchtopk", expansion=2, dead_steps=2), {}, {}),
    "collapsing": (LayerCollapseConfig(num_layers=2), {"every": 3}, {"weight_decay": 0.1}),
}

QUICK = ("learned", "scheduled", "merging", "bottlenecks")


class StopAt(TrainerCallback):
    """Ends a run in the hard way: at the end of a step, by an error."""

    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise InterruptedError


def made(case, folder, *others):
    """A fresh Trainer, of a fresh model from the same seed."""
    config, given, settings = CASES[case]
    given = dict(given)
    teacher = tiny_llama(given.pop("teacher")) if "teacher" in given else None
    callback = CompressionCallback(config, CALIBRATION, teacher=teacher, **given)
    args = arguments(folder, **SAVING | settings)
    return Trainer(dropping_llama(4), args, train_dataset=ROWS, callbacks=[callback, *others])


def interrupted(case, folder, step):
    with pytest.raises(InterruptedError):
        made(case, folder, StopAt(step)).train()


def agree(first, second):
    assert same(state_of(first.model), state_of(second.model))
    assert figures(first) == figures(second)
    assert len(figures(first)) == 8
    reports = [trainer.model.compression_report for trainer in (first, second)]
    assert reports[0].edits == reports[1].edits
    assert reports[0].after == reports[1].after


@pytest.mark.parametrize("case", only_quick(CASES, *QUICK))
def test_as_if_there_had_been_no_stop(case, tmp_path):
    whole = made(case, tmp_path / "whole")
    whole.train()
    interrupted(case, tmp_path / "stopped", 5)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "stopped" / "checkpoint-4")
    assert loss_on(saved, ROWS) > 0
    resumed = made(case, tmp_path / "stopped")
    resumed.train(resume_from_checkpoint=True)
    agree(whole, resumed)


@pytest.mark.parametrize("case", ["learned", "merging"])
def test_from_a_folder_that_was_moved(case, tmp_path):
    whole = made(case, tmp_path / "whole")
    whole.train()
    shutil.move(tmp_path / "whole" / "checkpoint-4", tmp_path / "elsewhere")
    resumed = made(case, tmp_path / "new")
    resumed.train(resume_from_checkpoint=str(tmp_path / "elsewhere"))
    agree(whole, resumed)


@pytest.mark.parametrize("case", only_quick(["learned", "dropping", "merging", "collapsing"], "learned"))
def test_by_the_same_trainer(case, tmp_path):
    """As in a notebook, also where blocks have gone meanwhile: its optimizer gets those of the checkpoint."""
    whole = made(case, tmp_path / "whole")
    whole.train()
    stop = StopAt(5)
    trainer = made(case, tmp_path / "stopped", stop)
    with pytest.raises(InterruptedError):
        trainer.train()
    stop.step = None
    trainer.train(resume_from_checkpoint=True)
    agree(whole, trainer)


def test_checkpoints_without_what_is_needed(tmp_path):
    made("learned", tmp_path).train()
    (tmp_path / "checkpoint-8" / STATE_FILE).unlink()
    with pytest.raises(ValueError, match=f"checkpoint-8 has no {STATE_FILE}"):
        made("learned", tmp_path).train(resume_from_checkpoint=True)
    shutil.copy(tmp_path / "checkpoint-2" / STATE_FILE, tmp_path / "checkpoint-4" / STATE_FILE)
    with pytest.raises(ValueError, match="is of step 2, the checkpoint of step 4"):
        made("learned", tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))


@pytest.mark.parametrize("case", ["learned", "merging", "collapsing", "scheduled"])
def test_a_checkpoint_is_a_model(case, tmp_path):
    """It loads by itself, and is the model that the run had then."""
    seen = {}

    class Keep(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            seen[state.global_step] = state_of(kwargs["model"])

    made(case, tmp_path, Keep()).train()
    for step in (2, 4, 6):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / f"checkpoint-{step}")
        assert same(state_of(loaded), seen[step])
    assert list(tmp_path.rglob("*.partial")) == []


SCRIPT = """
import sys
from tests.training.test_resume import made
trainer = made("merging", sys.argv[1])
trainer.add_callback(type("Slow", (__import__("transformers").TrainerCallback,), {
    "on_step_end": lambda self, *a, **k: __import__("time").sleep(1.0)})())
trainer.train()
"""


@pytest.mark.slow
def test_a_killed_run_is_resumed(tmp_path):
    run = subprocess.Popen([sys.executable, "-c", SCRIPT, str(tmp_path / "killed")])
    for _ in range(1200):
        if (tmp_path / "killed" / "checkpoint-4" / STATE_FILE).exists() or run.poll() is not None:
            break
        time.sleep(0.1)
    run.send_signal(signal.SIGKILL)
    assert run.wait() == -signal.SIGKILL
    assert not (tmp_path / "killed" / "checkpoint-8").exists()
    whole = made("merging", tmp_path / "whole")
    whole.train()
    resumed = made("merging", tmp_path / "killed")
    resumed.train(resume_from_checkpoint=True)
    agree(whole, resumed)
