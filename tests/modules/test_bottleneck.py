"""The bottleneck against its formulas, number by number, and in a model that is copied, loaded and trained."""

import copy

import pytest
import torch
from torch import nn

from hf_compress.anatomy.anatomy import Anatomy
from hf_compress.anatomy.undo import Undo
from hf_compress.modules.bottleneck import BOTTLENECK, Bottleneck, Form, through_bottleneck
from hf_compress.rewrite.apply import carry_out
from hf_compress.rewrite.builders import insert_bottleneck
from tests.helpers.plans import linear_bottleneck
from tests.helpers.tiny import tiny_inputs, tiny_model

HIDDEN, FEATURES = 6, 3
NORMS = ("kept", "lost", "none")


def bottleneck(skip=0.1, norm="kept", hidden=HIDDEN, width=FEATURES):
    """One with random tensors, in float64."""
    module = Bottleneck(hidden, width, Form(skip, norm)).double()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return module


def stream(*shape, seed=4):
    return 1.5 + 2 * torch.randn(*shape, dtype=torch.double, generator=torch.Generator().manual_seed(seed))


def squeezed(h, module):
    """The docstring's formulas for one position: `h` is a list of numbers."""
    hidden, width = module.encoder.shape
    encoder, decoder, s = module.encoder.tolist(), module.decoder.tolist(), module.form.skip
    mean = sum(h) / hidden
    spread = (sum((x - mean) ** 2 for x in h) / hidden + 1e-5) ** 0.5
    if module.form.norm == "none":
        mean, spread = 0.0, 1.0
    n = [(x - mean) / spread for x in h]
    b = [0.0] * hidden if module.form.norm == "lost" else module.center.tolist()
    u = [sum((n[i] - b[i]) * encoder[i][j] for i in range(hidden)) for j in range(width)]
    out = []
    for i in range(hidden):
        back = sum(u[j] * decoder[j][i] for j in range(width))
        if module.form.norm != "lost":
            out.append(spread * (back + (1 - s) * b[i]) + (1 - s) * mean + s * h[i])
        else:
            out.append(back + s * h[i])
    return out


@pytest.mark.parametrize("skip", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("norm", NORMS)
def test_every_position_follows_the_formulas(norm, skip):
    module, h = bottleneck(skip, norm), stream(2, 4, HIDDEN)
    got = module(h)
    assert got.shape == h.shape
    for row in range(2):
        for position in range(4):
            assert got[row, position].tolist() == pytest.approx(squeezed(h[row, position].tolist(), module), abs=1e-9)


@pytest.mark.parametrize("shape", [(HIDDEN,), (1, HIDDEN), (2, 1, 3, HIDDEN)])
def test_any_leading_dimensions(shape):
    module, h = bottleneck(), stream(*shape)
    got = module(h)
    assert got.shape == shape
    assert got.reshape(-1, HIDDEN)[-1].tolist() == pytest.approx(squeezed(h.reshape(-1, HIDDEN)[-1].tolist(), module))


@pytest.mark.parametrize("skip", [0.0, 0.1, 0.7, 1.0])
def test_with_all_features_and_an_orthogonal_encoder_nothing_is_lost(skip):
    module, h = bottleneck(skip, hidden=8, width=8), stream(3, 5, 8)
    with torch.no_grad():
        module.encoder.copy_(torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(5))).Q)
        module.decoder.copy_((1 - skip) * module.encoder.T)
    torch.testing.assert_close(module(h), h, rtol=1e-5, atol=1e-5)


def test_the_papers_form_gives_the_normed_stream_back():
    module, h = bottleneck(0.0, "lost", hidden=8, width=8), stream(3, 5, 8)
    with torch.no_grad():
        module.encoder.copy_(torch.eye(8))
        module.decoder.copy_(torch.eye(8))
    torch.testing.assert_close(module(h), torch.nn.functional.layer_norm(h, (8,), eps=1e-5))


def test_a_stream_without_any_spread_stays_finite():
    got = bottleneck()(torch.full((2, HIDDEN), 3.0, dtype=torch.double))
    assert got.isfinite().all()


