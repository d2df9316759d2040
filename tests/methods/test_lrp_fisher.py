"""Bits by Fisher information: held against log-probabilities written out, and against the divergences they foretell."""

from bisect import bisect_right
from itertools import accumulate

import pytest
import torch
from torch import nn
from torch.distributions import Bernoulli, Categorical, Independent, Normal, kl_divergence
from transformers import AutoModelForSequenceClassification

from hf_compress.anatomy.anatomy import Anatomy
from hf_compress.anatomy.parts import is_linear, linear_map
from hf_compress.api.compress import compress
from hf_compress.calibration import objective
from hf_compress.calibration.data import Batch, Calibration, DataOptions
from hf_compress.calibration.sweep import Streams
from hf_compress.errors import CalibrationError, UnsupportedModelError
from hf_compress.methods.base.context import CalibrationContext
from hf_compress.methods.lrp import LRPConfig
from hf_compress.methods.lrp.error_costs import error_costs
from hf_compress.methods.lrp.fisher import energies
from hf_compress.methods.lrp.linears import Subject, block_linears
from hf_compress.modules.packed import MixedPrecisionLinear
from hf_compress.numerics.factor import Factor
from tests.helpers.changes import Trace, forward
from tests.helpers.linears import FLOATS, data_of, dense, made, stored
from tests.helpers.models import in_dtype, leftovers, watching
from tests.helpers.round_trip import build
from tests.helpers.tiny import tiny_base_model, tiny_model, tiny_of, tiny_seq2seq_model

IDS = torch.randint(8, 90, (12, 10), generator=torch.Generator().manual_seed(7))
MASK = torch.arange(10) < torch.tensor([10, 3, 7, 10, 1, 5, 8, 2, 10, 6, 4, 9])[:, None]
DENSE = {"GELU": {"hidden_act": "gelu", "residual": True, "num_labels": 4, "use_bias": True}, "ReLU": {}}


def batch_of(model, real=None):
    """All there is in one batch; of texts, those of the lengths in `MASK`."""
    if "input_ids" not in model.main_input_name:
        return Batch({model.main_input_name: data_of(model)}, None)
    real = MASK if real is None else real
    return Batch({"input_ids": IDS, "attention_mask": real.long()}, real)


def found(model, *batches, seed=0, stack=None):
    stack = Anatomy(model).stack(stack)
    return energies(Streams(model, stack, batches or [batch_of(model)]), block_linears(stack), seed)


def linear_logits(model, batch):
    """What the model gives with a graph behind it, and what each linear map of its blocks read and wrote."""
    with watching(block_linears(Anatomy(model).stack())) as seen:
        output = model(**batch.inputs)
    for _, wrote in seen.values():
        wrote.retain_grad()
    return getattr(output, "logits", output[0]), seen


def rows_of(values, batch):
    """Those of real tokens, or of all samples."""
    return values.flatten(0, -2) if batch.real is None else values[batch.real]


def oracle(model, batch, distribution, seed):
    """Rows, Σ x_j² and Σ g_i² by path, of autograd through the log-probability of what is drawn."""
    value, seen = linear_logits(model, batch)
    law, draw = distribution(value)
    with torch.no_grad():
        drawn = draw(torch.Generator().manual_seed(seed)).view(law.batch_shape + law.event_shape)
    logs = law.log_prob(drawn)
    (logs * batch.real if logs.ndim == 2 else logs).sum().backward()
    model.zero_grad()
    read = {path: rows_of(x, batch).square().sum(dim=0) for path, (x, _) in seen.items()}
    gradients = {path: rows_of(y.grad, batch).square().sum(dim=0) for path, (_, y) in seen.items()}
    return read, gradients, len(rows_of(next(iter(seen.values()))[0], batch))


