"""LRP where it cannot work: settings that make no sense, data and models that do not fit, and nothing left behind."""

import re

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaMLP

import hf_compress as hfc
from examples.round_trip import build, logits
from hf_compress.anatomy.anatomy import Anatomy
from hf_compress.api.compress import compress
from hf_compress.calibration.data import DataOptions
from hf_compress.errors import CalibrationError, PlanError, UnsupportedModelError
from hf_compress.methods.lrp import LRPConfig, weights
from hf_compress.modules.packed import MixedPrecisionLinear
from hf_compress.modules.sparse import SparseLinear
from hf_compress.storage.save import save
from tests.architectures.changes import Trace
from tests.architectures.tiny import tiny_model
from tests.conftest import leftovers

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
    before = Trace.of(model)
    with pytest.raises(error, match=message):
        compress(model, LRPConfig(**settings), data, options=DataOptions(batch_size=8))
    assert before.difference(model) is None
    assert leftovers(model) == []


# --- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "say what to do: sparsity= to prune, bits= or target_bytes= for mixed precision, or both"),
        ({"granularity": "neuron"}, "say what to do: sparsity= to prune"),
        *(({"sparsity": bad}, "sparsity must lie strictly between 0 and 1 .*; got") for bad in (0, 1, 1.5, -0.1, True)),
        *(({"sparsity": bad}, "sparsity must lie strictly between 0 and 1") for bad in ("0.5", float("nan"))),
        (HALF | {"variant": "magic"}, "variant must be one of default, paper; got 'magic'"),
        (
            HALF | {"granularity": "magic"},
            "granularity must be one of block, head, n:m, neuron, row, weight; got 'magic'",
        ),
        (HALF | {"score": "magic"}, "score must be one of magnitude, random, relevance, signed, wanda; got 'magic'"),
        (HALF | {"scope": "magic"}, "scope must be one of layer, model, row; got 'magic'"),
        (HALF | {"compensation": "magic"}, "compensation must be one of auto, none; got 'magic'"),
        (HALF | {"target": "magic"}, "target must be one of auto, label, predicted; got 'magic'"),
        (HALF | {"composite": "magic"}, "unknown composite 'magic'"),
        (FOUR | {"allocation": "magic"}, "allocation must be one of error, fisher, relevance, uniform; got 'magic'"),
        (FOUR | {"rounding": "magic"}, "rounding must be one of compensated, nearest; got 'magic'"),
        *((HALF | {"tokens": bad}, "tokens must be a whole number of at least 1; got") for bad in (0, -1, 2.5, True)),
        *((FOUR | {"group_size": bad}, "group_size must be a whole number of at least 1") for bad in (0, -8, 8.0, "8")),
        *((FOUR | {"group_size": bad}, f"must be a multiple of 8, .*; got {bad}") for bad in (1, 4, 12, 63)),
        *((HALF | {"seed": bad}, "seed must be a whole number of at least 0; got") for bad in (-1, 0.5, "a")),
        *((HALF | {"temper": bad}, "temper must be a number from 0, .*; got") for bad in (-0.1, 1.1, True, "a", None)),
        (HALF | {"temper": float("nan")}, "temper must be a number from 0, .*; got nan"),
        *(
            ({"granularity": "n:m", "pattern": bad}, r"pattern must be two whole numbers n < m, such as \(2, 4\); got")
            for bad in ((4, 4), (4, 2), (0, 4), (-1, 4), (2,), (1, 2, 4), (2.0, 4), (True, 4), 24, "24", None)
        ),
        (HALF | {"granularity": "n:m"}, r"granularity='n:m' keeps 2 of 4: leave out sparsity=0\.5"),
        (FOUR | {"target_bytes": 1000}, "give bits or target_bytes, not both; got 4 and 1000"),
        *(({"bits": bad}, "bits must be a number from 2 to 16; got") for bad in (1.9, 0, -4, 17, True, "4")),
        ({"bits": float("nan")}, "bits must be a number from 2 to 16; got nan"),
        *(({"target_bytes": bad}, "target_bytes must be a number above 0; got") for bad in (0, -1, True, "1")),
        ({"target_bytes": float("nan")}, "target_bytes must be a number above 0; got nan"),
        (HALF | {"split": (8, 4)}, "split is the paper's: give variant='paper', or bits= for groups of weights"),
        *(
            (PAPER | {"granularity": g}, f"leaves out weights or neurons; got granularity='{g}'")
            for g in ("row", "head")
        ),
        *(
            (PAPER | {"granularity": g}, f"leaves out weights or neurons; got granularity='{g}'")
            for g in ("n:m", "block")
        ),
        *(
            (PAPER | more, r"however much that is, .*leave out sparsity, bits and target_bytes; .*split=\(8, 4\)")
            for more in (HALF, FOUR, {"target_bytes": 9})
        ),
        *(
            (
                PAPER | {"prune": False, "split": bad},
                "split must be two numbers of bits, 2 to 16, the larger first; got",
            )
            for bad in ((4, 8), (8, 8), (8, 1), (17, 4), (8,), (8, 4, 2), (8.0, 4), (True, 2), 84, "84")
        ),
        (PAPER | {"split": (8, 4)}, "split weights are told apart by a mask, .*: prune neurons, or none"),
        (PAPER | {"prune": False}, "prune=False leaves nothing to do without split="),
    ],
)
def test_settings_that_make_no_sense(settings, message):
    with pytest.raises(ValueError, match=message):
        LRPConfig(**settings)


