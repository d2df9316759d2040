"""LayerCollapse (https://arxiv.org/abs/2311.17943): its equations written slowly, unit by unit, against the fast ones.

PReLU_α(z) = max(z, 0) + α·min(z, 0), so an FFN W₂·PReLU_α(W₁x + b₁) + b₂ differs from its collapse W₂W₁x + W₂b₁ + b₂ by
W₂·(PReLU_α(z) − z) = −(1 − α)·W₂·min(z, 0). Here matrices multiply from the right.
"""

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_compress import DenseConfig, DenseForClassification
from hf_compress.anatomy.anatomy import Anatomy, Block
from hf_compress.anatomy.undo import Undo
from hf_compress.calibration.data import prepare
from hf_compress.errors import CalibrationError, NotLinearError, UnsupportedModelError
from hf_compress.methods.base.context import CalibrationContext
from hf_compress.methods.base.registry import plan_for
from hf_compress.methods.layer_collapse import LayerCollapseConfig
from hf_compress.methods.layer_collapse.blend import absorbed, blended, fitting_blend, mean_gates
from hf_compress.methods.layer_collapse.product import plan_by_product, product
from hf_compress.modules.activation import BlendedActivation
from hf_compress.rewrite.apply import apply, carry_out
from hf_compress.rewrite.builders import replace_activation
from hf_compress.storage.save import save
from tests.helpers.changes import Trace, forward
from tests.helpers.ffns import FAMILIES, PLAIN, assert_close, bias_of, built, families, hooked, matrix_of, noise
from tests.helpers.models import in_dtype, leftovers
from tests.helpers.tiny import tiny_inputs, tiny_model, tiny_seq2seq_model

ALPHAS = (0.0, 0.25, 0.9, 1.0, 1.5)
GATED = [name for name in FAMILIES if name not in PLAIN]


def constants(name):
    """Constants for gates; the paper's own FFNs have none."""
    return None if name in PLAIN else noise(FAMILIES[name].width, seed=11)


def driven(name, blend, alpha, model=None):
    """A model with the activation of its FFN blended, and its stack."""
    family = FAMILIES[name]
    model = model or family.build(name)
    stack = Anatomy(model).stack(family.stack)
    given = constants(name) if blend == "constant" else None
    carry_out(replace_activation(Block(model, stack, family.index), blend, alpha, given), model, Undo())
    return model, stack


def without_biases(model):
    """The same model, none of whose linear maps adds anything."""
    for module in model.modules():
        if isinstance(module, Conv1D):
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Linear):
            module.bias = None
    return model


def watched(model, family, inputs):
    """What the FFN's first and last projections read and write, in float64."""
    seen = {}

    def see(name):
        return lambda _, args, out: seen.update({f"{name}.in": args[0].double(), f"{name}.out": out.double()})

    first, last = (model.get_submodule(family.path(name)) for name in (family.first, family.last))
    with hooked(first.register_forward_hook(see("first")), last.register_forward_hook(see("last"))):
        forward(model, inputs)
    return seen


# --- PReLU ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("biases", [True, False])
@families(PLAIN)
def test_the_error_of_a_collapse_is_what_the_slope_takes_from_negative_units(name, biases):
    """−(1 − α)·W₂·min(z, 0), in float64, for every α: of the library's map against what the real module computes."""
    family = FAMILIES[name]
    for alpha in ALPHAS:
        untouched = family.build(name) if biases else without_biases(family.build(name))
        model, stack = driven(name, "leaky", alpha, untouched)
        seen, down = (
            watched(model.double(), family, tiny_inputs(model)),
            matrix_of(model.get_submodule(family.path(family.last))),
        )
        weight, bias = absorbed(Block(model, stack, family.index))
        slope = model.get_submodule(family.path(family.activation)).alpha.item()  # α as float32 has it
        x, z = seen["first.in"], seen["first.out"]
        difference = seen["last.out"] - (x @ weight + bias)
        assert (z < 0).any()
        expected = torch.zeros_like(difference)
        for unit in range(family.width):
            expected -= (1 - slope) * z[..., unit, None].clamp(max=0) * down[unit]
        torch.testing.assert_close(difference, expected, rtol=0, atol=1e-11)
        assert alpha == 1 or difference.abs().max() > 1e-2


