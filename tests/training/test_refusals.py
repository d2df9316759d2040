"""What a CompressionCallback refuses: when, with which words, and that the model is as it was."""

import copy
import logging

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


def trainer_of(model, callback, folder, **settings):
    more = {name: settings.pop(name) for name in ("compute_loss_func",) if name in settings}
    return Trainer(model, arguments(folder, **settings), train_dataset=ROWS, callbacks=[callback], **more)


NOT_WITH_TERMS = {
    "label smoothing": ({"label_smoothing_factor": 0.1}, "label_smoothing_factor"),
    "loss function": ({"compute_loss_func": own_loss}, "compute_loss_func"),
}


@pytest.mark.parametrize("kind", NOT_WITH_TERMS)
def test_losses_that_leave_no_room(kind, tmp_path):
    settings, message = NOT_WITH_TERMS[kind]
    for callback in (CompressionCallback(LEARNED, CALIBRATION), CompressionCallback(DROP, teacher=tiny_llama(3))):
        model = tiny_llama(3)
        before = Snapshot(model)
        trainer = trainer_of(model, callback, tmp_path, **settings)
        with pytest.raises(ValueError, match=message):
            trainer.train()
        assert before.matches(model)


@pytest.mark.parametrize("kind", NOT_WITH_TERMS)
def test_they_are_fine_where_nothing_is_added(kind, tmp_path):
    model = tiny_llama(3)
    trainer_of(model, CompressionCallback(MERGE, ids_of(ROWS)), tmp_path, **NOT_WITH_TERMS[kind][0]).train()
    assert len(model.model.layers) == 2


@pytest.mark.parametrize(
    ("teacher", "error", "message"),
    [
        (
            lambda: LlamaForCausalLM(LlamaConfig(**tiny_llama(2).config.to_dict() | {"vocab_size": 70})),
            ValueError,
            "70",
        ),
        (lambda: torch.nn.Linear(2, 2), TypeError, "PreTrainedModel; got Linear"),
    ],
)
def test_teachers_that_cannot_be_compared(teacher, error, message, tmp_path):
    model = tiny_llama(3)
    before = Snapshot(model)
    with pytest.raises(error, match=message):
        trainer_of(model, CompressionCallback(DROP, teacher=teacher()), tmp_path).train()
    assert before.matches(model)
    with pytest.raises(ValueError, match="very model that is trained"):
        trainer_of(model, CompressionCallback(DROP, teacher=model), tmp_path).train()


def test_one_callback_serves_one_run(tmp_path):
    callback, second = CompressionCallback(DROP), tiny_llama(4)
    before = Snapshot(second)
    trainer_of(tiny_llama(4), callback, tmp_path, max_steps=1)
    other = trainer_of(second, callback, tmp_path, max_steps=1)
    with pytest.raises(ValueError, match="has served a Trainer already"):
        other.train()
    assert before.matches(second)


def test_one_trainer_trains_once(tmp_path):
    model = tiny_llama(4)
    trainer = trainer_of(model, CompressionCallback(DROP), tmp_path, max_steps=1)
    trainer.train()
    before = state_of(model)
    with pytest.raises(ValueError, match="has served a run already"):
        trainer.train()
    assert same(before, state_of(model))


def test_the_model_has_to_be_there_from_the_beginning(tmp_path):
    args = arguments(tmp_path)
    trainer = Trainer(
        args=args, train_dataset=ROWS, callbacks=[CompressionCallback(DROP)], model_init=lambda: tiny_llama()
    )
    with pytest.raises(ValueError, match="model_init"):
        trainer.train()
    model = tiny_llama(4)
    before = Snapshot(model)
    trainer = Trainer(model, args, train_dataset=ROWS)
    trainer.add_callback(CompressionCallback(DROP))
    with pytest.raises(ValueError, match="not to add_callback"):
        trainer.train()
    assert before.matches(model)


