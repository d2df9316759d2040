"""Edits of modules on live models: what they make."""

import copy

import pytest
import torch

from hf_compress.anatomy.anatomy import Anatomy
from hf_compress.anatomy.undo import Undo
from hf_compress.modules.activation import BlendedActivation
from hf_compress.modules.bottleneck import BOTTLENECK, Form
from hf_compress.modules.packed import MixedPrecisionLinear
from hf_compress.modules.sealed import Sealed
from hf_compress.plan.edits import RemoveBlocks
from hf_compress.plan.plan import Plan
from hf_compress.rewrite.apply import apply, carry_out
from hf_compress.rewrite.builders import insert_bottleneck, narrow_ffn, replace_activation
from hf_compress.rewrite.edits.ffn import NarrowFFN
from hf_compress.rewrite.edits.sealed import Seal
from hf_compress.rewrite.record import recorded
from tests.helpers.changes import forward
from tests.helpers.plans import (
    BLOCK,
    DOWN,
    GATED,
    HIDDEN,
    MLP,
    PLANS,
    UNITS,
    Before,
    bottleneck_plan,
    linear_bottleneck,
    linear_plan,
    model_for,
    pack_plan,
)
from tests.helpers.tiny import tiny_inputs, tiny_model


@pytest.fixture
def model():
    return tiny_model("llama")


def seal_plan(model):
    path = f"{BLOCK}.input_layernorm"
    norm = model.get_submodule(path)
    return Plan((Seal(path),), {f"{path}.weight": torch.zeros(0), f"{path}.inner.weight": norm.weight})


# --- what an edit makes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PLANS)
def test_a_draft_only_looks(name):
    model = model_for(name)
    before = Before.of(model)
    assert PLANS[name](model).edits
    before.check(model)


@pytest.fixture(params=PLANS)
def drafted(request):
    """A model, and a plan for it; of every kind of edit."""
    model = model_for(request.param)
    return model, PLANS[request.param](model)


def test_an_edit_has_an_effect_and_can_be_taken_back(drafted):
    model, plan = drafted
    inputs, before = tiny_inputs(model), Before.of(model)
    reference = forward(model, inputs)
    with Undo() as undo:
        carry_out(plan, model, undo)
        assert not torch.allclose(forward(model, inputs), reference, atol=1e-3)
    before.check(model)
    assert torch.equal(forward(model, inputs), reference)


@pytest.mark.parametrize("name", PLANS)
def test_only_what_the_edit_names_is_touched(name):
    model = model_for(name)
    before = {path: id(p) for path, p in model.named_parameters()}
    plan = PLANS[name](model)
    carry_out(plan, model, Undo())
    after = {path: id(p) for path, p in model.named_parameters()}
    changed = {path for path in before.keys() | after.keys() if before.get(path) != after.get(path)}
    assert changed
    assert all(path.startswith(f"{BLOCK}.") for path in changed)
    if name == "packed":
        assert changed == {f"{BLOCK}.self_attn.o_proj.weight"}
    if name == "bottleneck":
        assert changed == set(plan.tensors)


def test_training_the_model_does_not_change_the_plan(drafted):
    model, plan = drafted
    before = {path: tensor.detach().clone() for path, tensor in plan.tensors.items()}
    carry_out(plan, model, Undo())
    with torch.no_grad():
        for path in plan.tensors:
            model.state_dict()[path].add_(1)
    assert all(torch.equal(tensor, before[path]) for path, tensor in plan.tensors.items())


def test_a_plan_can_be_carried_out_on_two_copies(drafted):
    model, plan = drafted
    twin, inputs = copy.deepcopy(model), tiny_inputs(model)
    for changed in (model, twin):
        carry_out(plan, changed, Undo())
    assert torch.equal(forward(model, inputs), forward(twin, inputs))


@pytest.mark.parametrize("name", PLANS)
def test_the_dtype_of_the_model_stays(name):
    model = model_for(name).to(torch.bfloat16)
    plan = PLANS[name](model)
    plan = Plan(plan.edits, {n: t.double() if t.is_floating_point() else t for n, t in plan.tensors.items()})
    carry_out(plan, model, Undo())
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert forward(model, tiny_inputs(model)).dtype == torch.bfloat16


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_of_the_changed_modules_stays_and_nothing_is_left_on_meta(drafted, training):
    model, plan = drafted
    carry_out(plan, model.train(training), Undo())
    assert {module.training for module in model.modules()} == {training}
    assert not any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])


@pytest.mark.parametrize("name", ["narrow", "linear", "low rank", "experts"])
def test_what_was_frozen_stays_frozen(name):
    model = model_for(name)
    model.get_submodule(BLOCK).requires_grad_(False)
    carry_out(PLANS[name](model), model, Undo())
    assert not any(p.requires_grad for p in model.get_submodule(BLOCK).parameters())
    assert all(p.requires_grad for p in model.model.layers[1].parameters())


def test_the_modules_of_each_edit(model):
    carry_out(pack_plan(model, DOWN), model, Undo())
    assert type(model.get_submodule(DOWN)) is MixedPrecisionLinear
    carry_out(replace_activation(Anatomy(model).block(1), "leaky"), model, Undo())
    assert type(model.model.layers[1].mlp.act_fn) is BlendedActivation
    carry_out(seal_plan(model), model, Undo())
    assert type(model.model.layers[0].input_layernorm) is Sealed
    carry_out(linear_plan(model, 2), model, Undo())
    assert [name for name, _ in model.model.layers[2].mlp.named_parameters()] == ["down_proj.weight", "down_proj.bias"]


