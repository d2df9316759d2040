"""CompressionCallback: nothing of it is left on a model however a run ends, and evaluation never sees it."""

import copy
import math

import pytest
import torch
from transformers import Trainer, TrainerCallback

from hf_compress import (
    AdaptiveCompressConfig,
    CompressionCallback,
    DataOptions,
    LayerCollapseConfig,
)
from hf_compress.calibration.capture import hooked
from tests.helpers.language import tiny_llama
from tests.helpers.models import leftovers
from tests.helpers.runs import CALIBRATION, PAPER, arguments, figures, ids_of, loss_on, same, state_of, token_rows

ROWS = token_rows(ignored=True)


def with_terms():
    """A callback that adds a penalty and a teacher's term."""
    return CompressionCallback(LayerCollapseConfig(**PAPER, alpha_init=0.5), CALIBRATION, teacher=tiny_llama(3))


class Raising(TrainerCallback):
    """Raises an error at an event of the second step."""

    def __init__(self, event, error):
        def fail(args, state, control, **kwargs):
            if state.global_step >= 1:
                raise error

        setattr(self, event, fail)


def failing_forward(model, error):
    """An error in the middle of the second step's forward pass."""
    passes = []

    def hook(module, args):
        passes.append(module.training)
        if len(passes) == 2:
            raise error

    return model.model.layers[1].register_forward_pre_hook(hook)


class Rows(torch.utils.data.Dataset):
    """Rows that end in an error."""

    def __len__(self):
        return len(ROWS)

    def __getitem__(self, index):
        if index == 5:
            raise OSError("the disk is gone")
        return ROWS[index]


def trainer_of(model, callback, folder, *others, rows=ROWS, **settings):
    return Trainer(model, arguments(folder, **settings), train_dataset=rows, callbacks=[callback, *others])


def untouched(model):
    """No hook is on the model, and its loss is its own: that of a copy which never met a callback."""
    assert leftovers(model) == []
    fresh = type(model).from_pretrained(None, config=model.config, state_dict=state_of(model))
    assert loss_on(model, ROWS) == loss_on(fresh, ROWS)
    batch = {name: torch.stack([row[name] for row in ROWS]) for name in ROWS[0]}
    assert torch.equal(model.train()(**batch).loss, fresh.train()(**batch).loss)
    return True


@pytest.mark.parametrize("accumulation", [1, 2])
def test_nothing_is_left_when_training_ends(accumulation, tmp_path):
    model = tiny_llama(3)
    trainer_of(model, with_terms(), tmp_path, gradient_accumulation_steps=accumulation).train()
    assert untouched(model)


ERRORS = pytest.mark.parametrize("error", [RuntimeError("no"), KeyboardInterrupt()], ids=["error", "ctrl-c"])


@pytest.mark.parametrize("accumulation", [1, 2])
@ERRORS
def test_nothing_is_left_after_a_forward_that_fails(error, accumulation, tmp_path):
    model = tiny_llama(3)
    trainer = trainer_of(model, with_terms(), tmp_path, gradient_accumulation_steps=accumulation)
    with hooked([failing_forward(model, error)]), pytest.raises(type(error)):
        trainer.train()
    assert untouched(model)


@ERRORS
@pytest.mark.parametrize("event", ["on_step_end", "on_pre_optimizer_step", "on_log", "on_save"])
def test_nothing_is_left_after_an_error_elsewhere(event, error, tmp_path):
    model = tiny_llama(3)
    settings = {"gradient_accumulation_steps": 2, "save_strategy": "steps", "save_steps": 2}
    with pytest.raises(type(error)):
        trainer_of(model, with_terms(), tmp_path, Raising(event, error), **settings).train()
    assert untouched(model)


@pytest.mark.parametrize("place", ["the optimizer", "the data"])
def test_nothing_is_left_after_an_error_outside_of_the_model(place, tmp_path):
    model = tiny_llama(3)
    trainer = trainer_of(model, with_terms(), tmp_path, rows=Rows() if place == "the data" else ROWS)
    if place == "the optimizer":
        trainer.create_optimizer()
        trainer.optimizer.step = lambda *_, **__: (_ for _ in ()).throw(OSError("the disk is gone"))
    with pytest.raises(OSError, match="the disk is gone"):
        trainer.train()
    assert untouched(model)


def test_a_new_run_follows_one_that_was_interrupted(tmp_path):
    """α goes on from where it stood, and learns as it would have without the first run's hooks."""
    model = tiny_llama(3)
    with pytest.raises(KeyboardInterrupt):
        trainer_of(model, with_terms(), tmp_path, Raising("on_step_end", KeyboardInterrupt())).train()
    alphas = {name: value for name, value in state_of(model).items() if "alpha" in name}
    assert all(value.item() > 0.51 for value in alphas.values())
    clean = type(model).from_pretrained(None, config=model.config, state_dict=state_of(model))
    for one in (model, clean):
        callback = CompressionCallback(LayerCollapseConfig(**PAPER, lc=3.0), CALIBRATION, teacher=tiny_llama(3))
        trainer_of(one, callback, tmp_path).train()
    assert same(state_of(model), state_of(clean))
    assert state_of(model)["model.layers.0.mlp.act_fn.alpha"] > alphas["model.layers.0.mlp.act_fn.alpha"] + 0.03