@pytest.mark.parametrize("norm", NORMS)
def test_encoding_and_decoding_are_the_two_halves(norm):
    module, h = bottleneck(norm=norm), stream(2, HIDDEN)
    features, context = module.encode(h)
    assert features.shape == (2, FEATURES)
    assert [tuple(part.shape) for part in context] == [(2, HIDDEN), (2, 1), (2, 1)]
    assert torch.equal(module.decode(features, context), module(h))


@pytest.mark.parametrize("norm", NORMS)
def test_the_gradient_reaches_the_inputs_and_every_tensor(norm):
    module, h = bottleneck(norm=norm), stream(2, HIDDEN).requires_grad_()
    parameters = dict(module.named_parameters())

    def run(h, *values):
        return torch.func.functional_call(module, dict(zip(parameters, values, strict=True)), (h,))

    assert torch.autograd.gradcheck(run, (h, *parameters.values()))


def test_the_papers_form_has_no_center():
    assert set(bottleneck(norm="kept").state_dict()) == {"encoder", "decoder", "center"}
    assert set(bottleneck(norm="lost").state_dict()) == {"encoder", "decoder"}


# --- behind a block ---------------------------------------------------------------------------------------------------


def after(module, output):
    """What becomes of a block's output."""
    block = nn.Module()
    block.add_module(BOTTLENECK, module)
    return through_bottleneck(block, (), output)


@pytest.mark.parametrize("kind", [tuple, list])
def test_after_a_block_that_returns_more_the_rest_is_left_alone(kind):
    module, h, weights, cache = bottleneck(), stream(2, HIDDEN), stream(2, 2), object()
    given = kind([h, weights, cache])
    out = after(module, given)
    assert type(out) is kind
    assert torch.equal(out[0], module(h))
    assert out[1] is weights
    assert out[2] is cache
    assert given[0] is h


# --- in a model -------------------------------------------------------------------------------------------------------


def model_with_one(model_type="llama", width=8):
    """A tiny model with a bottleneck behind its second block, and that bottleneck."""
    model = tiny_model(model_type)
    generator = torch.Generator().manual_seed(6)
    encoder, decoder = torch.randn(64, width, generator=generator), torch.randn(width, 64, generator=generator)
    block = Anatomy(model).block(1)
    carry_out(insert_bottleneck(block, linear_bottleneck(encoder / 8, decoder / 8)), model, Undo())
    return model, bottleneck_of(model)


def bottleneck_of(model):
    return Anatomy(model).stack().blocks[1].get_submodule(BOTTLENECK)


@torch.no_grad()
def logits(model):
    return model(**tiny_inputs(model)).logits


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "opt"])
def test_a_deep_copy_uses_its_own(model_type):
    model, original = model_with_one(model_type)
    twin = copy.deepcopy(model)
    before = logits(model)
    assert torch.equal(logits(twin), before)
    own = bottleneck_of(twin)
    assert own is not original
    with torch.no_grad():
        own.decoder.mul_(2)
    assert torch.equal(logits(model), before), "the copy's bottleneck works in the original"
    assert not torch.allclose(logits(twin), before, atol=1e-3), "the copy goes through the original's bottleneck"


def test_its_tensors_are_the_models_own():
    model, _ = model_with_one()
    names = [name for name in model.state_dict() if BOTTLENECK in name]
    assert names == [f"model.layers.1.{BOTTLENECK}.{name}" for name in ("encoder", "decoder", "center")]
    assert set(names) <= {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def gradients(model):
    """Of every parameter, for the loss on the tiny inputs."""
    inputs = tiny_inputs(model)
    model.train()
    model.zero_grad()
    model(**inputs, labels=inputs["input_ids"], use_cache=False).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant):
    model, _ = model_with_one()
    plain = gradients(model)
    calls = []
    model.model.layers[1].mlp.register_forward_pre_hook(lambda *_: calls.append(None))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    checkpointed = gradients(model)
    assert len(calls) == 2, "the block runs once forward and once again on the way back"
    assert plain[f"model.layers.1.{BOTTLENECK}.decoder"].abs().max() > 0
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, msg=name)