def test_a_seal_changes_no_output(model):
    inputs = tiny_inputs(model)
    reference = forward(model, inputs)
    carry_out(seal_plan(model), model, Undo())
    assert torch.equal(forward(model, inputs), reference)


def test_a_narrowed_ffn_says_its_width_by_itself(model):
    carry_out(PLANS["narrow"](model), model, Undo())
    mlp = model.get_submodule(MLP)
    assert (mlp.intermediate_size, mlp.hidden_size) == (32, 64)
    assert [(m.in_features, m.out_features) for m in (mlp.gate_proj, mlp.up_proj, mlp.down_proj)] == [
        *((64, 32), (64, 32), (32, 64))
    ]


@pytest.mark.parametrize(("family", "name"), [("mixtral", "intermediate_dim"), ("gpt_oss", "intermediate_size")])
def test_narrowed_experts_say_their_width_by_themselves(family, name):
    model = tiny_model(family)
    carry_out(PLANS["experts"](model), model, Undo())
    widths = [vars(block.mlp.experts)[name] for block in model.model.layers]
    assert widths == [32] + [96] * (len(widths) - 1)


def test_a_narrowed_ffn_can_get_a_bias_that_it_did_not_have(model):
    inputs, twin = tiny_inputs(model), copy.deepcopy(model)
    bias = torch.randn(HIDDEN, generator=torch.Generator().manual_seed(3))
    plan = narrow_ffn(Anatomy(model).block(0), UNITS)
    carry_out(plan, twin, Undo())
    (edit,) = plan.edits
    with_bias = NarrowFFN(edit.inputs, edit.output, edit.width, bias=True)
    carry_out(Plan((with_bias,), plan.tensors | {f"{DOWN}.bias": bias}), model, Undo())
    twin.get_submodule(DOWN).register_forward_hook(lambda module, inputs, output: output + bias)
    torch.testing.assert_close(forward(model, inputs), forward(twin, inputs))
    assert model.get_submodule(GATED[0]).bias is None


def test_the_hook_of_a_bottleneck_goes_with_its_block(model):
    plan = bottleneck_plan(model, 2) + Plan((RemoveBlocks("model.layers", (0,)),))
    apply(plan, model)
    assert [hasattr(block, BOTTLENECK) for block in model.model.layers] == [False, True, False]
    assert [len(block._forward_hooks) for block in model.model.layers] == [0, 1, 0]


# --- several edits ----------------------------------------------------------------------------------------------------


def test_two_plans_at_once_are_the_two_one_after_the_other(model):
    twin, inputs = copy.deepcopy(model), tiny_inputs(model)
    plans = [
        narrow_ffn(Anatomy(model).block(0), UNITS),
        linear_plan(model, 1, rank=4),
        bottleneck_plan(model, 1),
        replace_activation(Anatomy(model).block(2), "identity", 0.5),
        pack_plan(model, "model.layers.2.mlp.down_proj"),
    ]
    apply(sum(plans, start=Plan()), model)
    for plan in plans:
        apply(plan, twin)
    assert torch.equal(forward(model, inputs), forward(twin, inputs))
    assert model.config.to_dict() == twin.config.to_dict()
    assert list(model.state_dict()) == list(twin.state_dict())


def test_a_sum_has_the_edits_of_both_in_order(model):
    first, second = narrow_ffn(Anatomy(model).block(0), UNITS), bottleneck_plan(model, 0)
    both = Plan(first.edits, first.tensors, {"first": 1}) + Plan(second.edits, second.tensors, {"second": 2})
    assert both.edits == first.edits + second.edits
    assert both.tensors.keys() == first.tensors.keys() | second.tensors.keys()
    assert both.notes == {"first": 1, "second": 2}


def test_an_ffn_is_narrowed_twice(model):
    twin, inputs = copy.deepcopy(model), tiny_inputs(model)
    apply(narrow_ffn(Anatomy(model).block(0), range(40)), model)
    apply(narrow_ffn(Anatomy(model).block(0), range(8, 24)), model)
    apply(narrow_ffn(Anatomy(twin).block(0), range(8, 24)), twin)
    assert torch.equal(forward(model, inputs), forward(twin, inputs))
    assert model.config.to_dict() == twin.config.to_dict()


def test_a_gated_bottleneck_gives_place_to_a_later_one(model):
    whole = linear_bottleneck(torch.eye(HIDDEN), 0.9 * torch.eye(HIDDEN), Form(gated=True))
    whole.gate[8:] = 0
    apply(insert_bottleneck(Anatomy(model).block(1), whole), model)
    before = forward(model, tiny_inputs(model))
    few = linear_bottleneck(torch.eye(HIDDEN)[:, :8], 0.9 * torch.eye(HIDDEN)[:8])
    apply(insert_bottleneck(Anatomy(model).block(1), few), model)
    assert len(model.model.layers[1]._forward_hooks) == 1
    torch.testing.assert_close(forward(model, tiny_inputs(model)), before)
    assert recorded(model.config)[0].width == 8
