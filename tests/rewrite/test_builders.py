"""Drafts against hooks on the untouched model: what a changed FFN has to compute, by the names its authors gave it."""

import struct

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_compress.anatomy.anatomy import Anatomy, Block
from hf_compress.anatomy.undo import Undo
from hf_compress.modules.packed import MixedPrecisionLinear
from hf_compress.plan.plan import Plan
from hf_compress.rewrite.apply import apply, carry_out
from hf_compress.rewrite.builders import (
    narrow_experts,
    narrow_ffn,
    pack_linear,
)
from tests.helpers.changes import Trace
from tests.helpers.ffns import (
    FAMILIES,
    HIDDEN,
    Family,
    Subject,
    assert_close,
    bias_of,
    built,
    families,
    matrix_of,
    noise,
    some_units,
    subject,
)
from tests.helpers.tiny import tiny_model


def test_the_matrices_of_the_oracle_are_those_of_the_modules():
    """Both layouts, since everything here rests on it."""
    x = noise(2, 3)
    for module in (nn.Linear(3, 5), Conv1D(5, 3)):
        torch.testing.assert_close(x @ matrix_of(module) + module.bias, module(x))


# --- narrower ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [40, 1])
@families()
def test_narrow_ffn_is_the_original_with_the_other_hidden_units_masked(name, count):
    it = subject(name)
    units = some_units(it.family.width, count)
    expected = it.masked(units)
    assert_close(it.after(narrow_ffn(it.block, units.tolist())), expected, it.reference)


@families()
def test_keeping_every_unit_changes_nothing_at_all(name):
    it = subject(name)
    before = Trace.of(it.model)
    assert torch.equal(it.after(narrow_ffn(it.block, range(it.family.width))), it.reference)
    assert before.difference(it.model) is None


@families(["llama", "phi3", "gpt2", "bert", "opt"])
def test_another_order_of_every_unit_changes_rounding_alone(name):
    it = subject(name)
    assert_close(it.after(narrow_ffn(it.block, some_units(it.family.width, it.family.width))), it.reference)


@families(["llama", "phi3", "gpt2", "bert", "opt"])
def test_the_units_stand_in_the_order_given(name):
    it = subject(name)
    units = some_units(it.family.width, 7).tolist()
    first, last = it.part("first"), it.part("last")
    into, out, bias = matrix_of(first), matrix_of(last), bias_of(first, into_width(first))
    it.after(narrow_ffn(it.block, units))
    new_first, new_last = it.part("first"), it.part("last")
    for place, unit in enumerate(units):
        assert torch.equal(matrix_of(new_first)[:, place], into[:, unit])
        assert torch.equal(bias_of(new_first, into_width(new_first))[place], bias[unit])
        assert torch.equal(matrix_of(new_last)[place], out[unit])
        if name == "phi3":  # all gates come before all ups
            assert torch.equal(matrix_of(new_first)[:, 7 + place], into[:, it.family.width + unit])
    assert matrix_of(new_last).shape == (7, HIDDEN)
    assert torch.equal(bias_of(new_last, HIDDEN), bias_of(last, HIDDEN))


def into_width(module):
    return matrix_of(module).shape[1]


@families(["llama", "phi3", "gpt2", "bert", "opt"])
def test_one_width_for_every_ffn_is_said_by_the_config_alone(name):
    model, stack, _, _ = built(name)
    units = [some_units(FAMILIES[name].width, 48, seed).tolist() for seed in range(len(stack))]
    apply(sum((narrow_ffn(Block(model, stack, index), kept) for index, kept in enumerate(units)), start=Plan()), model)
    assert not hasattr(model.config, "quantization_config")
    field = {"gpt2": "n_inner", "opt": "ffn_dim"}.get(name, "intermediate_size")
    assert getattr(model.config, field) == 48


def test_keeping_every_unit_leaves_no_record():
    it = subject("llama")
    before = it.model.config.to_dict()
    apply(narrow_ffn(it.block, range(96)), it.model)
    assert it.model.config.to_dict() == before
    assert torch.equal(it.output(), it.reference)


# --- experts ----------------------------------------------------------------------------------------------------------

# Block, hidden units of an expert, the tensor that projects back, and which of its axes the units are.
EXPERTS = {
    "mixtral": (1, 96, "mlp.experts.down_proj", 2),
    "olmoe": (0, 96, "mlp.experts.down_proj", 2),
    "qwen3_moe": (1, 48, "mlp.experts.down_proj", 2),
    "deepseek_v3": (2, 48, "mlp.experts.down_proj", 2),  # with an expert that all tokens share
    "granitemoe": (0, 96, "block_sparse_moe.experts.down_proj", 2),
    "jamba": (1, 96, "feed_forward.experts.down_proj", 2),
    "gpt_oss": (1, 96, "mlp.experts.down_proj", 1),  # transposed, interleaved, with biases
    "llama4_text": (1, 96, "feed_forward.experts.down_proj", 1),  # transposed
}
COUNT = 4


def mixture(name):
    """A model, the width of its experts, and their way back with the hidden units last."""
    index, width, path, axis = EXPERTS[name]
    it = Subject(tiny_model(name), Family(tiny_model, "model.layers", index, width, path, None, path))
    down = it.block.module.get_parameter(path)
    assert down.shape[axis] == width
    return it, width, down.detach().movedim(axis, 2)


