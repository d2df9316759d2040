"""LRP where it cannot work: settings that make no sense, data and models that do not fit, and nothing left behind."""

import re

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaMLP

from hf_compress.errors import CalibrationError, PlanError, UnsupportedModelError
from hf_compress.modules.packed import MixedPrecisionLinear
from tests.helpers.linears import dense, lrp, made, masks, stored
from tests.helpers.models import assert_reloads, refusing
from tests.helpers.round_trip import build, logits
from tests.helpers.tiny import tiny_model

HALF, FOUR, PAPER = {"sparsity": 0.5}, {"bits": 4}, {"variant": "paper"}
NEURONS = {"granularity": "neuron", "sparsity": 0.5}


def refused(model, error, message, data=None, **settings):
    """It says why, and the model is as it was."""
    with refusing(model, error, message):
        lrp(model, data, **settings)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        # the steps and classes of groups are counted, and the mask; neurons are out by then, and have to come back
        ("Llama", {"bits": 2.5, "group_size": 32}, r"bits=2\.5 leaves 1\.50 bits for each weight, where 2 are the few"),
        ("Llama", {"bits": 4, "group_size": 8}, r"bits=4 leaves 0\.00 bits .* ask for more, or change group_size="),
        ("Llama", {"target_bytes": 100, "group_size": 32}, r"target_bytes=100 leaves 0\.00 bits .*ask for more"),
        ("Llama", {"bits": 2, "sparsity": 0.5}, r"bits=2 leaves 1\.\d\d bits .*2 are the fewest"),
        ("Llama", {"bits": 2, "group_size": 32, "granularity": "neuron", "sparsity": 0.25}, r"2 are the fewest"),
        # rows of 32 in groups of 64 are stored half empty, and the message names the bits asked for
        ("Llama", {"bits": 4, "group_size": 64}, "bits=4 leaves .* change group_size="),
        (
            "Llama",
            {"granularity": "n:m", "pattern": (2, 5)},
            r"model\.layers\.3\.self_attn\.q_proj reads 32 inputs, .* groups of 5: change pattern=",
        ),
        ("Llama", {"granularity": "block", "sparsity": 0.95}, "takes 4 of 4 blocks and leaves none"),
        (
            "Llama",
            HALF | {"granularity": "block", "bits": 4},
            r"leave blocks out in a compress\(\) of its own, and then give bits=",
        ),
        *(
            ("Mixtral", settings, r"block 0 of model\.layers has experts, .* take ILLCConfig, or granularity='head'")
            for settings in (NEURONS, HALF | {"granularity": "block"}, PAPER | {"granularity": "neuron"})
        ),
        ("GPT-2", HALF | {"granularity": "head"}, r"the heads of transformer\.h\.0 cannot be told apart"),
        ("Dense", HALF | {"granularity": "head"}, "the blocks of layers have no heads that could be left out"),
    ],
    ids=str,
)
def test_what_does_not_fit_the_model(name, settings, message):
    refused(made(name), ValueError if name == "Llama" else UnsupportedModelError, message, **settings)


def test_a_layer_that_nothing_would_be_left_of():
    model = build("Llama")
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight *= 1e-6
    message = r"no weight of model\.layers\.2\.mlp\.down_proj would be left: lower sparsity, or compare within layers"
    refused(model, ValueError, message, sparsity=0.5, scope="model", score="magnitude")
    message = r"no unit of block 2 of model\.layers would be left: lower sparsity, or change scope"
    refused(model, ValueError, message, scope="model", score="magnitude", **NEURONS)


def test_a_layer_without_relevance():
    """The paper's variant would leave nothing of it; its weights have no halves either."""
    model = build("Llama")
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight.zero_()
    name = r"model\.layers\.2\.mlp\.(gate|up|down)_proj"
    refused(model, ValueError, f"no weight of {name} would be left", **PAPER)
    refused(model, ValueError, r"no unit of block 2 of model\.layers", granularity="neuron", **PAPER)
    message = f"the scores of {name} have no median to split them by"
    refused(model, ValueError, message, prune=False, split=(8, 4), **PAPER)


@pytest.mark.parametrize("family", ["mamba2", "bloom", "codegen"])
def test_models_that_there_are_no_rules_for(family):
    """What needs no relevance works for them."""
    message = "relevance is lost or made up|relevance has no rule"
    for settings in (HALF, FOUR | {"group_size": 32, "allocation": "relevance"}, PAPER):
        refused(tiny_model(family), UnsupportedModelError, message, **settings)
    for score in ("magnitude", "wanda", "random"):
        found = masks(lrp(tiny_model(family), sparsity=0.5, score=score))
        assert found
        assert all(int(mask.sum()) == mask.numel() // 2 for mask in found.values())


@pytest.mark.parametrize(
    "settings", [HALF | {"score": "magnitude"}, {"bits": 5, "group_size": 32, "allocation": "error"}]
)
def test_weights_that_another_module_reads(settings):
    """Which is no matrix once it is packed."""

    class Reader(LlamaMLP):
        def forward(self, x):
            assert torch.isfinite(self.up_proj.weight @ x.mT).all()
            return super().forward(x)

    model = build("Llama")
    model.model.layers[1].mlp.__class__ = Reader
    refused(model, UnsupportedModelError, r"model\.layers\.1\.mlp does not run", **settings)


@pytest.mark.parametrize(
    ("name", "left", "why"),
    [
        ("mamba", r"mixer\.dt_proj", "not run"),
        ("phimoe", r"mlp\.router", "something else"),
        ("llama4_text", r"feed_forward\.router", "something else"),
    ],
)
def test_what_runs_otherwise_stays_as_it_is(name, left, why, caplog, tmp_path):
    """Mamba's mixer multiplies by dt_proj's weight itself; the routers' classes are linear maps, but choose experts."""
    model = tiny_model(name)
    before = {path: m for path, m in model.named_modules() if re.search(f"layers.*{left}$", path)}
    weights = {path: m.weight.detach().clone() for path, m in before.items()}
    lrp(model, bits=5, group_size=32)
    assert re.search(rf"{len(before)} linear maps stay dense, .*{left} among them: they are {why}", caplog.text)
    assert before
    assert all(model.get_submodule(path) is module for path, module in before.items())
    assert all(torch.equal(module.weight, weights[path]) for path, module in before.items())
    assert stored(model, MixedPrecisionLinear)
    assert_reloads(model, tmp_path / "out", logits)


@pytest.mark.parametrize("settings", [HALF, FOUR | {"group_size": 32}, NEURONS], ids=str)
def test_what_is_packed_already(settings, tmp_path):
    """In memory, and as it comes from files."""
    model = lrp(build("Llama"), sparsity=0.5, bits=4)
    for packed in (model, assert_reloads(model, tmp_path / "out", logits)):
        expected = logits(packed)
        refused(packed, UnsupportedModelError, r"the blocks of model\.layers have no (linear maps|neurons)", **settings)
        assert torch.equal(logits(packed), expected)


@pytest.mark.parametrize(
    "settings",
    [HALF, FOUR | {"group_size": 32}, NEURONS, PAPER | {"prune": False, "split": (8, 4)}],
    ids=str,
)
def test_maps_that_are_shared(settings):
    """Found out in the second block, when the first is changed already."""
    model = build("Llama")
    model.model.layers[2].mlp = model.model.layers[1].mlp
    refused(model, PlanError, r"model\.layers\.[12]\.mlp\.\w+ is shared .* and cannot be changed", **settings)


def test_no_labels():
    message = "target='label' explains the logit of each sample's label, and the data has none"
    refused(dense(), CalibrationError, message, target="label", **HALF)