@pytest.mark.parametrize(
    ("settings", "value"),
    [
        ({"sparsity": 7.25}, "7.25"),
        ({"bits": 0.123}, "0.123"),
        ({"target_bytes": -77}, "-77"),
        (HALF | {"temper": 3.5}, "3.5"),
        ({"granularity": "n:m", "pattern": (9, 3)}, "(9, 3)"),
        (PAPER | {"prune": False, "split": (3, 9)}, "(3, 9)"),
        (HALF | {"tokens": -5}, "-5"),
    ],
)
def test_a_message_names_the_value(settings, value):
    with pytest.raises(ValueError, match=re.escape(f"got {value}")):
        LRPConfig(**settings)


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


def test_a_stack_that_there_is_not():
    refused(
        build("Llama"),
        IDS,
        ValueError,
        "no residual stack 'nowhere'; this model has model.layers",
        stack="nowhere",
        **HALF,
    )


# --- data -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [HALF, FOUR | {"group_size": 32}, NEURONS, PAPER, HALF | {"score": "wanda"}, HALF | {"score": "magnitude"}],
    ids=str,
)
def test_no_data(settings):
    """Magnitudes need none, but what makes up for the weights that go does."""
    refused(build("Llama"), None, CalibrationError, "this method needs calibration data", **settings)


def test_no_labels():
    message = "target='label' explains the logit of each sample's label, and the data has none"
    refused(dense(), FLOATS, CalibrationError, message, target="label", **HALF)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(value):
    model = dense()
    with torch.no_grad():
        model.layers[1].mlp.up_proj.weight[0, 0] = value
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj\.weight holds NaN or infinity"):
        compress(model, LRPConfig(sparsity=0.5), FLOATS)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[n].nan_to_num(7.0), after[n].nan_to_num(7.0)) for n in before)
    assert leftovers(model) == []


@pytest.mark.parametrize(
    "settings",
    [HALF, HALF | {"score": "wanda"}, HALF | {"score": "magnitude"}, NEURONS, {"bits": 7, "group_size": 8}],
    ids=str,
)
def test_activations_that_are_not_finite(settings):
    model = dense(residual=True)
    with torch.no_grad():
        model.layers[1].mlp.up_proj.weight.fill_(3e38)
    refused(model, FLOATS, (CalibrationError, ValueError), "NaN or infinit", **settings)


# --- interruptions ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [HALF, HALF | FOUR], ids=str)
def test_an_interruption_leaves_nothing_behind(settings, monkeypatch):
    """In the third of four blocks: two are changed by then."""
    calls = []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) > 15:
            raise KeyboardInterrupt("enough")
        return sparsify_linear(*arguments)

    sparsify_linear = weights.sparsify_linear
    monkeypatch.setattr(weights, "sparsify_linear", interrupted)
    model = build("Llama")
    refused(model, IDS, KeyboardInterrupt, "enough", **settings)
    assert len(calls) == 16
    assert len(Anatomy(model).stack()) == 4