def test_changes_that_do_not_fit(tmp_path):
    model = tiny_llama(4)
    before = Snapshot(model)
    trainer = trainer_of(model, CompressionCallback(DROP, every=3), tmp_path, max_steps=5)
    with pytest.raises(ValueError, match="2 changes, one every 3 steps, do not fit into 5 steps"):
        trainer.train()
    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "save_strategy": "steps"}
    args = arguments(tmp_path, **best, eval_steps=2, save_steps=2)
    callback = CompressionCallback(DROP, every=1)
    trainer = Trainer(model, args, train_dataset=ROWS, eval_dataset=ROWS, callbacks=[callback])
    with pytest.raises(ValueError, match="load_best_model_at_end"):
        trainer.train()
    with pytest.raises(ValueError, match=r"can(not)? be cut into steps"):
        trainer_of(model, CompressionCallback(LEARNED, CALIBRATION, every=1), tmp_path).train()
    assert before.matches(model)


class Deaf(Trainer):
    """Has a loss of its own, and ignores the model's."""

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        return model(**inputs).logits.float().square().mean()


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("kind", ["penalty", "teacher"])
def test_a_loss_that_ignores_the_models_own(kind, accumulation, tmp_path):
    callback = (
        CompressionCallback(LEARNED, CALIBRATION)
        if kind == "penalty"
        else CompressionCallback(DROP, teacher=tiny_llama(3))
    )
    model = tiny_llama(3)
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
    model = tiny_llama(3)
    Rescaling(
        model, arguments(tmp_path), train_dataset=ROWS, callbacks=[CompressionCallback(LEARNED, CALIBRATION)]
    ).train()


def test_frozen_ffns_cannot_learn(tmp_path):
    model = tiny_llama(3)
    model.model.layers[1].mlp.down_proj.weight.requires_grad_(False)
    before = Snapshot(model)
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.down_proj is frozen"):
        trainer_of(model, CompressionCallback(LEARNED, CALIBRATION), tmp_path).train()
    assert before.matches(model)


@pytest.mark.parametrize("config", [DROP, MERGE, LayerCollapseConfig(num_layers=1)], ids=lambda config: config.method)
@pytest.mark.parametrize("every", [None, 1])
def test_a_frozen_model_has_nothing_to_train(config, every, tmp_path):
    model = tiny_llama(4).requires_grad_(False)
    before = Snapshot(model)
    with pytest.raises(ValueError, match=r"no parameter of LlamaForCausalLM requires a gradient.*requires_grad_"):
        trainer_of(model, CompressionCallback(config, CALIBRATION, every=every), tmp_path)
    assert before.matches(model)
    bottlenecks = CompressionCallback(AdaptiveCompressConfig(variant="paper"), CALIBRATION)  # which are trained then
    trainer_of(model, bottlenecks, tmp_path).train()
    after = state_of(model)
    sealed = {name for name, value in after.items() if not value.numel()}
    assert all(torch.equal(after[name], value) for name, value in before.weights.items() if name not in sealed)


def test_nothing_that_can_collapse(tmp_path):
    small = LlamaConfig(hidden_size=32, intermediate_size=8, num_hidden_layers=2, num_attention_heads=4, vocab_size=64)
    for model, message in (
        (tiny_model("mixtral"), "has experts"),
        (LlamaForCausalLM(small).eval(), "768 parameters, and the map would have 1,056"),
    ):
        before = Snapshot(model)
        with pytest.raises(UnsupportedModelError, match=message):
            trainer_of(model, CompressionCallback(LEARNED, CALIBRATION), tmp_path).train()
        assert before.matches(model)


def test_calibration_that_is_missing(tmp_path):
    model = tiny_llama(4)
    before = Snapshot(model)
    with pytest.raises(ValueError, match="calibration"):
        trainer_of(model, CompressionCallback(LayerCollapseConfig(num_layers=1)), tmp_path).train()
    assert before.matches(model)


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
