"""Drafts of linear FFNs, blended activations and bottlenecks against hooks on the untouched model."""

import pytest
import torch

from hf_compress.anatomy.anatomy import Anatomy, Block
from hf_compress.anatomy.undo import Undo
from hf_compress.modules.bottleneck import Form
from hf_compress.rewrite.apply import apply, carry_out
from hf_compress.rewrite.builders import insert_bottleneck, linear_ffn, replace_activation
from tests.helpers.changes import forward
from tests.helpers.ffns import (
    FAMILIES,
    HIDDEN,
    PLAIN,
    Family,
    assert_close,
    bias_of,
    built,
    families,
    hooked,
    matrix_of,
    noise,
    with_linear,
)
from tests.helpers.plans import linear_bottleneck
from tests.helpers.tiny import tiny_inputs, tiny_model

# --- linear -----------------------------------------------------------------------------------------------------------


@families()
def test_linear_ffn_is_the_original_with_a_linear_map_for_its_ffn(name):
    model, stack, inputs, reference = built(name)
    family, matrix, bias = FAMILIES[name], noise(HIDDEN, HIDDEN, scale=0.1), noise(HIDDEN, seed=9)
    expected = with_linear(model, family, matrix, bias, inputs)
    carry_out(linear_ffn(Block(model, stack, family.index), [matrix], bias), model, Undo())
    assert_close(forward(model, inputs), expected, reference)


@families()
def test_without_a_bias_none_of_the_old_ones_is_left(name):
    model, stack, inputs, reference = built(name)
    family, matrix = FAMILIES[name], noise(HIDDEN, HIDDEN, scale=0.1)
    expected = with_linear(model, family, matrix, 0.0, inputs)
    carry_out(linear_ffn(Block(model, stack, family.index), [matrix]), model, Undo())
    assert_close(forward(model, inputs), expected, reference)


@families()
def test_a_low_rank_is_the_product_of_its_factors(name):
    model, stack, inputs, reference = built(name)
    family, down, up, bias = FAMILIES[name], noise(HIDDEN, 5), noise(5, HIDDEN, seed=9), noise(HIDDEN, seed=10)
    expected = with_linear(model, family, down @ up / 30, bias, inputs)
    before = sum(p.numel() for p in stack.blocks[family.index].parameters())
    plan = linear_ffn(Block(model, stack, family.index), [down / 30, up], bias)
    carry_out(plan, model, Undo())
    assert_close(forward(model, inputs), expected, reference)
    saved = before - sum(p.numel() for p in stack.blocks[family.index].parameters())
    gates = 1 if name in PLAIN else 2
    assert saved >= (gates + 1) * family.width * HIDDEN - (2 * HIDDEN * 5 + HIDDEN + 5)


def test_a_low_rank_where_the_inputs_stand_deeper_than_the_output():
    model = tiny_model("cpmant")  # ffn.ffn.w_in.w_0, ffn.ffn.w_in.w_1 and ffn.ffn.w_out
    stack, inputs = Anatomy(model).stack(), tiny_inputs(model)
    reference = forward(model, inputs)
    family = Family(tiny_model, stack.path, 1, 96, "ffn.ffn.w_in.w_0", None, "ffn.ffn.w_out")
    down, up = noise(HIDDEN, 5) / 30, noise(5, HIDDEN, seed=9)
    expected = with_linear(model, family, down @ up, 0.0, inputs)
    plan = linear_ffn(Block(model, stack, 1), [down, up])
    assert list(plan.tensors) == [family.path("ffn.ffn.w_in_w_1.weight"), family.path("ffn.ffn.w_out.weight")]
    apply(plan, model)
    assert_close(forward(model, inputs), expected, reference)


@families(["llama", "gpt2", "bert", "opt"])
def test_the_widest_rank_there_is(name):
    model, stack, inputs, reference = built(name)
    family, down, up = FAMILIES[name], noise(HIDDEN, HIDDEN) / 30, noise(HIDDEN, HIDDEN, seed=9)
    expected = with_linear(model, family, down @ up, 0.0, inputs)
    carry_out(linear_ffn(Block(model, stack, family.index), [down, up]), model, Undo())
    assert_close(forward(model, inputs), expected, reference)


# --- activations ------------------------------------------------------------------------------------------------------


@families()
def test_a_blend_that_has_not_begun_changes_nothing_at_all(name):
    model, stack, inputs, reference = built(name)
    family = FAMILIES[name]
    for blend, constant in (("identity", None), ("constant", noise(family.width))):
        with Undo() as undo:
            carry_out(replace_activation(Block(model, stack, family.index), blend, 0.0, constant), model, undo)
            assert torch.equal(forward(model, inputs), reference), blend


@families(["opt", "t5"])
def test_a_leaky_blend_that_has_not_begun_is_relu(name):
    model, stack, inputs, reference = built(name)
    carry_out(replace_activation(Block(model, stack, FAMILIES[name].index), "leaky"), model, Undo())
    assert torch.equal(forward(model, inputs), reference)