def test_evaluation_sees_the_models_own_loss(tmp_path):
    model = tiny_llama(3)
    seen = []

    class Compare(TrainerCallback):
        def on_evaluate(self, args, state, control, metrics, **kwargs):
            fresh = copy.deepcopy(kwargs["model"])
            seen.append((metrics["eval_loss"], loss_on(fresh, ROWS[:4])))

    settings = {"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 4}
    args = arguments(tmp_path, gradient_accumulation_steps=2, **settings)
    Trainer(model, args, train_dataset=ROWS, eval_dataset=ROWS[:4], callbacks=[with_terms(), Compare()]).train()
    assert len(seen) == 4
    assert all(math.isclose(found, own, rel_tol=1e-6) for found, own in seen)


def test_the_training_loss_has_the_terms(tmp_path):
    """At the first step: half the model's own, half the teacher's divergence (0, as it is the model), the penalty."""
    model, same_model = tiny_llama(3), tiny_llama(3)
    own = loss_on(tiny_llama(3), token_rows()[:2])
    config = LayerCollapseConfig(variant="paper", alpha_init=0.0, lc=0.25)
    callback = CompressionCallback(config, CALIBRATION, teacher=same_model, teacher_share=0.25)
    trainer = trainer_of(model, callback, tmp_path, rows=token_rows(), max_steps=1)
    trainer.train()
    assert figures(trainer)[0]["loss"] == pytest.approx(0.75 * own + 0.25 * 3, rel=1e-5)
    assert figures(trainer)[0]["compression/penalty"] == pytest.approx(0.25 * 3)


def test_a_scheduled_share_is_the_schedules(tmp_path):
    """The optimizer, its weight decay and momentum leave it alone."""
    model = tiny_llama(4)
    config = LayerCollapseConfig(num_layers=2, gradual=True, ramp=0.5)
    callback = CompressionCallback(config, ids_of(token_rows(64)))
    trainer = trainer_of(model, callback, tmp_path, max_steps=8, weight_decay=0.3)
    trainer.train()
    for index in callback.schedule.modules:
        found = [entry[f"compression/alpha_{index}"] for entry in figures(trainer)]
        assert found == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0, 1.0]
    assert [step["alpha"] for step in model.compression_report.notes["collapsed"]] == [1.0, 1.0]


class Reporter(TrainerCallback):
    """Sends off what it is given."""

    def __init__(self):
        self.sent = []

    def on_log(self, args, state, control, logs, **kwargs):
        self.sent.append(dict(logs))


@pytest.mark.parametrize("place", ["first", "last"])
def test_every_reporter_gets_the_figures(place, tmp_path):
    reporter = Reporter()
    model = tiny_llama(3)
    config = LayerCollapseConfig(**PAPER, lc=40.0, alpha_lr=0.5)
    trainer = trainer_of(model, CompressionCallback(config, CALIBRATION), tmp_path)
    trainer.callback_handler.callbacks.insert(0 if place == "first" else 99, reporter)
    trainer.train()
    steps = [entry for entry in reporter.sent if "loss" in entry]
    assert [entry | {"step": number + 1} for number, entry in enumerate(steps)] == figures(trainer)
    assert reporter.sent[-1] | {"step": 4} == trainer.state.log_history[-1]
    assert len(steps) == 4
    assert all({f"compression/{n}" for n in ("alpha_0", "alpha_1", "alpha_2", "penalty")} <= set(e) for e in steps)
    assert reporter.sent[-1]["compression/parameters"] == sum(p.numel() for p in model.parameters())
    report = model.compression_report
    assert reporter.sent[-1]["compression/parameters_share"] == report.after.parameters / report.before.parameters


def test_r2_is_logged_in_closed_form(tmp_path):
    model = tiny_llama(4)
    callback = CompressionCallback(LayerCollapseConfig(num_layers=2), ids_of(token_rows(64)))
    trainer = trainer_of(model, callback, tmp_path)
    trainer.train()
    notes = model.compression_report.notes["collapsed"]
    expected = {f"compression/r2_{step['block']}": step["r2"][str(step["block"])] for step in notes}
    assert len(expected) == 2
    assert all(expected.items() <= entry.items() for entry in figures(trainer))


def test_tensorboard_gets_the_figures(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    args = arguments(tmp_path, report_to=["tensorboard"])
    Trainer(tiny_llama(3), args, train_dataset=ROWS, callbacks=[with_terms()]).train()
    (events,) = tmp_path.rglob("events.out*")
    tags = EventAccumulator(str(events)).Reload().Tags()["scalars"]
    assert any("penalty" in tag for tag in tags)


@pytest.mark.parametrize(
    "config",
    [
        LayerCollapseConfig(num_layers=1, **PAPER),
        AdaptiveCompressConfig(layers=[1], retention_final=0.5),
        AdaptiveCompressConfig(layers=[1], variant="batchtopk", expansion=2),
    ],
    ids=["collapsed", "bottleneck", "dictionary"],
)
def test_the_default_dtype_does_not_matter(config, tmp_path):
    models = [tiny_llama(4), tiny_llama(4)]
    for model, dtype in zip(models, (torch.float32, torch.bfloat16), strict=True):
        torch.set_default_dtype(dtype)
        try:
            callback = CompressionCallback(config, CALIBRATION, options=DataOptions(batch_size=8))
            settings = arguments(tmp_path, max_steps=8)
            Trainer(model, settings, train_dataset=token_rows(16), callbacks=[callback]).train()
        finally:
            torch.set_default_dtype(torch.float32)
    assert same(*map(state_of, models))
