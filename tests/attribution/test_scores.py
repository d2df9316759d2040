"""Sums of relevances over data against loops over samples, tokens and weights, by plain autograd under the rules."""

import gc
import weakref
from collections import defaultdict

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import hf_compress as hfc
from hf_compress.anatomy.anatomy import Anatomy
from hf_compress.anatomy.parts import is_linear, linear_map
from hf_compress.attribution import scores
from hf_compress.attribution.passes import explaining, logits_of
from hf_compress.attribution.scores import relevance_sums
from hf_compress.attribution.targets import explained_classes
from hf_compress.calibration.capture import hooked
from hf_compress.calibration.data import DataOptions, prepare
from hf_compress.errors import CalibrationError, UnsupportedModelError
from hf_compress.modules.compact import CompactLinear
from tests.helpers.changes import Trace
from tests.helpers.models import leftovers, refusing
from tests.helpers.round_trip import LLAMA, build
from tests.helpers.tiny import randomise

IDS = torch.randint(4, 90, (6, 7), generator=torch.Generator().manual_seed(7))
FLOATS = torch.randn(6, 5, generator=torch.Generator().manual_seed(7))
LABELS = torch.tensor([0, 2, 1, 1, 0, 2])


def make(name, seed=3, **fields):
    """A model in which every parameter matters."""
    if name == "Dense":
        torch.manual_seed(0)
        sizes = {"input_size": 5, "hidden_size": 6, "intermediate_size": 9, "num_labels": 3, "residual": True}
        return hfc.DenseForClassification(hfc.DenseConfig(**sizes | fields)).eval()
    model = build(name)
    randomise(model, seed)
    return model


def data_of(model):
    return {"input_values": FLOATS, "labels": LABELS} if model.main_input_name == "input_values" else IDS


def batches_of(model, batch_size=2, data=None):
    return prepare(data_of(model) if data is None else data, model, None, DataOptions(batch_size=batch_size)).batches


def linears(model):
    return {path: module for path, module in model.named_modules() if is_linear(module)}


def writers(model):
    stack = Anatomy(model).stack()
    found = [(i, path) for i in range(len(stack)) for path in Anatomy(model).parts(stack, i).writers]
    return {f"{stack.path}.{i}.{path}": stack.blocks[i].get_submodule(path) for i, path in found}


def near(found, expected):
    """To the rounding of float32, beside the largest there is."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == torch.float32
        limit = 1e-5 * float(value.abs().max()) + 1e-12
        torch.testing.assert_close(found[name].double(), value.double(), rtol=1e-3, atol=limit)


def gradients_of(model, sample, target, attention):
    """Of one sample: every weight's gradient, and what each writer read with its gradient, by autograd alone."""
    maps, read = linears(model), {}
    hooks = (
        module.register_forward_pre_hook(lambda _, args, name=name: read.update({name: args[0]}))
        for name, module in writers(model).items()
    )
    with explaining(model, attention) as sources, hooked(hooks):
        for module in maps.values():
            module.weight.requires_grad_(True)
        value = explained_classes(model, logits_of(model, sample, sources), sample, target)[0].sum()
        ends = [*(module.weight for module in maps.values()), *read.values()]
        found = torch.autograd.grad(value, ends, allow_unused=True)
    model.requires_grad_(True)
    units = zip(read.values(), found[len(maps) :], strict=True)
    return dict(zip(maps, found, strict=False)), dict(zip(read, units, strict=True))


def by_samples(model, samples, target, attention="attnlrp"):
    """Signed and absolute sums of weights, and of what writers read, from one pass for each sample."""
    sums = signed, absolute, signed_units, absolute_units = [defaultdict(float) for _ in range(4)]
    for sample in samples:
        of_weights, of_units = gradients_of(model, sample, target, attention)
        for name, gradient in of_weights.items():
            module = model.get_submodule(name)
            relevance = torch.zeros_like(module.weight) if gradient is None else module.weight.detach() * gradient
            relevance = (relevance if isinstance(module, torch.nn.Linear) else relevance.T).double()
            signed[name] += relevance
            absolute[name] += relevance.abs()
        for name, (value, gradient) in of_units.items():
            for token in (value.detach() * gradient).flatten(0, -2):
                signed_units[name] += token
                absolute_units[name] += token.abs()
    return sums


