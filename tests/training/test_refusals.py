"""What a CompressionCallback refuses: when, with which words, and that the model is as it was."""

import copy
import logging
from contextlib import contextmanager

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Trainer

from hf_compress import (
    AdaptiveCompressConfig,
    CompressionCallback,
    DropBlocksConfig,
    LayerCollapseConfig,
    MKAConfig,
    UnsupportedModelError,
)
from tests.helpers.language import tiny_llama
from tests.helpers.models import leftovers
from tests.helpers.runs import CALIBRATION, PAPER, Snapshot, arguments, ids_of, loss_on, same, state_of, token_rows
from tests.helpers.tiny import tiny_model

ROWS = token_rows()
LEARNED = LayerCollapseConfig(**PAPER)
MERGE = MKAConfig(num_merges=1, variant="paper", similarity="block_influence")
DROP = DropBlocksConfig(num_blocks=2, criterion="last")


def own_loss(outputs, labels, num_items_in_batch=None):
    return outputs.logits.square().mean()


@contextmanager
def refusing(model, error, message):
    before = Snapshot(model)
    with pytest.raises(error, match=message):
        yield
    assert before.matches(model)


def trainer_of(model, callback, folder, **settings):
    more = {name: settings.pop(name) for name in ("compute_loss_func",) if name in settings}
    return Trainer(model, arguments(folder, **settings), train_dataset=ROWS, callbacks=[callback], **more)


BEST = {"load_best_model_at_end": True, "eval_strategy": "steps", "save_strategy": "steps"}
BEST |= {"eval_steps": 2, "save_steps": 2}
NOT_WITH_TERMS = {
    "label smoothing": ({"label_smoothing_factor": 0.1}, "label_smoothing_factor"),
    "loss function": ({"compute_loss_func": own_loss}, "compute_loss_func"),
}


@pytest.mark.parametrize("kind", NOT_WITH_TERMS)
def test_losses_that_leave_no_room(kind, tmp_path):
    settings, message = NOT_WITH_TERMS[kind]
    for callback in (CompressionCallback(LEARNED, CALIBRATION), CompressionCallback(DROP, teacher=tiny_llama(3))):
        trainer = trainer_of(tiny_llama(3), callback, tmp_path, **settings)
        with refusing(trainer.model, ValueError, message):
            trainer.train()


@pytest.mark.parametrize("kind", NOT_WITH_TERMS)
def test_they_are_fine_where_nothing_is_added(kind, tmp_path):
    model = tiny_llama(3)
    trainer_of(model, CompressionCallback(MERGE, ids_of(ROWS)), tmp_path, **NOT_WITH_TERMS[kind][0]).train()
    assert len(model.model.layers) == 2


@pytest.mark.parametrize(
    ("teacher", "error", "message"),
    [
        (lambda model: LlamaForCausalLM(LlamaConfig(**model.config.to_dict() | {"vocab_size": 70})), ValueError, "70"),
        (lambda model: torch.nn.Linear(2, 2), TypeError, "PreTrainedModel; got Linear"),
        (lambda model: model, ValueError, "very model that is trained"),
    ],
)
def test_teachers_that_cannot_be_compared(teacher, error, message, tmp_path):
    model = tiny_llama(3)
    with refusing(model, error, message):
        trainer_of(model, CompressionCallback(DROP, teacher=teacher(model)), tmp_path).train()


def test_one_callback_serves_one_run(tmp_path):
    callback = CompressionCallback(DROP)
    _, other = (trainer_of(tiny_llama(4), callback, tmp_path, max_steps=1) for _ in range(2))
    with refusing(other.model, ValueError, "has served a Trainer already"):
        other.train()


def test_one_trainer_trains_once(tmp_path):
    trainer = trainer_of(tiny_llama(4), CompressionCallback(DROP), tmp_path, max_steps=1)
    trainer.train()
    with refusing(trainer.model, ValueError, "has served a run already"):
        trainer.train()


def test_the_model_has_to_be_there_from_the_beginning(tmp_path):
    args = arguments(tmp_path)
    callback = CompressionCallback(DROP)
    trainer = Trainer(args=args, train_dataset=ROWS, callbacks=[callback], model_init=lambda: tiny_llama())
    with pytest.raises(ValueError, match="model_init"):
        trainer.train()
    trainer = Trainer(tiny_llama(4), args, train_dataset=ROWS)
    trainer.add_callback(CompressionCallback(DROP))
    with refusing(trainer.model, ValueError, "not to add_callback"):
        trainer.train()


@pytest.mark.parametrize(
    ("config", "every", "settings", "message"),
    [
        (DROP, 3, {"max_steps": 5}, "2 changes, one every 3 steps, do not fit into 5 steps"),
        (DROP, 1, BEST, "load_best_model_at_end"),
        (LEARNED, 1, {}, r"can(not)? be cut into steps"),
    ],
)
def test_changes_that_do_not_fit(config, every, settings, message, tmp_path):
    model = tiny_llama(4)
    callback = CompressionCallback(config, CALIBRATION, every=every)
    with refusing(model, ValueError, message):
        Trainer(model, arguments(tmp_path, **settings), None, ROWS, ROWS, callbacks=[callback]).train()