@families(PLAIN)
def test_a_collapsed_model_with_the_error_added_is_the_blended_one(name):
    """The same through whole models: one collapsed by the library, one untouched, where a hook makes the activation."""
    family, alpha = FAMILIES[name], 0.4
    model, _, inputs, reference = built(name)
    first, last = (model.get_submodule(family.path(path)) for path in (family.first, family.last))
    up, b1, down, width = matrix_of(first), bias_of(first, family.width), matrix_of(last), family.width
    prelu = model.get_submodule(family.path(family.activation)).register_forward_hook(
        lambda _, args, out: torch.where(args[0] > 0, args[0], alpha * args[0])
    )
    seen = []
    read = first.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with hooked(prelu, read):
        expected = forward(model, inputs)
    error = -(1 - alpha) * (seen[0] @ up + b1).view(*seen[0].shape[:-1], width).clamp(max=0) @ down

    model, stack = driven(name, "leaky", alpha)
    assert_close(forward(model, inputs), expected, reference)
    plan = product(Block(model, stack, family.index), None)
    carry_out(plan, model, Undo())
    collapsed = forward(model, inputs)
    map_of = next(path.rpartition(".")[0] for path in plan.tensors if path.endswith(".weight"))
    with hooked(model.get_submodule(map_of).register_forward_hook(lambda _, args, out: out + error.view_as(out))):
        assert_close(forward(model, inputs), expected, collapsed)


# --- smooth and gated -------------------------------------------------------------------------------------------------


@families(PLAIN)
def test_a_smooth_activation_goes_straight_to_the_identity(name):
    """(1 − α)·act(z) + α·z, so that the FFN is (1 − α) times itself plus α times its collapse."""
    family = FAMILIES[name]
    untouched, inputs = family.build(name).double(), tiny_inputs(family.build(name))
    inputs = {key: value.double() if value.is_floating_point() else value for key, value in inputs.items()}
    original = watched(untouched, family, inputs)
    for alpha in ALPHAS:
        model, stack = driven(name, "identity", alpha)
        weight, bias = absorbed(Block(model.double(), stack, family.index))
        slope = model.get_submodule(family.path(family.activation)).alpha.item()
        expected = (1 - slope) * original["last.out"] + slope * (original["first.in"] @ weight + bias)
        torch.testing.assert_close(watched(model, family, inputs)["last.out"], expected, rtol=0, atol=1e-11)


def halves(model, path, name):
    """W_gate and W_up, which phi3 and glm keep in one."""
    family = FAMILIES[name]
    if family.first.endswith("gate_up_proj"):
        return matrix_of(model.get_submodule(path)).split(family.width, dim=1)
    up = path.replace("gate_proj", "up_proj")
    return matrix_of(model.get_submodule(path)), matrix_of(model.get_submodule(up))


def gated_map(up, constant, down):
    """W_up · diag(c) · W_down, unit by unit."""
    weight = torch.zeros(len(up), down.shape[1], dtype=torch.float64)
    for unit in range(len(constant)):
        weight += constant[unit].double() * torch.outer(up[:, unit].double(), down[unit].double())
    return weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@families(GATED)
