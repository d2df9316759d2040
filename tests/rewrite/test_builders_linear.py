"""Drafts of linear FFNs, blended activations and bottlenecks against hooks on the untouched model."""

import pytest
import torch

from hf_compress.anatomy.undo import Undo
from hf_compress.modules.bottleneck import Form
from hf_compress.rewrite.apply import apply
from hf_compress.rewrite.builders import insert_bottleneck, linear_ffn, replace_activation
from tests.helpers.ffns import (
    HIDDEN,
    PLAIN,
    Family,
    Subject,
    assert_close,
    bias_of,
    families,
    matrix_of,
    noise,
    subject,
)
from tests.helpers.plans import linear_bottleneck
from tests.helpers.tiny import tiny_model


@pytest.mark.parametrize("bias", [noise(HIDDEN, seed=9), None], ids=["a bias", "none of the old ones left"])
@families()
def test_linear_ffn_is_the_original_with_a_linear_map_for_its_ffn(name, bias):
    it, matrix = subject(name), noise(HIDDEN, HIDDEN, scale=0.1)
    expected = it.with_linear(matrix, 0.0 if bias is None else bias)
    assert_close(it.after(linear_ffn(it.block, [matrix], bias)), expected, it.reference)


@families()
def test_a_low_rank_is_the_product_of_its_factors(name):
    it, down, up, bias = subject(name), noise(HIDDEN, 5) / 30, noise(5, HIDDEN, seed=9), noise(HIDDEN, seed=10)
    expected = it.with_linear(down @ up, bias)
    before = sum(p.numel() for p in it.block.module.parameters())
    assert_close(it.after(linear_ffn(it.block, [down, up], bias)), expected, it.reference)
    saved = before - sum(p.numel() for p in it.block.module.parameters())
    gates = 1 if name in PLAIN else 2
    assert saved >= (gates + 1) * it.family.width * HIDDEN - (2 * HIDDEN * 5 + HIDDEN + 5)


def test_a_low_rank_where_the_inputs_stand_deeper_than_the_output():
    model = tiny_model("cpmant")  # ffn.ffn.w_in.w_0, ffn.ffn.w_in.w_1 and ffn.ffn.w_out
    it = Subject(model, Family(tiny_model, "cpmant.encoder.layers", 1, 96, "ffn.ffn.w_in.w_0", None, "ffn.ffn.w_out"))
    down, up = noise(HIDDEN, 5) / 30, noise(5, HIDDEN, seed=9)
    expected = it.with_linear(down @ up)
    plan = linear_ffn(it.block, [down, up])
    assert list(plan.tensors) == [it.family.path("ffn.ffn.w_in_w_1.weight"), it.family.path("ffn.ffn.w_out.weight")]
    apply(plan, model)
    assert_close(it.output(), expected, it.reference)


@families(["llama", "gpt2", "bert", "opt"])
def test_the_widest_rank_there_is(name):
    it, down, up = subject(name), noise(HIDDEN, HIDDEN) / 30, noise(HIDDEN, HIDDEN, seed=9)
    expected = it.with_linear(down @ up)
    assert_close(it.after(linear_ffn(it.block, [down, up])), expected, it.reference)


# --- activations ------------------------------------------------------------------------------------------------------


@families()
def test_a_blend_that_has_not_begun_changes_nothing_at_all(name):
    it = subject(name)
    for blend, constant in (("identity", None), ("constant", noise(it.family.width))):
        with Undo() as undo:
            assert torch.equal(it.after(replace_activation(it.block, blend, 0.0, constant), undo), it.reference), blend


@families(["opt", "t5"])
def test_a_leaky_blend_that_has_not_begun_is_relu(name):
    it = subject(name)
    assert torch.equal(it.after(replace_activation(it.block, "leaky")), it.reference)


@families()
def test_half_a_blend_is_what_a_hook_on_the_activation_gives(name):
    it = subject(name)
    constant = noise(it.family.width)
    halves = {
        "leaky": lambda module, args, output: torch.where(args[0] > 0, args[0], 0.5 * args[0]),
        "identity": lambda module, args, output: 0.5 * output + 0.5 * args[0],
        "constant": lambda module, args, output: 0.5 * output + 0.5 * constant,
    }
    for blend, half in halves.items():
        expected = it.output(it.part("activation").register_forward_hook(half))
        given = constant if blend == "constant" else None
        with Undo() as undo:
            assert_close(it.after(replace_activation(it.block, blend, 0.5, given), undo), expected, it.reference)


@families(PLAIN)
def test_a_plain_ffn_without_its_activation_is_the_product_of_its_projections(name):
    it = subject(name)
    first, last = it.part("first"), it.part("last")
    matrix = (matrix_of(first).double() @ matrix_of(last).double()).float()
    bias = bias_of(first, it.family.width) @ matrix_of(last) + bias_of(last, HIDDEN)
    collapsed = it.with_linear(matrix, bias)
    with Undo() as undo:
        assert_close(it.after(replace_activation(it.block, "identity", 1.0), undo), collapsed, it.reference)
    assert_close(it.after(linear_ffn(it.block, [matrix], bias)), collapsed)


@families(["llama", "gemma2", "phi3", "glm"])
def test_a_gated_ffn_with_constant_gates_is_the_product_of_the_others(name):
    it = subject(name)
    constant, width = noise(it.family.width), it.family.width
    if it.family.first.endswith("gate_up_proj"):
        up = matrix_of(it.part("first"))[:, width:]
    else:
        up = matrix_of(it.block.module.mlp.up_proj)
    matrix = (up.double() @ torch.diag(constant).double() @ matrix_of(it.part("last")).double()).float()
    expected = it.with_linear(matrix)
    assert_close(it.after(replace_activation(it.block, "constant", 1.0, constant)), expected, it.reference)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_the_activation_of_experts(name):
    experts = Family(tiny_model, "model.layers", 1, 96, "mlp.experts", "mlp.experts.act_fn", "mlp.experts")
    it = Subject(tiny_model(name), experts)
    quarter = it.part("activation").register_forward_hook(lambda module, args, output: 0.25 * args[0] + 0.75 * output)
    expected = it.output(quarter)
    assert_close(it.after(replace_activation(it.block, "identity", 0.25)), expected, it.reference)


# --- bottlenecks ------------------------------------------------------------------------------------------------------


@families()
def test_a_bottleneck_is_a_hook_on_the_block(name):
    it, skip = subject(name), 0.3
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

        expected = it.output(it.block.module.register_forward_hook(after))
        bottleneck = linear_bottleneck(encoder, decoder, Form(skip, "lost" if center is None else "kept"))
        if center is not None:
            bottleneck.center.data.copy_(center)
        with Undo() as undo:
            assert_close(it.after(insert_bottleneck(it.block, bottleneck), undo), expected, it.reference)


def test_a_bottleneck_behind_a_block_that_returns_a_list():
    it = Subject(tiny_model("openai-gpt"), Family(tiny_model, "transformer.h", 1, 256, "mlp.c_fc", None, "mlp.c_proj"))
    encoder = torch.linalg.qr(noise(HIDDEN, HIDDEN)).Q
    assert_close(it.after(insert_bottleneck(it.block, linear_bottleneck(encoder, 0.9 * encoder.T))), it.reference)