def units_of_experts(width, count):
    """(experts, count): other units, in no order, for each expert."""
    return torch.stack([some_units(width, count, seed) for seed in range(COUNT)])


@pytest.mark.parametrize("name", EXPERTS)
def test_narrow_experts_is_the_original_with_the_other_hidden_units_cut_off(name):
    it, width, down = mixture(name)
    units, original = units_of_experts(width, width // 2), down.clone()
    for expert in range(COUNT):
        down[expert, :, [unit for unit in range(width) if unit not in units[expert].tolist()]] = 0
    expected = it.output()
    down.copy_(original)
    assert_close(it.after(narrow_experts(it.block, units)), expected, it.reference)


@pytest.mark.parametrize("name", EXPERTS)
def test_keeping_every_unit_of_every_expert_changes_nothing_at_all(name):
    it, width, _ = mixture(name)
    before = Trace.of(it.model)
    assert torch.equal(it.after(narrow_experts(it.block, torch.arange(width).expand(COUNT, -1))), it.reference)
    assert before.difference(it.model) is None


def test_gate_and_up_of_a_unit_stay_neighbours_where_they_were():
    model = tiny_model("gpt_oss")
    stack = Anatomy(model).stack()
    experts = stack.blocks[0].mlp.experts
    before = {name: p.detach().clone() for name, p in experts.named_parameters()}
    units = units_of_experts(96, 8)
    carry_out(narrow_experts(Block(model, stack, 0), units), model, Undo())
    after = dict(stack.blocks[0].mlp.experts.named_parameters())
    for expert in range(COUNT):
        for place, unit in enumerate(units[expert].tolist()):
            for half in (0, 1):
                new, old = 2 * place + half, 2 * unit + half
                for name in ("gate_up_proj", "gate_up_proj_bias"):
                    assert torch.equal(after[name][expert, ..., new], before[name][expert, ..., old])
            assert torch.equal(after["down_proj"][expert, place], before["down_proj"][expert, unit])
    assert torch.equal(after["down_proj_bias"], before["down_proj_bias"])


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_one_width_for_all_experts_is_said_by_the_config_alone(name):
    model = tiny_model(name)
    stack = Anatomy(model).stack()
    plans = [narrow_experts(Block(model, stack, index), units_of_experts(96, 48)) for index in range(len(stack))]
    apply(sum(plans, start=Plan()), model)
    assert model.config.intermediate_size == 48
    assert (getattr(model.config, "quantization_config", None) or {}).get("quant_method") != "hf_compress"


# --- packed -----------------------------------------------------------------------------------------------------------


def bfloat16_at_least(value):
    """A bfloat16 is the upper half of a float32."""
    upper = struct.unpack("<I", struct.pack("<f", value))[0] >> 16
    down, up = (struct.unpack("<f", struct.pack("<I", half << 16))[0] for half in (upper, upper + 1))
    return down if down >= value else up


def rounded(matrix, bits, group_size):
    """(outputs, inputs) rounded to nearest, group by group and weight by weight, as symmetric packing has it."""
    result = matrix.clone()
    for row in range(matrix.shape[0]):
        for group in range(matrix.shape[1] // group_size):
            columns = range(group * group_size, (group + 1) * group_size)
            half = 2 ** (int(bits[row, group]) - 1)
            reach = max(abs(matrix[row, column].item()) for column in columns)
            step = bfloat16_at_least(reach / (half - 1))
            for column in columns:
                result[row, column] = step * round(matrix[row, column].item() / step)
    return result


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("llama", "model.layers.1.mlp.down_proj"),
        ("gpt2", "transformer.h.1.attn.c_proj"),  # transposed, with a bias
        ("opt", "model.decoder.layers.1.self_attn.out_proj"),  # with a bias
        ("phi3", "model.layers.0.self_attn.o_proj"),
    ],
)
def test_a_packed_map_is_the_original_rounded(name, path):
    it = subject(name)
    module = it.model.get_submodule(path)
    matrix = matrix_of(module).T
    outputs, width = matrix.shape
    bits = torch.randint(3, 6, (outputs, width // 16), generator=torch.Generator().manual_seed(11))
    expected_matrix = rounded(matrix, bits, 16)
    bias = module.bias

    def instead(module, args, output):
        return args[0] @ expected_matrix.T + (0 if bias is None else bias)

    expected = it.output(module.register_forward_hook(instead))
    assert_close(it.after(pack_linear(it.model, path, bits, 16)), expected, it.reference)
    packed = it.model.get_submodule(path)
    assert isinstance(packed, MixedPrecisionLinear)
    torch.testing.assert_close(packed.unpacked(), expected_matrix)
    assert (packed.bias is None) == (bias is None)


def test_many_bits_are_almost_the_original():
    it = subject("gpt2")
    got = it.after(pack_linear(it.model, "transformer.h.0.mlp.c_fc", torch.full((256, 8), 8), 8, symmetric=False))
    assert (got - it.reference).abs().max() < 0.02 * it.reference.abs().max()
    assert not torch.equal(got, it.reference)
