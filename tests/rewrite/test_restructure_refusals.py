"""Edits of modules on live models: what they refuse, and that a refusal leaves no trace."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

import hf_compress.rewrite.apply as apply_module
from hf_compress.anatomy.anatomy import Anatomy
from hf_compress.anatomy.undo import Undo
from hf_compress.errors import PlanError, UnsupportedModelError
from hf_compress.plan.edits import RemoveBlocks
from hf_compress.plan.plan import Plan
from hf_compress.rewrite.apply import apply
from hf_compress.rewrite.builders import narrow_experts, narrow_ffn, replace_activation
from hf_compress.rewrite.edits.bottleneck import InsertBottleneck
from hf_compress.rewrite.edits.experts import NarrowExperts
from hf_compress.rewrite.edits.ffn import LinearFFN, NarrowFFN, ReplaceActivation
from hf_compress.rewrite.edits.packed import PackLinear
from hf_compress.rewrite.edits.sealed import Seal
from hf_compress.rewrite.site import Site
from tests.helpers.changes import forward
from tests.helpers.plans import (
    BLOCK,
    DOWN,
    GATED,
    HIDDEN,
    MLP,
    PLANS,
    Before,
    bottleneck_plan,
    linear_plan,
    pack_plan,
    refused_without_trace,
)
from tests.helpers.tiny import tiny_base_model, tiny_inputs, tiny_model


@pytest.fixture
def model():
    return tiny_model("llama")


@pytest.fixture(scope="module")
def untouched():
    """A model for all tests that check that they leave it as it was."""
    model = tiny_model("llama")
    return model, Before.of(model)


def shared_mlp(model):
    model.model.layers[1].mlp = model.model.layers[0].mlp


def shared_weight(model):
    model.model.layers[1].mlp.down_proj.weight = model.model.layers[0].mlp.down_proj.weight


def restructure(edit, model):
    with Undo() as undo:
        edit.restructure(Site(model, undo))


def without(plan, name):
    return Plan(plan.edits, {key: tensor for key, tensor in plan.tensors.items() if not key.endswith(name)})


def spoilt(plan, name, value):
    """One entry of one tensor of the plan is no finite number."""
    tensors = {n: tensor.detach().clone() for n, tensor in plan.tensors.items()}
    (one,) = [tensor for n, tensor in tensors.items() if n.endswith(name)]
    one.view(-1)[-1] = value
    return Plan(plan.edits, tensors)


def reshaped(plan, name):
    """One tensor of the plan has a row too many."""
    tensors = {n: torch.cat([t, t[:1]]) if n.endswith(name) else t for n, t in plan.tensors.items()}
    return Plan(plan.edits, tensors)


@pytest.mark.parametrize("share", [shared_mlp, shared_weight])
@pytest.mark.parametrize("name", ["narrow", "linear", "low rank", "packed"])
def test_what_two_blocks_share_is_not_changed(model, share, name):
    plan = pack_plan(model, DOWN) if name == "packed" else PLANS[name](model)
    share(model)
    message = r"is shared \(model.layers.0.*model.layers.1.*\) and cannot be changed"
    with refused_without_trace(model, PlanError, message):
        apply(plan, model)


def test_a_whole_shared_block_gets_no_other_activation(model):
    plan = PLANS["identity"](model)
    shared_mlp(model)
    with refused_without_trace(model, UnsupportedModelError):
        apply(plan, model)


def test_a_head_tied_to_the_embeddings_is_not_packed():
    model = tiny_model("gpt2")
    assert model.lm_head.weight is model.transformer.wte.weight
    plan = pack_plan(model, "lm_head")
    with refused_without_trace(model, PlanError, r"lm_head is shared \(transformer.wte.weight, lm_head.weight\)"):
        apply(plan, model)


@pytest.mark.parametrize("path", [DOWN, GATED[0]])
@pytest.mark.parametrize("name", ["narrow", "linear", "packed"])
def test_a_parametrized_projection_is_refused(model, name, path):
    plan = pack_plan(model, path) if name == "packed" else PLANS[name](model)
    nn.utils.parametrizations.weight_norm(model.get_submodule(path))
    with refused_without_trace(model, PlanError, f"takes {path} for a plain linear map, but it is Parametrized"):
        apply(plan, model)


NORM = f"{BLOCK}.input_layernorm"
NOWHERE = "model.layers.0.nowhere"
ATTENTION_OUTPUT = f"{BLOCK}.self_attn.o_proj"


def edits_of(path):
    """Every edit, with `path` among the modules that it names."""
    return [
        *(NarrowFFN(GATED, path, 8), NarrowFFN((*GATED, path), DOWN, 8), NarrowFFN((GATED[1], path), DOWN, 8)),
        *(LinearFFN(GATED, path), LinearFFN((path,), DOWN), LinearFFN((*GATED, path), DOWN)),
        *(NarrowExperts(path, 8), InsertBottleneck(path, 64, 8), PackLinear(path, 8, (512, 512))),
        *(ReplaceActivation(path, "leaky"), Seal(path)),
    ]


@pytest.mark.parametrize(
    "path", [NOWHERE, "model.layers.9", "nowhere", f"{DOWN}.weight", "__class__", f"{MLP}.__dict__", "config"]
)
def test_a_module_that_is_not_there_is_named(untouched, path):
    """Beside others, in an empty place, and where only an attribute is."""
    model, before = untouched
    for edit in edits_of(path):
        with pytest.raises(PlanError, match=f"LlamaForCausalLM has no module {path}, which the plan"):
            restructure(edit, model)
    before.check(model)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (NarrowFFN(GATED, DOWN, 97), "has 96 hidden units; the plan asks for 97"),
        (
            NarrowFFN(GATED, NORM, 8),
            "takes model.layers.0.input_layernorm for a plain linear map, but it is LlamaRMSNorm",
        ),
        (NarrowFFN((*GATED, NORM), DOWN, 8), "takes model.layers.0.input_layernorm for a plain linear map"),
        (NarrowFFN(GATED, MLP, 8), "for a plain linear map, but it is LlamaMLP"),
        (NarrowFFN((*GATED, ATTENTION_OUTPUT), DOWN, 8), "maps 64 to 64 and is no input of an FFN 64 → 96 → 64"),
        (NarrowFFN((*GATED, DOWN), DOWN, 8), "is no input of an FFN"),
        (NarrowFFN((*GATED, "lm_head"), DOWN, 8), "maps 64 to 128 and is no input"),
        (NarrowExperts(MLP, 8), "is no module that holds the tensors of all experts"),
        (NarrowExperts(DOWN, 8), "does not hold its experts' projections in a tensor each"),
        (LinearFFN(GATED, DOWN, rank=65), "is 64 → 96 → 64; the plan asks for rank 65"),
        (LinearFFN((DOWN,), DOWN), "does not read a stream of width 64"),
        (LinearFFN((NORM,), DOWN), "for a plain linear map, but it is LlamaRMSNorm"),
        (LinearFFN((f"{BLOCK}.self_attn.q_proj",), DOWN), "stands among other parts of its block"),
        (InsertBottleneck(BLOCK, 65, 8), "nothing in model.layers.0 is 65 wide"),
        (InsertBottleneck(f"{MLP}.act_fn", 64, 8), "is 64 wide"),
        (PackLinear(NORM, 8, (8,)), "for a plain linear map, but it is LlamaRMSNorm"),
        (PackLinear("model.embed_tokens", 8, (1024,)), "for a plain linear map, but it is Embedding"),
        (PackLinear(DOWN, 12, (512,)), f"{DOWN}: group_size must be a multiple of 8 that divides the 96 inputs"),
        (PackLinear(DOWN, 16, (383,)), f"{DOWN}: planes must be 1 to 16 positive numbers of groups, the first all 384"),
        (PackLinear(DOWN, 16, (384, 1, 2)), f"{DOWN}: .* planes must fall"),
        (PackLinear(DOWN, 16, (384,) * 9, symmetric=False), f"{DOWN}: .* must be symmetric"),
        (ReplaceActivation(MLP, "leaky"), "takes model.layers.0.mlp for an activation, but it is LlamaMLP with parts"),
        (ReplaceActivation(NORM, "leaky"), "for an activation, but it is LlamaRMSNorm"),
        (Seal(MLP), "model.layers.0.mlp has no weight to seal"),
        (Seal(f"{MLP}.act_fn"), "has no weight to seal"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_a_module_of_another_kind_or_size(untouched, edit, message):
    model, before = untouched
    with pytest.raises(ValueError, match=message):
        restructure(edit, model)
    before.check(model)


def test_an_input_that_reads_something_narrower_than_the_stream(model):
    model.get_submodule(MLP).gate_proj = nn.Linear(HIDDEN // 2, 96, bias=False)
    with refused_without_trace(model, PlanError, f"{GATED[0]} maps 32 to 96 and is no input of an FFN"):
        restructure(NarrowFFN(GATED, DOWN, 8), model)


@pytest.mark.parametrize(
    ("activation", "message"),
    [
        (None, "stands among other parts of its block"),
        ("self_attn", "takes model.decoder.layers.0.self_attn for an activation"),
    ],
)
def test_an_activation_beside_other_parts_must_be_named(activation, message):
    model = tiny_model("opt")
    edit = linear_plan(model).edits[0]
    named = activation and edit.activation.replace("activation_fn", activation)
    with refused_without_trace(model, PlanError, message):
        restructure(replace(edit, activation=named), model)


def test_an_activation_in_a_module_of_its_own_goes_with_it_unnamed():
    model = tiny_base_model("bert")
    edit = linear_plan(model).edits[0]
    before = Before.of(model)
    with Undo() as undo:
        replace(edit, activation=None).restructure(Site(model, undo))
        with pytest.raises(AssertionError):
            before.check(model)
    before.check(model)


def done_before(model):
    """What goes well before something fails: other blocks, so that there is something to take back."""
    return (
        narrow_ffn(Anatomy(model).block(3), range(0, 96, 2))
        + bottleneck_plan(model, 2)
        + Plan(tensors={"model.norm.weight": torch.full((HIDDEN,), 7.0)})
        + Plan((RemoveBlocks("model.layers", (1,)),))
    )


FAILING = {
    "unknown path": (lambda m: Plan((Seal(NOWHERE),)), "has no module"),
    "a forgotten input": (lambda m: Plan((NarrowFFN(GATED[1:], DOWN, 8),)), "gate_proj"),
    "no tensor of an input": (lambda m: without(PLANS["narrow"](m), "up_proj.weight"), "but gives no values for them"),
    "no tensor of an output": (lambda m: without(PLANS["narrow"](m), "down_proj.weight"), "but gives no values"),
    "no bias": (lambda m: without(PLANS["linear"](m), "bias"), "but gives no values for them"),
    "no factor": (lambda m: without(PLANS["low rank"](m), "up_proj.weight"), "but gives no values for them"),
    "no decoder": (lambda m: without(PLANS["bottleneck"](m), "decoder"), "but gives no values for them"),
    "no center": (lambda m: without(PLANS["bottleneck"](m), "center"), "but gives no values for them"),
    "no steps": (lambda m: without(PLANS["packed"](m), "steps"), "but gives no values for them"),
    "no alpha": (lambda m: without(PLANS["identity"](m), "alpha"), "but gives no values for them"),
    "no constant": (lambda m: without(PLANS["constant"](m), "constant"), "but gives no values for them"),
    "no tensor at all": (lambda m: Plan(PLANS["packed"](m).edits), "but gives no values for them"),
    "a row too many": (lambda m: reshaped(PLANS["narrow"](m), "up_proj.weight"), r"is \(32, 64\) after the plan"),
    "a bias too long": (lambda m: reshaped(PLANS["linear"](m), "bias"), r"is \(64,\) after the plan"),
    "a byte too many": (lambda m: reshaped(PLANS["packed"](m), "o_proj.weight"), "after the plan; its tensor is"),
    "a constant too long": (lambda m: reshaped(PLANS["constant"](m), "constant"), r"is \(96,\) after the plan"),
    "steps of another dtype": (
        lambda m: Plan((p := PLANS["packed"](m)).edits, p.tensors | {f"{ATTENTION_OUTPUT}.steps": torch.zeros(256)}),
        "steps is kept as torch.int16; its tensor is torch.float32",
    ),
    "NaN in what is made": (lambda m: spoilt(PLANS["linear"](m), "bias", math.nan), r"down_proj.bias holds NaN or inf"),
    "infinity in a buffer": (
        lambda m: spoilt(PLANS["constant"](m), "constant", math.inf),
        "act_fn.constant holds NaN or infinity",
    ),
    "infinity in what is there": (
        lambda m: Plan(tensors={f"{DOWN}.weight": torch.full((HIDDEN, 96), -math.inf)}),
        "the plan's tensor for .*down_proj.weight holds NaN or infinity",
    ),
    "a tensor of nothing": (lambda m: Plan(tensors={f"{MLP}.nothing": torch.zeros(1)}), "does not have"),
    "a tensor of what is gone": (
        lambda m: Plan((p := PLANS["linear"](m)).edits, p.tensors | {f"{GATED[0]}.weight": torch.zeros(96, 64)}),
        "does not have",
    ),
    "a bottleneck on a bottleneck": (
        lambda m: Plan((p := bottleneck_plan(m, 2, 8)).edits + p.edits, {}),
        "has a bottleneck already",
    ),
    "a packed map packed again": (
        lambda m: Plan((p := PLANS["packed"](m)).edits + p.edits, p.tensors),
        "but it is MixedPrecisionLinear",
    ),
    "constants of another width": (
        lambda m: replace_activation(Anatomy(m).block(0), "constant", 0.5, torch.zeros(7)),
        "does not run after the change",
    ),
    "a block that is not there": (lambda m: Plan((RemoveBlocks("model.layers", (9,)),)), "has the blocks"),
}


@pytest.mark.parametrize("name", FAILING)
def test_after_a_failure_the_model_is_bit_for_bit_as_it_was(model, name):
    make, message = FAILING[name]
    failing = make(model)
    plan = Plan(done_before(model).edits + failing.edits, {**done_before(model).tensors, **failing.tensors})
    inputs = tiny_inputs(model)
    reference = forward(model, inputs)
    with refused_without_trace(model, ValueError, message):
        apply(plan, model)
    assert torch.equal(forward(model, inputs), reference)


def test_what_goes_well_before_the_failures_does_go_well(model):
    before = Before.of(model)
    apply(done_before(model), model)
    with pytest.raises(AssertionError):
        before.check(model)
    assert len(model.model.layers) == 3


@pytest.mark.parametrize("step", ["replace", "_write", "remove_blocks", "record", "check_parity"])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_interruption_at_any_step_leaves_no_trace(model, monkeypatch, step, error):
    owner = Site if step == "replace" else apply_module
    real = getattr(owner, step)

    def interrupted(*args):
        real(*args)
        raise error(step)

    monkeypatch.setattr(owner, step, interrupted)
    plan = done_before(model)
    with refused_without_trace(model, error, step):
        apply(plan, model)


def test_a_failure_leaves_an_already_changed_model_as_it_was(model):
    apply(done_before(model), model)
    for plan in (Plan((Seal(NOWHERE),)), without(PLANS["narrow"](model), "up_proj.weight"), bottleneck_plan(model, 1)):
        with refused_without_trace(model, PlanError):
            apply(plan, model)


def experts_plan(model, width=24):
    return narrow_experts(Anatomy(model).block(0), torch.arange(width).expand(4, -1))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda m: Plan((NarrowExperts(f"{MLP}.experts", 97),)), "have 96 hidden units; the plan asks for 97"),
        (lambda m: Plan((NarrowExperts(MLP, 8),)), "is no module that holds the tensors of all experts|does not hold"),
        (lambda m: Plan((NarrowFFN((f"{MLP}.experts",), f"{MLP}.experts", 8),)), "takes .* for a plain linear map"),
        (lambda m: Plan((LinearFFN((f"{MLP}.experts",), f"{MLP}.experts"),)), "takes .* for a plain linear map"),
        (lambda m: without(experts_plan(m), "gate_up_proj"), "gives no values for them"),
        (lambda m: without(experts_plan(m), "down_proj"), "gives no values for them"),
        (lambda m: reshaped(experts_plan(m), "down_proj"), r"after the plan; its tensor is \(5,"),
    ],
)
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_a_mixture_is_left_as_it_was(family, make, message):
    model = tiny_model(family)
    plan = make(model)
    with refused_without_trace(model, ValueError, message):
        apply(plan, model)
