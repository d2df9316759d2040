"""LRP where it cannot work: settings that make no sense, data and models that do not fit, and nothing left behind."""

import re

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaMLP

import hf_compress as hfc
from hf_compress.api.compress import compress
from hf_compress.calibration.data import DataOptions
from hf_compress.errors import CalibrationError, PlanError, UnsupportedModelError
from hf_compress.methods.lrp import LRPConfig
from hf_compress.modules.packed import MixedPrecisionLinear
from hf_compress.modules.sparse import SparseLinear
from hf_compress.storage.save import save
from tests.helpers.models import refusing
from tests.helpers.round_trip import build, logits
from tests.helpers.tiny import tiny_model

IDS = torch.randint(8, 90, (32, 12), generator=torch.Generator().manual_seed(7))
FLOATS = torch.randn(32, 6, generator=torch.Generator().manual_seed(7))
HALF, FOUR, PAPER = {"sparsity": 0.5}, {"bits": 4}, {"variant": "paper"}
NEURONS = {"granularity": "neuron", "sparsity": 0.5}


def dense(**fields):
    torch.manual_seed(0)
    sizes = {"input_size": 6, "hidden_size": 8, "intermediate_size": 20, "num_hidden_layers": 3, "num_labels": 2}
    return hfc.DenseForClassification(hfc.DenseConfig(**sizes | fields)).eval()


def refused(model, data, error, message, **settings):
    """It says why, and the model is as it was."""
    with refusing(model, error, message):
        compress(model, LRPConfig(**settings), data, options=DataOptions(batch_size=8))


# --- sizes that do not fit the model ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bits": 2.5, "group_size": 32}, r"bits=2\.5 leaves 1\.50 bits for each weight, where 2 are the fewest"),
        ({"bits": 4, "group_size": 8}, r"bits=4 leaves 0\.00 bits .* ask for more, or change group_size="),
        ({"target_bytes": 100, "group_size": 32}, r"target_bytes=100 leaves 0\.00 bits .*ask for more"),
        ({"bits": 2, "sparsity": 0.5}, r"bits=2 leaves 1\.\d\d bits .*2 are the fewest"),
        ({"bits": 2, "group_size": 32, "granularity": "neuron", "sparsity": 0.25}, r"2 are the fewest"),
    ],
    ids=str,
)
def test_bits_that_do_not_suffice(settings, message):
    """The steps and classes of groups are counted, and the mask. Neurons are out by then, and have to come back."""
    refused(build("Llama"), IDS, ValueError, message, **settings)


def test_groups_that_rows_do_not_fill():
    """Rows of 32 in groups of 64 are stored half empty. The message names the bits asked for; groups of 32 do it."""
    refused(build("Llama"), IDS, ValueError, "bits=4 leaves .* change group_size=", bits=4, group_size=64)
    compress(build("Llama"), LRPConfig(bits=4, group_size=32), IDS, options=DataOptions(batch_size=8))


def test_a_layer_that_nothing_would_be_left_of():
    model = build("Llama")
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight *= 1e-6
    message = r"no weight of model\.layers\.2\.mlp\.down_proj would be left: lower sparsity, or compare within layers"
    refused(model, IDS, ValueError, message, sparsity=0.5, scope="model", score="magnitude")
    message = r"no unit of block 2 of model\.layers would be left: lower sparsity, or change scope"
    refused(model, IDS, ValueError, message, scope="model", score="magnitude", **NEURONS)


def test_a_layer_without_relevance():
    """The paper's variant would leave nothing of it; its weights have no halves either."""
    model = build("Llama")
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight.zero_()
    name = r"model\.layers\.2\.mlp\.(gate|up|down)_proj"
    refused(model, IDS, ValueError, f"no weight of {name} would be left", **PAPER)
    refused(model, IDS, ValueError, r"no unit of block 2 of model\.layers", granularity="neuron", **PAPER)
    message = f"the scores of {name} have no median to split them by"
    refused(model, IDS, ValueError, message, prune=False, split=(8, 4), **PAPER)