class Deaf(Trainer):
    """Has a loss of its own, and ignores the model's."""

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        return model(**inputs).logits.float().square().mean()


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("kind", ["penalty", "teacher"])
def test_a_loss_that_ignores_the_models_own(kind, accumulation, tmp_path):
    model, teacher = tiny_llama(3), tiny_llama(3) if kind == "teacher" else None
    callback = CompressionCallback(DROP if teacher else LEARNED, CALIBRATION, teacher=teacher)
    args = arguments(tmp_path, gradient_accumulation_steps=accumulation)
    trainer = Deaf(model, args, train_dataset=ROWS, callbacks=[callback])
    before = state_of(model)
    with pytest.raises(ValueError, match="does not train on the loss that the model gives"):
        trainer.train()
    assert same(before, state_of(model))
    assert leftovers(model) == []


class Rescaling(Trainer):
    """Trains on the model's own loss and something more."""

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        outputs = model(**inputs)
        return 0.5 * outputs.loss + outputs.logits.square().mean()


def test_a_loss_that_holds_the_models_own(tmp_path):
    callback = CompressionCallback(LEARNED, CALIBRATION)
    Rescaling(tiny_llama(3), arguments(tmp_path), train_dataset=ROWS, callbacks=[callback]).train()


def test_frozen_ffns_cannot_learn(tmp_path):
    model = tiny_llama(3)
    model.model.layers[1].mlp.down_proj.weight.requires_grad_(False)
    with refusing(model, ValueError, r"layers\.1\.mlp\.down_proj is frozen"):
        trainer_of(model, CompressionCallback(LEARNED, CALIBRATION), tmp_path).train()


@pytest.mark.parametrize("config", [DROP, MERGE, LayerCollapseConfig(num_layers=1)], ids=lambda config: config.method)
@pytest.mark.parametrize("every", [None, 1])
def test_a_frozen_model_has_nothing_to_train(config, every, tmp_path):
    model = tiny_llama(4).requires_grad_(False)
    before = state_of(model)
    with refusing(model, ValueError, r"no parameter of LlamaForCausalLM requires a gradient.*requires_grad_"):
        trainer_of(model, CompressionCallback(config, CALIBRATION, every=every), tmp_path)
    bottlenecks = CompressionCallback(AdaptiveCompressConfig(variant="paper"), CALIBRATION)  # which are trained then
    trainer_of(model, bottlenecks, tmp_path).train()
    after = state_of(model)
    sealed = {name for name, value in after.items() if not value.numel()}
    assert all(torch.equal(after[name], value) for name, value in before.items() if name not in sealed)


def test_nothing_that_can_collapse(tmp_path):
    small = LlamaConfig(hidden_size=32, intermediate_size=8, num_hidden_layers=2, num_attention_heads=4, vocab_size=64)
    for model, message in (
        (tiny_model("mixtral"), "has experts"),
        (LlamaForCausalLM(small).eval(), "768 parameters, and the map would have 1,056"),
    ):
        with refusing(model, UnsupportedModelError, message):
            trainer_of(model, CompressionCallback(LEARNED, CALIBRATION), tmp_path).train()


def test_calibration_that_is_missing(tmp_path):
    model = tiny_llama(4)
    with refusing(model, ValueError, "calibration"):
        trainer_of(model, CompressionCallback(LayerCollapseConfig(num_layers=1)), tmp_path).train()


@pytest.mark.parametrize("settings", [{"every": 0}, {"every": 1.5}, {"teacher_share": 0}, {"teacher_share": 1.0}])
def test_settings_that_make_no_sense(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        CompressionCallback(DROP, **settings)
    with pytest.raises(TypeError, match="method's settings"):
        CompressionCallback({"method": "mka"})


def test_a_tolerance_that_is_never_reached(tmp_path, caplog):
    model = tiny_llama(3)
    with caplog.at_level(logging.WARNING):
        trainer = trainer_of(model, CompressionCallback(LEARNED, CALIBRATION), tmp_path / "run")
        trainer.train()
    (warning,) = [record.getMessage() for record in caplog.records if "tolerance" in record.getMessage()]
    alphas = [layer.mlp.act_fn.alpha.item() for layer in model.model.layers]
    assert all(f"block {index} α = {alpha:.3f}" in warning for index, alpha in enumerate(alphas))
    assert model.compression_report.notes["not_collapsed"] == warning
    trainer.save_model(tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert same(state_of(loaded), state_of(model))
    assert loss_on(loaded, ROWS) == loss_on(copy.deepcopy(model), ROWS)