@pytest.mark.parametrize(
    ("name", "target", "attention"),
    [
        *(("Dense", "label", "attnlrp"), ("Dense", "predicted", "attnlrp"), ("Dense", 1, "attnlrp")),
        *(("Llama", "label", "attnlrp"), ("Llama", "predicted", "attnlrp"), ("Llama", "label", "cp")),
        ("GPT-2", "label", "attnlrp"),
    ],
)
def test_sums_are_those_of_single_samples(name, target, attention):
    """|R| of a weight is taken of a sample, after its tokens are summed; |R| of a unit of each token.

    Llama's head is tied to its embeddings, which get no gradient under the rules.
    """
    model = make(name)
    watched, outputs = linears(model), writers(model)
    found = relevance_sums(model, batches_of(model), watched, outputs, target, composite=attention)
    signed, absolute, signed_units, absolute_units = by_samples(model, batches_of(model, 1), target, attention)
    for own, slow in ((found.signed, signed), (found.absolute, absolute)):
        left_out = slow.keys() - own.keys()  # nothing comes to queries and keys by CP, nor beside the last token
        assert all(not slow[path].any() for path in left_out)
        near(own, {path: value for path, value in slow.items() if path not in left_out})
    near(found.signed_units, signed_units)
    near(found.absolute_units, absolute_units)
    assert found.samples == 6
    assert len(signed) > 5


def all_near(found, expected):
    for field in ("signed", "absolute", "signed_units", "absolute_units"):
        near(getattr(found, field), getattr(expected, field))
    assert found.samples == 6


@pytest.mark.parametrize("name", ["Dense", "Llama"])
def test_batches_add_up(name):
    model = make(name)
    first, *others = (
        relevance_sums(model, batches_of(model, size), linears(model), writers(model)) for size in (1, 4, 6)
    )
    for other in others:
        all_near(other, first)


def test_tokens_are_summed_before_sizes_are_taken():
    """Or |R| would be larger; and it is no less than |Σ R|."""
    model = make("Llama")
    found = relevance_sums(model, batches_of(model), linears(model))
    for path, absolute in found.absolute.items():
        assert bool((absolute >= found.signed[path].abs() * 0.999).all())
    one = relevance_sums(model, batches_of(model, data=IDS[:1]), linears(model))
    near(one.absolute, {path: value.abs() for path, value in one.signed.items()})


def test_the_relevance_of_weights_is_that_of_relevance():
    model = make("Llama")
    result = hfc.relevance(model, IDS, target="label", weights=True)
    found = relevance_sums(model, batches_of(model), linears(model), writers(model))
    near(found.signed, result.weights)
    units = {path: value.sum(dim=0) for path, value in result.neurons.items()}
    near({path: found.signed_units[path] for path in units}, units)


def test_padding_adds_nothing():
    model = make("Llama")
    padded = {"input_ids": torch.nn.functional.pad(IDS, (0, 3), value=5)}
    padded["attention_mask"] = (torch.arange(10) < 7).long().expand(6, 10)
    plain = relevance_sums(model, batches_of(model), linears(model), writers(model))
    found = relevance_sums(model, batches_of(model, data=padded), linears(model), writers(model))
    all_near(found, plain)


def test_only_what_is_asked_for():
    model = make("Dense")
    some = {path: module for path, module in linears(model).items() if path.startswith("layers.1")}
    full = relevance_sums(model, batches_of(model), linears(model))
    signed = relevance_sums(model, batches_of(model), some, absolute=False)
    absolute = relevance_sums(model, batches_of(model), some, signed=False)
    assert signed.absolute == absolute.signed == signed.signed_units == absolute.absolute_units == {}
    near(signed.signed, {path: full.signed[path] for path in some})
    near(absolute.absolute, {path: full.absolute[path] for path in some})