def test_inputs_that_do_not_come_in_groups_of_m():
    message = r"model\.layers\.0\.self_attn\.q_proj reads 32 inputs, .* groups of 5: change pattern="
    refused(build("Llama"), IDS, ValueError, message, granularity="n:m", pattern=(2, 5))


def test_all_blocks():
    refused(build("Llama"), IDS, ValueError, "takes 4 of 4 blocks and leaves none", granularity="block", sparsity=0.95)


def test_blocks_and_bits_are_two_compressions():
    message = r"leave blocks out in a compress\(\) of its own, and then give bits="
    refused(build("Llama"), IDS, ValueError, message, granularity="block", sparsity=0.5, bits=4)


# --- models -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings", [NEURONS, HALF | {"granularity": "block"}, PAPER | {"granularity": "neuron"}], ids=str
)
def test_experts_have_no_units_of_their_own(settings):
    message = r"block 0 of model\.layers has experts, .* take ILLCConfig, or granularity='head'"
    refused(build("Mixtral"), IDS, UnsupportedModelError, message, **settings)


def test_heads_in_one_matrix():
    message = r"the heads of transformer\.h\.0 cannot be told apart"
    refused(build("GPT-2"), IDS, UnsupportedModelError, message, granularity="head", sparsity=0.5)


def test_models_without_heads():
    message = "the blocks of layers have no heads that could be left out"
    refused(dense(), FLOATS, UnsupportedModelError, message, granularity="head", sparsity=0.5)


@pytest.mark.parametrize("family", ["mamba2", "bloom", "codegen"])
def test_models_that_there_are_no_rules_for(family):
    """What needs no relevance works for them."""
    message = "relevance is lost or made up|relevance has no rule"
    for settings in (HALF, FOUR | {"group_size": 32, "allocation": "relevance"}, PAPER):
        refused(tiny_model(family), IDS, UnsupportedModelError, message, **settings)
    for score in ("magnitude", "wanda", "random"):
        model = tiny_model(family)
        compress(model, LRPConfig(sparsity=0.5, score=score), IDS, options=DataOptions(batch_size=8))
        found = [module for module in model.modules() if isinstance(module, SparseLinear)]
        assert found
        assert all(module.kept == module.in_features * module.out_features // 2 for module in found)


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
    refused(model, IDS, UnsupportedModelError, r"model\.layers\.1\.mlp does not run", **settings)


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
    compress(model, LRPConfig(bits=5, group_size=32), IDS, options=DataOptions(batch_size=8))
    assert re.search(rf"{len(before)} linear maps stay dense, .*{left} among them: they are {why}", caplog.text)
    assert before
    assert all(model.get_submodule(path) is module for path, module in before.items())
    assert all(torch.equal(module.weight, weights[path]) for path, module in before.items())
    assert any(isinstance(module, MixedPrecisionLinear) for module in model.modules())
    again = type(model).from_pretrained(save(model, tmp_path / "out"))
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("settings", [HALF, FOUR | {"group_size": 32}, NEURONS], ids=str)
def test_what_is_packed_already(settings, tmp_path):
    """In memory, and as it comes from files."""
    model = compress(build("Llama"), LRPConfig(sparsity=0.5, bits=4), IDS, options=DataOptions(batch_size=8))
    loaded = type(model).from_pretrained(save(model, tmp_path / "out"))
    for packed in (model, loaded):
        expected = logits(packed)
        refused(
            packed, IDS, UnsupportedModelError, r"the blocks of model\.layers have no (linear maps|neurons)", **settings
        )
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
    refused(model, IDS, PlanError, r"model\.layers\.[12]\.mlp\.\w+ is shared .* and cannot be changed", **settings)


# --- data -------------------------------------------------------------------------------------------------------------


def test_no_labels():
    message = "target='label' explains the logit of each sample's label, and the data has none"
    refused(dense(), FLOATS, CalibrationError, message, target="label", **HALF)