def categorical(value):
    """Of each row the first class with which probabilities come to more than a number drawn."""

    def draw(generator):
        rows = value.flatten(0, -2).softmax(-1).tolist()
        chances = torch.rand(len(rows), 1, generator=generator)[:, 0].tolist()
        sums = [list(accumulate(row)) for row in rows]
        return torch.tensor([min(bisect_right(s, c), len(s) - 1) for s, c in zip(sums, chances, strict=True)])

    return Categorical(logits=value), draw


def bernoulli(value):
    return Independent(Bernoulli(logits=value), 1), lambda g: torch.bernoulli(value.sigmoid(), generator=g)


def gaussian(value):
    return Independent(Normal(value, 1.0), 1), lambda g: value + torch.randn(value.shape, generator=g)


def assert_same(energies, read, gradients, rows):
    assert energies.read.keys() == energies.gradients.keys() == read.keys()
    for path, gradient in gradients.items():
        assert energies.rows[path] == rows
        torch.testing.assert_close(energies.read[path], read[path], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(energies.gradients[path], gradient, rtol=1e-3, atol=1e-5 * float(gradient.max()))
        torch.testing.assert_close(energies.of_outputs(path), energies.gradients[path] / rows, rtol=1e-6, atol=0)


def several(model):
    model.config.problem_type = "multi_label_classification"
    return model


MODELS = {
    "dense": (lambda: dense(**DENSE["GELU"]), categorical),
    "dense ReLU": (dense, categorical),
    "dense, several labels": (lambda: several(dense(**DENSE["GELU"])), bernoulli),
    "dense regression": (lambda: dense(**DENSE["GELU"] | {"num_labels": 1}), gaussian),
    **{name: (lambda name=name: build(name), categorical) for name in ("Llama", "GPT-2", "BERT", "ViT")},
    "BERT, several labels": (lambda: several(build("BERT")), bernoulli),
    "BERT base": (lambda: tiny_base_model("bert"), gaussian),
    "Llama base": (lambda: tiny_base_model("llama"), gaussian),
    "Falcon": (lambda: tiny_model("falcon"), categorical),
}


# --- energies ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_energies_are_those_of_log_probabilities_written_out(name):
    """With the same draws. Padding has no part."""
    make, distribution = MODELS[name]
    model = make()
    for seed in (0, 3):
        expected = oracle(model, batch_of(model), distribution, seed)
        assert all(float(gradient.max()) > 0 for gradient in expected[1].values())
        assert_same(found(model, seed=seed), *expected)


@pytest.mark.parametrize("name", DENSE)
def test_energies_are_the_mean_over_all_outcomes(name):
    """Of few samples, each drawn for many times over, against the sum over classes of p g²."""
    model, x, times = dense(**DENSE[name]), FLOATS[:3], 4000
    expected = {}
    for c in range(model.config.num_labels):
        value, seen = linear_logits(model, Batch({"input_values": x}, None))
        p = value.detach().softmax(-1)[:, c]
        value.log_softmax(-1)[:, c].sum().backward()
        for path, (_, out) in seen.items():
            expected[path] = expected.get(path, 0) + (p[:, None] * out.grad.flatten(1, -2)[:, 0].square()).mean(dim=0)
    model.zero_grad()
    energy = found(model, Batch({"input_values": x.repeat(times, 1)}, None))
    for path, mean in expected.items():
        torch.testing.assert_close(energy.of_outputs(path), mean, rtol=0.05, atol=0.02 * float(mean.max()))


def test_batches_add_up_and_draw_anew(monkeypatch):
    """Also of texts one by one, without padding, or with it on the left; where the draw hangs on nothing but p."""
    model = build("Llama")
    monkeypatch.setattr(torch, "rand", lambda *shape, **_: torch.full(shape, 0.5))
    whole = found(model)
    alone = [Batch({"input_ids": ids[mask][None]}, mask[mask][None]) for ids, mask in zip(IDS, MASK, strict=True)]
    rolled = torch.stack([ids.roll(10 - int(mask.sum())) for ids, mask in zip(IDS, MASK, strict=True)])
    left = Batch({"input_ids": rolled, "attention_mask": MASK.flip(1).long()}, MASK.flip(1))
    for other in (found(model, *alone), found(model, left)):
        assert_same(other, whole.read, whole.gradients, int(MASK.sum()))


def test_seeds():
    """One seed, one result; another, another; and a second batch is drawn for anew."""
    model = build("Llama")
    first, again, other = found(model), found(model), found(model, seed=1)
    twice = found(model, batch_of(model), batch_of(model))
    for path, gradient in first.gradients.items():
        assert torch.equal(gradient, again.gradients[path])
        assert not torch.equal(gradient, other.gradients[path])
        assert torch.equal(first.read[path], other.read[path])
        assert not torch.allclose(twice.gradients[path], 2 * gradient, rtol=1e-3, atol=0)


@pytest.mark.parametrize("name", ["Llama", "BERT"])
def test_bfloat16_gives_float32(name, monkeypatch):
    monkeypatch.setattr(objective, "class_at", lambda p, chances: torch.arange(len(p))[:, None] % p.shape[1])
    model = build(name)
    exact, rough = found(model), found(in_dtype(model, torch.bfloat16))
    for path, gradient in exact.gradients.items():
        for one, two in ((gradient, rough.gradients[path]), (exact.read[path], rough.read[path])):
            assert two.dtype == torch.float32
            assert float((one - two).norm()) < 0.1 * float(one.norm())


class Unused(nn.Module):
    """An FFN with a map that is never used, and one that nothing hangs on."""

    def __init__(self, mlp):
        super().__init__()
        self.mlp, self.never, self.in_vain = mlp, nn.Linear(8, 4), nn.Linear(8, 4)

    def forward(self, stream):
        self.in_vain(stream)
        return self.mlp(stream)


def test_maps_without_a_part_in_the_outputs():
    model, plain = dense(), found(dense())
    model.layers[1].mlp = Unused(model.layers[1].mlp)
    energy = found(model)
    assert energy.rows["layers.1.mlp.in_vain"] == len(FLOATS)
    assert not energy.of_outputs("layers.1.mlp.in_vain").any()
    assert torch.equal(energy.gradients["layers.0.mlp.up_proj"], plain.gradients["layers.0.mlp.up_proj"])
    for compensated in (False, True):
        costs = cost(model, compensated)
        for name in ("never", "in_vain"):
            assert torch.equal(costs[f"layers.1.mlp.{name}"], torch.zeros(4, 8))
        assert costs["layers.1.mlp.mlp.up_proj"].any()


def test_outputs_are_drawn_as_often_as_they_are_likely():
    """None that has no chance, and the last one at the very end."""
    chances = torch.arange(4000)[:, None] / 4000
    probabilities = torch.tensor([0.0, 0.1, 0.2, 0.0, 0.7, 0.0])
    counts = torch.bincount(objective.class_at(probabilities.expand(4000, -1), chances)[:, 0], minlength=6)
    torch.testing.assert_close(counts / 4000, probabilities, atol=1e-3, rtol=0)
    almost = torch.full((6, 1), 1 - 2**-24)
    assert objective.class_at(torch.eye(6), almost)[:, 0].tolist() == list(range(6))


def test_logits_are_taken_in_parts(monkeypatch):
    model = build("Llama")
    whole = found(model)
    monkeypatch.setattr(objective, "_ROWS", 3)
    for path, gradient in found(model).gradients.items():
        torch.testing.assert_close(gradient, whole.gradients[path])


# --- the state of the model -------------------------------------------------------------------------------------------


class Root(nn.Module):
    """Finite, but for its slope."""

    def forward(self, x):
        return (0 * x).sqrt() + x


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("name", ["Llama", "Dense"])
def test_the_model_is_as_it_was(name, fails):
    """With frozen parameters, gradients that wait for a step, and some modules training."""
    model = made(name)
    blocks = Anatomy(model).stack().blocks
    blocks[1].requires_grad_(False)
    blocks[2].train()
    waiting = next(blocks[0].parameters())
    waiting.grad = torch.ones_like(waiting)
    if fails:
        blocks[2].mlp.act_fn = Root()
    trace, modes = Trace.of(model), {m: m.training for m in model.modules()}
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    if fails:
        assert torch.isfinite(forward(model, {model.main_input_name: data_of(model)})).all()
        with pytest.raises(CalibrationError, match=r"gradients at .*layers\.\d.* hold NaN or infinity: load"):
            found(model)
    else:
        assert all(g.any() for g in found(model).gradients.values())
    assert trace.difference(model) is None
    assert {m: m.training for m in model.modules()} == modes
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert [p for p in model.parameters() if p.grad is not None and p is not waiting] == []
    assert bool((waiting.grad == 1).all())
    assert leftovers(model) == []
    assert torch.is_grad_enabled()


# --- what an error costs ----------------------------------------------------------------------------------------------


def cost(model, compensated=False, *batches, **settings):
    context, stack = CalibrationContext(model, Calibration(list(batches) or [batch_of(model)])), Anatomy(model).stack()
    config = LRPConfig(bits=5, rounding="compensated" if compensated else "nearest", **settings)
    parts = error_costs(Subject(config, context, stack, block_linears(stack)), slopes={}, kept={})
    return {path: costs(path) for paths, costs in parts for path in paths}


@pytest.mark.parametrize("name", ["Llama", "GPT-2", "ViT", "Dense"])
def test_worth_is_a_product(name):
    """Of the output's energy, and of the input's, or what later inputs leave of it; in the weights' shape."""
    model = made(name)
    batch, energy = batch_of(model), found(model)
    _, seen = linear_logits(model, batch)
    for compensated in (False, True):
        costs = cost(model, compensated)
        for path, module in block_linears(Anatomy(model).stack()).items():
            rows = rows_of(seen[path][0], batch)
            gram = rows.double().T @ rows.double()
            inputs = Factor.of(gram).unexplained if compensated else rows.square().sum(dim=0)
            expected = torch.outer(energy.of_outputs(path), inputs)
            assert costs[path].shape == linear_map(module).T.shape
            assert costs[path].dtype == torch.float32
            torch.testing.assert_close(costs[path], expected, rtol=2e-3, atol=1e-5 * float(expected.max()))


@pytest.mark.parametrize("kind", ["classes", "labels", "numbers"])
def test_worth_foretells_the_divergence(kind):
    """½ · cost · e² is the sum over samples of KL, nearly, of an error e in one weight."""
    model = dense(**DENSE["GELU"] | {"num_labels": 1 if kind == "numbers" else 4})
    distribution = {"classes": categorical, "labels": bernoulli, "numbers": gaussian}[kind]
    if kind == "labels":
        several(model)
    x, e, pairs = torch.randn(1500, 6, generator=torch.Generator().manual_seed(1)), 0.02, []
    costs = cost(model, False, Batch({"input_values": x}, None))
    before, generator = distribution(model(x).logits.detach().double())[0], torch.Generator().manual_seed(2)
    for path, module in block_linears(Anatomy(model).stack()).items():
        for place in torch.randint(module.weight.numel(), (25,), generator=generator).tolist():
            flat = module.weight.detach().view(-1)
            old = flat[place].item()
            flat[place] += e
            real = kl_divergence(before, distribution(model(x).logits.detach().double())[0]).sum()
            pairs.append((0.5 * float(costs[path].flatten()[place]) * e * e, float(real)))
            flat[place] = old
    told, real = torch.tensor(pairs).double().unbind(1)
    ratios = told / real
    assert 0.5 < float(ratios.median()) < 2
    assert float(((ratios > 1 / 4) & (ratios < 4)).double().mean()) > 0.95
    ranks = torch.stack([values.argsort().argsort().double() for values in (told, real)])
    assert float(torch.corrcoef(ranks)[0, 1]) > 0.9


# --- whole models -----------------------------------------------------------------------------------------------------

FAMILIES = {
    "bloom": (lambda: tiny_model("bloom"), None),
    "falcon": (lambda: tiny_model("falcon"), None),
    "roberta classifier": (lambda: tiny_of(AutoModelForSequenceClassification, "roberta", 0), None),
    "whisper": (lambda: tiny_seq2seq_model("whisper"), None),
    "t5 encoder": (lambda: tiny_seq2seq_model("t5"), "encoder.block"),
    "t5 decoder": (lambda: tiny_seq2seq_model("t5"), "decoder.block"),
    "BERT base": (lambda: tiny_base_model("bert"), None),
    **{name: (lambda name=name: build(name), None) for name in ("BERT", "ViT", "GPT-2")},
}


@pytest.mark.parametrize("name", FAMILIES)
def test_families(name):
    """Also those that there are no rules of relevance for; and more than the fewest bits are given, unevenly."""
    make, stack = FAMILIES[name]
    model, data = make(), IDS
    if model.main_input_name == "input_features":
        config = model.config
        data = {"input_features": torch.randn(4, config.num_mel_bins, 2 * config.max_source_positions)}
    elif model.main_input_name == "pixel_values":
        data = data_of(model)
    settings = {"bits": 5, "group_size": 32, "stack": stack}
    if name in ("bloom", "falcon", "roberta classifier", "whisper"):
        with pytest.raises(UnsupportedModelError, match="relevance"):
            compress(model, LRPConfig(allocation="relevance", **settings), data, options=DataOptions(batch_size=4))
    compress(model, LRPConfig(**settings), data, options=DataOptions(batch_size=4))
    bits = torch.cat([m.bits.flatten().long() for m in stored(model, MixedPrecisionLinear).values()])
    assert len(bits.unique()) > 3
    assert 3.5 < float(bits.double().mean()) <= 4.25, "16 for a step, 8 for a zero and 8 for the bits go off"


# --- where there is nothing to go by ----------------------------------------------------------------------------------


def test_models_that_gradients_do_not_come_through():
    """Reversible layers run without recording. All worths would be 0, and all groups get the fewest bits."""
    settings = {"bits": 5, "group_size": 32, "rounding": "nearest"}
    with pytest.raises(UnsupportedModelError, match=r"do not come through the model .* take allocation='error'"):
        compress(tiny_model("reformer"), LRPConfig(**settings), IDS)
    compress(tiny_model("reformer"), LRPConfig(**settings, allocation="error"), IDS)


@pytest.mark.parametrize(
    ("rounding", "told"),
    [("compensated", "block layers.1 gives NaN or infinite activations"), ("nearest", "gives NaN or infinite outputs")],
)
def test_outputs_that_are_not_finite(rounding, told):
    model = dense(residual=True)
    model.layers[1].mlp.up_proj.weight.data.fill_(3e38)
    with pytest.raises(CalibrationError, match=told):
        compress(model, LRPConfig(bits=9, group_size=8, rounding=rounding), FLOATS)


def test_experts_that_some_batches_do_not_reach():
    model = tiny_seq2seq_model("switch_transformers")
    stack = next(stack.path for stack in Anatomy(model).stacks if "encoder" in stack.path)
    ids = torch.randint(8, 90, (24, 4), generator=torch.Generator().manual_seed(3))
    config = LRPConfig(bits=5, group_size=32, stack=stack, tokens=12)
    experts = [
        path for path, m in model.named_modules() if path.startswith(stack) and "experts." in path and is_linear(m)
    ]
    assert len(experts) > 16
    compress(model, config, ids, options=DataOptions(batch_size=1))
    assert all(isinstance(model.get_submodule(path), MixedPrecisionLinear) for path in experts)


def test_maps_that_gradients_do_not_reach_are_told_of(caplog):
    model = dense(residual=True)
    model.layers[0].register_forward_hook(lambda module, args, output: output.detach())
    compress(model, LRPConfig(bits=7, group_size=8), FLOATS)
    assert "no gradient reaches layers.0.mlp.up_proj and 1 other linear maps, which get the fewest bits" in caplog.text
