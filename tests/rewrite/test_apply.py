"""Carrying a plan out: all of it, or nothing."""

import pytest
import torch

import hf_compress.rewrite.apply as apply_module
from hf_compress.anatomy.anatomy import Anatomy
from hf_compress.calibration.data import Batch
from hf_compress.errors import ParityError, UnsupportedModelError
from hf_compress.plan.edits import MergeBlocks, RemoveBlocks
from hf_compress.plan.plan import Plan
from hf_compress.rewrite.apply import apply
from hf_compress.rewrite.probe import Probe
from tests.helpers.changes import Trace, check_reloads
from tests.helpers.models import refusing
from tests.helpers.tiny import tiny_inputs, tiny_model, tiny_seq2seq_model, tiny_vision_language_model

LAYERS = "model.layers"
NAME = f"{LAYERS}.0.mlp.up_proj.weight"


@pytest.fixture
def model():
    return tiny_model("llama")


def probe_of(model) -> Probe:
    return Probe.of(model, Batch(tiny_inputs(model), None))


def test_blocks_are_removed_and_tensors_written(model):
    last = model.model.layers[3]
    new = torch.full_like(model.get_parameter(NAME), 0.25)
    apply(Plan((RemoveBlocks(LAYERS, (1, 2)),), {NAME: new}), model)
    assert len(model.model.layers) == 2
    assert model.model.layers[1] is last
    assert torch.equal(model.get_parameter(NAME), new)
    check_reloads(model, tiny_inputs(model), generates=True)


def test_names_and_indices_are_those_before_the_plan(model):
    name = f"{LAYERS}.3.mlp.up_proj.weight"
    new = torch.full_like(model.get_parameter(name), 0.5)
    apply(Plan((RemoveBlocks(LAYERS, (0,)), RemoveBlocks(LAYERS, (2,))), {name: new}), model)
    assert torch.equal(model.get_parameter(f"{LAYERS}.1.mlp.up_proj.weight"), new)


def test_the_mode_of_the_model_stays(model):
    model.train()
    model.model.layers[0].eval()
    apply(Plan((RemoveBlocks(LAYERS, (1,)),)), model)
    assert model.training
    assert not model.model.layers[0].training


def test_an_empty_plan_changes_nothing(model):
    before = Trace.of(model)
    apply(Plan(), model)
    assert before.difference(model) is None


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (Plan((RemoveBlocks("model.blocks", (0,)),)), "no residual stack 'model.blocks'"),
        (Plan(tensors={"model.nothing": torch.zeros(1)}), r"does not have: \['model.nothing'\]"),
        (Plan((MergeBlocks(LAYERS, 0, (1,)),), {NAME: torch.zeros(1)}), "does not fit a parameter"),
    ],
)
def test_a_plan_for_another_model_is_refused_and_nothing_changed(model, plan, message):
    with refusing(model, ValueError, message):
        apply(plan, model)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, ParityError])
def test_the_model_is_as_it_was_after_any_error_in_the_check(model, monkeypatch, error):
    def fail(model, probe):
        assert len(model.model.layers) == 3, "the change has been made when the check runs"
        raise error("in the check")

    monkeypatch.setattr(apply_module, "check_parity", fail)
    with refusing(model, error):
        apply(Plan((RemoveBlocks(LAYERS, (0,)),), {NAME: torch.zeros(96, 64)}), model)


@pytest.mark.parametrize(
    ("model_type", "removed"),
    [("diffllama", (0,)), ("jamba", (1,)), ("minicpm3", (1,)), ("gemma4_text", (1,)), ("modernbert-decoder", (0,))],
)
def test_what_the_config_cannot_say_is_refused_and_nothing_changed(model_type, removed):
    model = tiny_model(model_type)
    probe = probe_of(model)
    with refusing(model, ParityError):
        apply(Plan((RemoveBlocks(LAYERS, removed),)), model, probe)


def test_two_stacks_of_one_model_in_one_plan():
    model = tiny_vision_language_model("llava")
    vision, text = (stack.path for stack in Anatomy(model).stacks)
    apply(Plan((RemoveBlocks(vision, (0,)), RemoveBlocks(text, (1, 2)))), model, probe_of(model))
    assert [len(stack) for stack in Anatomy(model).stacks] == [3, 2]
    assert model.config.vision_config.num_hidden_layers == 3
    assert model.config.text_config.num_hidden_layers == 2


def test_an_encoder_that_must_not_be_shorter_than_the_decoder_is_shortened_with_it():
    model = tiny_seq2seq_model("t5")
    probe, encoder, decoder = probe_of(model), RemoveBlocks("encoder.block", (2,)), RemoveBlocks("decoder.block", (1,))
    with pytest.raises(UnsupportedModelError, match="num_layers=3, num_decoder_layers=4"):
        apply(Plan((encoder,)), model, probe)
    apply(Plan((encoder, decoder)), model, probe)
    assert (model.config.num_layers, model.config.num_decoder_layers) == (3, 3)


def test_the_trace_that_these_tests_rely_on_sees_what_changes(model):
    for change in (
        lambda: model.model.layers[1].self_attn.__setattr__("layer_idx", 7),
        lambda: model.config.__setattr__("num_hidden_layers", 3),
        lambda: model.get_parameter(NAME).data[0, 0].add_(1),
        lambda: model.model.layers._modules.popitem(),
    ):
        before = Trace.of(model)
        change()
        assert before.difference(model) is not None