def test_slopes_are_without_the_weight():
    model = make("Dense")
    weights = {path: linear_map(module).T.detach().clone() for path, module in linears(model).items()}
    found = relevance_sums(model, batches_of(model), linears(model), signed=False)
    slopes = found.slopes(weights)
    for path, slope in slopes.items():
        torch.testing.assert_close(slope * weights[path].abs(), found.absolute[path])
    with torch.no_grad():
        model.layers[0].mlp.up_proj.weight[0, 0] = 0
        weights["layers.0.mlp.up_proj"][0, 0] = 0
    slopes = relevance_sums(model, batches_of(model), linears(model), signed=False).slopes(weights)
    assert float(slopes["layers.0.mlp.up_proj"][0, 0]) == 0
    assert all(bool(torch.isfinite(slope).all()) for slope in slopes.values())


@pytest.mark.parametrize("name", ["Llama", "GPT-2", "BERT", "ViT"])
def test_cp_gives_every_linear_map_its_sums(name):
    """Queries and keys get none, and so 0; whoever divides by weights finds them all the same."""
    model = make(name)
    pixels = torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    batches = batches_of(model, data=pixels if name == "ViT" else IDS)
    target = "label" if name in ("Llama", "GPT-2") else "predicted"
    path = Anatomy(model).stack().path
    own = {p: m for p, m in linears(model).items() if p.startswith(f"{path}.")}
    found = relevance_sums(model, batches, own, target=target, composite="cp")
    slopes = found.slopes({p: linear_map(module).T.detach() for p, module in own.items()})
    assert slopes.keys() == own.keys()
    last = [word for word in ("q_proj", "k_proj", "query", "key") if any(p.endswith(word) for p in own)]
    for p, slope in slopes.items():
        assert bool(slope.any()) != p.endswith(tuple(last) or ("none",))


def test_half_precision_is_summed_in_single():
    """By less than its own steps off."""
    model, half = make("Dense"), make("Dense").bfloat16()
    full = relevance_sums(model, batches_of(model), linears(model))
    found = relevance_sums(half, batches_of(half), linears(half))
    for path, value in full.absolute.items():
        assert found.absolute[path].dtype == torch.float32
        assert float((found.absolute[path] - value).abs().max()) < 0.05 * float(value.max())


def test_a_gated_ffn_as_wide_as_the_stream():
    """All three of its matrices then have one shape; the one that reads the product is none of the factors."""
    model = make("Dense", gated=True, hidden_act="silu", use_bias=False, intermediate_size=6)
    result = hfc.relevance(model, FLOATS)
    torch.testing.assert_close(result.inputs["input_values"].sum(dim=1), result.explained, rtol=1e-3, atol=1e-4)


def test_llama_as_wide_as_its_stream():
    """As a narrowed one may be, when weights are scored after neurons went."""
    model = LlamaForCausalLM(LlamaConfig(**LLAMA | {"intermediate_size": LLAMA["hidden_size"]})).eval()
    randomise(model, 3)
    assert relevance_sums(model, batches_of(model), linears(model)).samples == 6