@families()
def test_half_a_blend_is_what_a_hook_on_the_activation_gives(name):
    model, stack, inputs, reference = built(name)
    family = FAMILIES[name]
    constant, activation = noise(family.width), model.get_submodule(family.path(family.activation))
    halves = {
        "leaky": lambda module, args, output: torch.where(args[0] > 0, args[0], 0.5 * args[0]),
        "identity": lambda module, args, output: 0.5 * output + 0.5 * args[0],
        "constant": lambda module, args, output: 0.5 * output + 0.5 * constant,
    }
    for blend, half in halves.items():
        with hooked(activation.register_forward_hook(half)):
            expected = forward(model, inputs)
        given = constant if blend == "constant" else None
        with Undo() as undo:
            carry_out(replace_activation(Block(model, stack, family.index), blend, 0.5, given), model, undo)
            assert_close(forward(model, inputs), expected, reference)


@families(PLAIN)
def test_a_plain_ffn_without_its_activation_is_the_product_of_its_projections(name):
    model, stack, inputs, reference = built(name)
    family = FAMILIES[name]
    first, last = (model.get_submodule(family.path(path)) for path in (family.first, family.last))
    matrix = (matrix_of(first).double() @ matrix_of(last).double()).float()
    bias = bias_of(first, family.width) @ matrix_of(last) + bias_of(last, HIDDEN)
    collapsed = with_linear(model, family, matrix, bias, inputs)
    undo = Undo()
    carry_out(replace_activation(Block(model, stack, family.index), "identity", 1.0), model, undo)
    assert_close(forward(model, inputs), collapsed, reference)
    undo.rollback()
    carry_out(linear_ffn(Block(model, stack, family.index), [matrix], bias), model, Undo())
    assert_close(forward(model, inputs), collapsed)


@families(["llama", "gemma2", "phi3", "glm"])
def test_a_gated_ffn_with_constant_gates_is_the_product_of_the_others(name):
    model, stack, inputs, reference = built(name)
    family = FAMILIES[name]
    constant, last = noise(family.width), model.get_submodule(family.path(family.last))
    if family.first.endswith("gate_up_proj"):
        up = matrix_of(model.get_submodule(family.path(family.first)))[:, family.width :]
    else:
        up = matrix_of(model.get_submodule(family.path("mlp.up_proj")))
    matrix = (up.double() @ torch.diag(constant).double() @ matrix_of(last).double()).float()
    expected = with_linear(model, family, matrix, 0.0, inputs)
    carry_out(replace_activation(Block(model, stack, family.index), "constant", 1.0, constant), model, Undo())
    assert_close(forward(model, inputs), expected, reference)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_the_activation_of_experts(name):
    model = tiny_model(name)
    stack, inputs = Anatomy(model).stack(), tiny_inputs(model)
    reference, act = forward(model, inputs), stack.blocks[1].mlp.experts.act_fn
    with hooked(act.register_forward_hook(lambda module, args, output: 0.25 * args[0] + 0.75 * output)):
        expected = forward(model, inputs)
    carry_out(replace_activation(Block(model, stack, 1), "identity", 0.25), model, Undo())
    assert_close(forward(model, inputs), expected, reference)


# --- bottlenecks ------------------------------------------------------------------------------------------------------


@families()
def test_a_bottleneck_is_a_hook_on_the_block(name):
    model, stack, inputs, reference = built(name)
    index, skip = FAMILIES[name].index, 0.3
    encoder, decoder = noise(HIDDEN, 9, scale=0.2), noise(9, HIDDEN, seed=9, scale=0.2)

    def squeeze(h, b):
        mean, spread = h.mean(-1, keepdim=True), (h.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt()
        n = (h - mean) / spread
        if b is None:
            return n @ encoder @ decoder + skip * h
        return spread * ((n - b) @ encoder @ decoder + (1 - skip) * b) + (1 - skip) * mean + skip * h

    for center in (noise(HIDDEN, seed=10), None):

        def after(block, args, output, b=center):
            return (squeeze(output[0], b), *output[1:]) if isinstance(output, tuple) else squeeze(output, b)

        with hooked(stack.blocks[index].register_forward_hook(after)):
            expected = forward(model, inputs)
        with Undo() as undo:
            bottleneck = linear_bottleneck(encoder, decoder, Form(skip, "lost" if center is None else "kept"))
            if center is not None:
                bottleneck.center.data.copy_(center)
            carry_out(insert_bottleneck(Block(model, stack, index), bottleneck), model, undo)
            assert_close(forward(model, inputs), expected, reference)


def test_a_bottleneck_behind_a_block_that_returns_a_list():
    model = tiny_model("openai-gpt")
    encoder = torch.linalg.qr(noise(HIDDEN, HIDDEN)).Q
    inputs = tiny_inputs(model)
    reference, stack = forward(model, inputs), Anatomy(model).stack()
    carry_out(insert_bottleneck(Block(model, stack, 1), linear_bottleneck(encoder, 0.9 * encoder.T)), model, Undo())
    assert_close(forward(model, inputs), reference)