def test_a_constant_gate_leaves_a_product_of_three(name, dtype):
    family = FAMILIES[name]
    model, stack = driven(name, "constant", 0.3, in_dtype(family.build(name), dtype))
    gate = model.get_submodule(family.path(family.activation))
    assert gate.constant.dtype == dtype
    _, up = halves(model, family.path(family.first), name)
    weight, bias = absorbed(Block(model, stack, family.index))
    expected = gated_map(up, gate.constant, matrix_of(model.get_submodule(family.path(family.last))))
    torch.testing.assert_close(weight, expected, rtol=0, atol=1e-12)
    assert not bias.any()
    assert gate.alpha.item() == torch.tensor(0.3, dtype=dtype).item()
    assert next(model.parameters()).dtype == dtype
    assert leftovers(model) == []


@families([name for name in GATED if name != "qwen3_moe"])  # whose experts know no float64
def test_a_gate_goes_straight_to_its_constant(name):
    """(1 − α)·act(g) + α·c: the FFN is (1 − α) times itself plus α times x·W_up·diag(c)·W_down."""
    family, inputs = FAMILIES[name], tiny_inputs(FAMILIES[name].build(name))
    untouched = family.build(name).double()
    original = watched(untouched, family, inputs)
    _, up = halves(untouched, family.path(family.first), name)
    weight = gated_map(up, constants(name), matrix_of(untouched.get_submodule(family.path(family.last))))
    for alpha in ALPHAS:
        model = driven(name, "constant", alpha)[0].double()
        slope = model.get_submodule(family.path(family.activation)).alpha.item()
        expected = (1 - slope) * original["last.out"] + slope * original["first.in"] @ weight
        torch.testing.assert_close(watched(model, family, inputs)["last.out"], expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gates_of_a_t5(dtype):
    model = tiny_seq2seq_model("mt5").to(dtype)
    stack, constant = Anatomy(model).stack("encoder.block"), noise(96, seed=11)
    carry_out(replace_activation(Block(model, stack, 1), "constant", 0.5, constant), model, Undo())
    ffn = stack.blocks[1].layer[1].DenseReluDense
    weight, bias = absorbed(Block(model, stack, 1))
    expected = gated_map(matrix_of(ffn.wi_1), ffn.act.constant, matrix_of(ffn.wo))
    torch.testing.assert_close(weight, expected, rtol=0, atol=1e-12)
    assert not bias.any()


def dense(**settings):
    torch.manual_seed(0)
    fields = {"input_size": 6, "hidden_size": 8, "intermediate_size": 20, "num_hidden_layers": 3, "num_labels": 2}
    model = DenseForClassification(DenseConfig(**fields | {"residual": True} | settings)).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    return model


def test_biases_of_gates():
    """b = b_up·diag(c)·W_down + b_down; that of the gate itself is gone with it."""
    model = dense(gated=True, hidden_act="silu")
    stack, constant = Anatomy(model).stack(), noise(20, seed=11)
    carry_out(replace_activation(Block(model, stack, 1), "constant", 0.5, constant), model, Undo())
    ffn = model.layers[1].mlp
    weight, bias = absorbed(Block(model, stack, 1))
    expected = ffn.down_proj.bias.double().detach()
    for unit in range(20):
        written = ffn.down_proj.weight[:, unit].double()
        expected = expected + ffn.up_proj.bias[unit].double() * constant[unit].double() * written
    torch.testing.assert_close(bias, expected.detach(), rtol=0, atol=1e-12)
    torch.testing.assert_close(weight, gated_map(ffn.up_proj.weight.T, constant, ffn.down_proj.weight.T).detach())


def test_a_plain_ffn_driven_to_a_constant_forgets_what_it_reads():
    """W = 0, b = c·W₂ + b₂: on request an activation goes to its mean, and the FFN to its mean output."""
    model = dense(hidden_act="gelu")
    stack, constant = Anatomy(model).stack(), noise(20, seed=11)
    carry_out(replace_activation(Block(model, stack, 1), "constant", 1.0, constant), model, Undo())
    down = model.layers[1].mlp.down_proj
    weight, bias = absorbed(Block(model, stack, 1))
    assert not weight.any()
    expected = (constant[None].double() @ down.weight.double().T + down.bias.double())[0].detach()
    torch.testing.assert_close(bias, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("blend", ["identity", "leaky"])
def test_a_linear_gate_collapses_into_nothing(blend):
    """It is still multiplied with another linear map, so no affine map is what is left."""
    model, stack = driven("llama", blend, 1.0)
    before = Trace.of(model)
    with pytest.raises(UnsupportedModelError, match=r"the FFN of block 1 of model\.layers is not linear"):
        absorbed(Block(model, stack, 1))
    assert before.difference(model) is None


# --- rank -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", "t5", "bert", "llama"])
@pytest.mark.parametrize("rank", [1, 7, 40])
def test_no_map_of_the_rank_is_nearer(name, rank):
    family = FAMILIES[name]
    model, stack = driven(name, "constant" if name in GATED else "identity", 1.0)
    weight, bias = absorbed(Block(model, stack, family.index))
    tensors = list(product(Block(model, stack, family.index), rank).tensors.items())
    conv = isinstance(model.get_submodule(family.path(family.last)), Conv1D)
    matrices = [tensor if conv else tensor.T for path, tensor in tensors if path.endswith("weight")]
    biases = {path: tensor for path, tensor in tensors if path.endswith("bias") and tensor.any()}
    assert [tuple(matrix.shape) for matrix in matrices] == [(64, rank), (rank, 64)]
    low = matrices[0].double() @ matrices[1].double()
    error = (weight - low).norm()
    assert error == pytest.approx(torch.linalg.svdvals(weight)[rank:].norm().item(), rel=1e-5)  # Eckart and Young
    generator = torch.Generator().manual_seed(3)
    for _ in range(20):
        basis = torch.linalg.qr(torch.randn(64, rank, dtype=torch.float64, generator=generator)).Q
        assert (weight - weight @ basis @ basis.T).norm() > error
        nudge = [0.01 * torch.randn(m.shape, dtype=torch.float64, generator=generator) for m in matrices]
        assert (weight - (matrices[0] + nudge[0]) @ (matrices[1] + nudge[1])).norm() > error
    if bias.any():
        ((path, kept),) = biases.items()
        assert path.rpartition(".")[0] == tensors[-1][0].rpartition(".")[0]
        torch.testing.assert_close(kept.double(), bias, rtol=0, atol=1e-6)
    else:
        assert not biases


# --- mean gates -------------------------------------------------------------------------------------------------------

SAMPLES = [[1, 20, 31, 42, 53, 2], [1, 17, 2], [25, 26, 27, 28, 29, 30, 33, 34], [1, 41], [60, 61, 62, 63]]
SPECIAL = {0, 1, 2}


def alone(model, act, counted, **inputs):
    """The sum of an activation over the counted positions of one sample, which nothing pads."""
    seen = []
    with hooked(act.register_forward_hook(lambda _, args, out: seen.append(out))), torch.no_grad():
        model.eval()(**inputs, use_cache=False)
    gates = seen[0].view(len(counted), -1).double()
    total = torch.zeros(gates.shape[-1], dtype=torch.float64)
    for gate, counts in zip(gates, counted, strict=True):
        if counts:
            total += gate
    return total


def special_tokens(config):
    config.bos_token_id, config.eos_token_id, config.pad_token_id = 1, 2, 0


def left_padded(samples, size):
    for start in range(0, len(samples), size):
        part = samples[start : start + size]
        longest = max(map(len, part))
        ids = [[0] * (longest - len(sample)) + sample for sample in part]
        mask = [[0] * (longest - len(sample)) + [1] * len(sample) for sample in part]
        yield {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", ["llama", "phi3", "qwen3_moe"])
def test_mean_gates_are_means_over_real_tokens(name, side):
    family, model = FAMILIES[name], FAMILIES[name].build(name)
    special_tokens(model.config)
    data = prepare([list(s) for s in SAMPLES] if side == "right" else list(left_padded(SAMPLES, 2)), model, None)
    stack = Anatomy(model).stack()
    blocks = [family.index, 2] if name != "qwen3_moe" else [family.index]
    model.train()
    means = mean_gates(model, stack, data, blocks)
    assert model.training
    assert leftovers(model) == []
    for index in blocks:
        act = model.get_submodule(f"{family.stack}.{index}.{family.activation}")
        total, count = torch.zeros(family.width, dtype=torch.float64), 0
        for sample in SAMPLES:
            counted = [token not in SPECIAL for token in sample]
            total += alone(model, act, counted, input_ids=torch.tensor([sample]))
            count += sum(counted)
        assert means[index].dtype == torch.float64
        torch.testing.assert_close(means[index], total / count, rtol=0, atol=2e-6)


@pytest.mark.parametrize("side", ["encoder", "decoder"])
def test_mean_gates_of_an_encoder_decoder(side):
    """Its decoder gets the text one place to the right, and with it what counts."""
    model = tiny_seq2seq_model("mt5").double()
    special_tokens(model.config)
    model.config.decoder_start_token_id = 0
    samples = [sample for sample in SAMPLES if len(sample) > 2]
    stack = Anatomy(model).stack(f"{side}.block")
    means = mean_gates(model, stack, prepare([list(s) for s in samples], model, None), [1])[1]
    act = stack.blocks[1].layer[-1].DenseReluDense.act
    longest, total, count = max(map(len, samples)), torch.zeros(96, dtype=torch.float64), 0
    for sample in samples:
        shifted = [0, *sample][:longest]
        counted = [token not in SPECIAL for token in (sample if side == "encoder" else shifted)]
        ids, decoded = torch.tensor([sample]), torch.tensor([shifted])
        total += alone(model, act, counted, input_ids=ids, decoder_input_ids=decoded)
        count += sum(counted)
    torch.testing.assert_close(means, total / count, rtol=0, atol=1e-12)


def test_gates_that_are_not_finite_are_told():
    model = tiny_model("llama")
    data = prepare([list(s) for s in SAMPLES], model, None)
    with torch.no_grad():
        model.model.layers[2].mlp.gate_proj.weight.fill_(3e38)
    with pytest.raises(CalibrationError, match=r"block model\.layers\.2 gives NaN"):
        mean_gates(model, Anatomy(model).stack(), data, [1, 2])
    assert leftovers(model) == []


def test_a_decoder_that_gets_no_text_has_no_mean():
    """One token a text, and of that only the start comes before it."""
    model = tiny_seq2seq_model("mt5")
    data = prepare([[20], [21]], model, None)
    with pytest.raises(CalibrationError, match=r"decoder\.block"):
        mean_gates(model, Anatomy(model).stack("decoder.block"), data, [0])


# --- which collapse ---------------------------------------------------------------------------------------------------


def with_alphas(alphas, **settings):
    """A dense network with an α for each block; None where its activation is as it was."""
    model = dense(num_hidden_layers=len(alphas), **settings)
    for index, alpha in enumerate(alphas):
        if alpha is not None:
            carry_out(replace_activation(Anatomy(model).block(index), "leaky", alpha), model, Undo())
    return model


def paper(**settings):
    return LayerCollapseConfig(variant="paper", **settings)


def test_the_last_goes_first_and_only_what_is_within():
    model = with_alphas([0.97, 0.5, None, 1.03, 1.06, 1.0])
    plan = plan_for(paper(), CalibrationContext(model))
    assert [step["block"] for step in plan.notes["collapsed"]] == [5, 3, 0]
    assert [step["alpha"] for step in plan.notes["collapsed"]] == pytest.approx([1.0, 1.03, 0.97])
    assert plan.notes["not_collapsed"] == {"1": pytest.approx(0.5), "4": pytest.approx(1.06)}
    assert [edit.output for edit in plan.edits] == [f"layers.{index}.mlp.down_proj" for index in (5, 3, 0)]
    assert {name.split(".")[1] for name in plan.tensors} == {"0", "3", "5"}


def test_the_tolerance_itself_is_too_far():
    model = with_alphas([0.75, 0.765625, 1.25])  # which are exact
    (step,) = plan_for(paper(tolerance=0.25), CalibrationContext(model)).notes["collapsed"]
    assert step["block"] == 1


def test_none_within_names_them_all():
    model = with_alphas([0.1, None, 0.9, 1.2])
    before = Trace.of(model)
    message = r"tolerance 0\.05: block 0 α = 0\.100, block 2 α = 0\.900, block 3 α = 1\.200; train longer"
    with pytest.raises(NotLinearError, match=message):
        plan_by_product(paper(), CalibrationContext(model))
    assert before.difference(model) is None


def test_without_training_there_is_nothing_to_multiply():
    with pytest.raises(ValueError, match=r"this model has none: train it with Trainer.*CompressionCallback"):
        plan_by_product(paper(), CalibrationContext(dense()))


def test_planning_leaves_the_model_alone():
    model, _ = driven("phi3", "constant", 1.0)
    before = Trace.of(model)
    plan_by_product(paper(), CalibrationContext(model))
    assert before.difference(model) is None


@families()
def test_at_one_the_collapse_changes_nothing_and_comes_back_from_files(name, tmp_path):
    family = FAMILIES[name]
    blend = fitting_blend(Anatomy(family.build(name)).parts(*built_place(name)).ffn, nn.ReLU())
    assert blend == ("leaky" if name in PLAIN else "constant")
    model, stack, inputs, reference = built(name)
    apply(replace_activation(Block(model, stack, family.index), blend, 1.0, constants(name)), model)
    blended_output, size = forward(model, inputs), sum(p.numel() for p in model.parameters())
    plan = plan_by_product(paper(stack=family.stack), CalibrationContext(model))
    assert [step["block"] for step in plan.notes["collapsed"]] == [family.index]
    apply(plan, model)
    assert_close(forward(model, inputs), blended_output, reference)
    assert not any(isinstance(module, BlendedActivation) for module in model.modules())
    assert sum(p.numel() for p in model.parameters()) < size
    loaded = type(model).from_pretrained(save(model, tmp_path / "out")).eval()
    assert torch.equal(forward(loaded, inputs), forward(model, inputs))


def built_place(name):
    return Anatomy(FAMILIES[name].build(name)).stack(FAMILIES[name].stack), FAMILIES[name].index


# --- what an activation is driven to ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "blend"),
    [
        ({"hidden_act": "relu"}, "leaky"),
        ({"hidden_act": "gelu"}, "identity"),
        ({"hidden_act": "silu"}, "identity"),
        ({"hidden_act": "relu2"}, "identity"),
        ({"hidden_act": "relu", "gated": True}, "constant"),
        ({"hidden_act": "gelu", "gated": True}, "constant"),
    ],
)
def test_the_fitting_blend(settings, blend):
    model = dense(**settings)
    ffn = Anatomy(model).parts(Anatomy(model).stack(), 0).ffn
    assert fitting_blend(ffn, model.layers[0].mlp.act_fn) == blend


@families(["phi3", "glm"])
def test_a_fused_gate_is_a_gate(name):
    model, stack, _, _ = built(name)
    family = FAMILIES[name]
    ffn = Anatomy(model).parts(stack, family.index).ffn
    assert fitting_blend(ffn, model.get_submodule(family.path(family.activation))) == "constant"


def test_blended_activations_are_found_by_block():
    model = with_alphas([None, 0.5, None, 0.25])
    found = blended(model, Anatomy(model).stack())
    assert {index: module.alpha.item() for index, module in found.items()} == {1: 0.5, 3: 0.25}
    assert found[3] is model.layers[3].mlp.act_fn