def test_nothing_is_left_behind():
    model = make("Llama").train()
    before = Trace.of(model)
    relevance_sums(model, batches_of(model), linears(model), writers(model))
    assert before.difference(model) is None
    assert leftovers(model) == []
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("name", ["Dense", "Llama"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(name, value):
    model = make(name)
    with torch.no_grad():
        next(m for p, m in linears(model).items() if p.endswith("1.mlp.down_proj")).weight[0, 0] = value
    before = {path: tensor.clone() for path, tensor in model.state_dict().items()}
    with pytest.raises(CalibrationError, match="NaN or infinit"):
        relevance_sums(model, batches_of(model), linears(model))
    assert all(torch.equal(before[p].nan_to_num(7.0), t.nan_to_num(7.0)) for p, t in model.state_dict().items())
    assert leftovers(model) == []


@pytest.mark.parametrize("signed", [True, False])
def test_relevances_that_are_not_finite(signed):
    """The outputs are, and what is explained; the gradient of an early weight is not."""
    model = make("Dense", residual=False, use_bias=False, num_hidden_layers=2)
    with torch.no_grad():
        model.embedding.weight *= 1e-38
        model.layers[0].mlp.down_proj.weight *= 1e25
        model.layers[1].mlp.down_proj.weight *= 1e25
        model.classifier.weight *= 1e-12
    batches = batches_of(model)
    with torch.no_grad():
        assert bool(torch.isfinite(model(FLOATS).logits).all())
    with refusing(
        model, CalibrationError, "the relevances of embedding hold NaN or infinity: load the model in float32"
    ):
        relevance_sums(model, batches, {"embedding": model.embedding}, signed=signed, absolute=not signed)


@pytest.mark.parametrize(
    ("build", "data", "target", "error", "message"),
    [
        (lambda: make("Dense"), FLOATS, "label", CalibrationError, "target='label' .* and the data has none"),
        (lambda: make("Dense"), None, 3, ValueError, "target must be 0 to 2; got 3 to 3"),
        (lambda: make("Llama").model, IDS, "label", UnsupportedModelError, "no logits of .*: load it with a head"),
    ],
)
def test_what_cannot_be_explained_leaves_nothing_behind(build, data, target, error, message):
    model = build()
    with refusing(model, error, message):
        relevance_sums(model, batches_of(model, data=data), linears(model), writers(model), target)


def test_no_data_is_no_relevance():
    found = relevance_sums(make("Dense"), [], {})
    assert (found.samples, found.signed, found.absolute) == (0, {}, {})


def test_nothing_of_a_pass_is_kept():
    """A hook on a tensor that held the tensor would keep it, and the sums, for good."""
    model, read = make("Llama"), []
    maps, ends = linears(model), writers(model)
    for module in (*maps.values(), *ends.values()):
        module.register_forward_pre_hook(lambda module, args: read.append(weakref.ref(args[0])))
    relevance_sums(model, batches_of(model), maps, ends)
    gc.collect()
    assert read
    assert all(tensor() is None for tensor in read)


@pytest.mark.parametrize("settings", [{"sparsity": 0.5}, {"bits": 5, "group_size": 16}])
def test_what_is_compressed_is_explained_as_a_dense_model_with_its_weights(settings):
    """Where FFNs are not gated: those the rules know by the kind of their projections."""
    model, dense = make("GPT-2"), make("GPT-2")
    hfc.compress(model, hfc.LRPConfig(**settings), IDS)
    for path, module in model.named_modules():
        if isinstance(module, CompactLinear):
            dense.get_submodule(path).weight.data = module.unpacked().T.contiguous()
            dense.get_submodule(path).bias.data = module.bias.data
    found, expected = hfc.relevance(model, IDS), hfc.relevance(dense, IDS)
    torch.testing.assert_close(found.tokens, expected.tokens, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("chunk", [1, 17, 2**19])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sizes_are_added_some_outputs_at_a_time(dtype, chunk, monkeypatch):
    """To what is there, in float32, whatever the dtype of the products."""
    generator = torch.Generator().manual_seed(0)
    parts = [tuple(torch.randn(n, 5 + m, generator=generator).to(dtype) for m in (0, 4)) for n in (3, 1, 6)]
    monkeypatch.setattr(scores, "_CHUNK", chunk)
    total = torch.ones(9, 5)
    scores._add_sizes(total, parts)
    expected = 1 + sum(torch.einsum("to,ti->oi", g.double(), x.double()).abs() for x, g in parts)
    torch.testing.assert_close(total.double(), expected, rtol=1e-5 if dtype == torch.float32 else 0.02, atol=1e-5)
