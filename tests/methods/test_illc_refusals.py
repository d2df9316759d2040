"""ILLC where it cannot work: settings that make no sense, data and models that do not fit, and nothing left behind."""

import json
from contextlib import suppress

import pytest
import torch

from hf_compress import DenseConfig, DenseForClassification
from hf_compress.api.compress import compress
from hf_compress.calibration.data import DataOptions
from hf_compress.errors import CalibrationError, PlanError, UnsupportedModelError
from hf_compress.methods.base.settings import CompressionConfig, config_class
from hf_compress.methods.base.units import UnitStatistics
from hf_compress.methods.illc import ILLCConfig
from hf_compress.numerics.ridge import LeastSquares
from tests.helpers.models import leftovers, refusing
from tests.helpers.round_trip import build
from tests.helpers.tiny import tiny_model, tiny_seq2seq_model

IDS = torch.randint(4, 90, (32, 12), generator=torch.Generator().manual_seed(7))
FLOATS = torch.randn(32, 6, generator=torch.Generator().manual_seed(7))
HALF = {"gamma": 0.5}
SIX = (0.0,) * 6


def dense(**fields):
    torch.manual_seed(0)
    sizes = {"input_size": 6, "hidden_size": 8, "intermediate_size": 20, "num_hidden_layers": 3, "num_labels": 2}
    return DenseForClassification(DenseConfig(**sizes | fields)).eval()


def refused(model, data, error, message, **settings):
    """It says why, and the model is as it was."""
    with refusing(model, error, message):
        compress(model, ILLCConfig(**settings), data, options=DataOptions(batch_size=8))


# --- settings ---------------------------------------------------------------------------------------------------------


def test_settings_survive_json_and_the_variant_names_the_rest():
    config = ILLCConfig(gamma=0.5, variant="paper", example=(1, 2.5), kernel_width=0.3, iterative=False, seed=4)
    assert CompressionConfig.from_dict(json.loads(config.to_json())) == config
    assert config_class("illc") is ILLCConfig
    assert (config.reduction_name, config.compensation_name) == ("average", "none")
    config = ILLCConfig(width=3)
    assert (config.reduction_name, config.compensation_name) == ("elimination", "ridge")
    config = ILLCConfig(width=3, variant="paper", reduction="random", compensation="bias")
    assert (config.reduction_name, config.compensation_name) == ("random", "bias")


# --- data and models --------------------------------------------------------------------------------------------------


def test_more_units_than_there_are():
    refused(build("Llama"), IDS, ValueError, "width=65 asks for more hidden units than block 0 has, 64", width=65)


@pytest.mark.parametrize("reduction", ["average", "representative"])
def test_too_little_to_tell_units_apart(reduction):
    message = r"12 calibration tokens .* cannot tell 32 clusters of hidden units of the FFN of model\.layers\.0 apart"
    refused(build("Llama"), IDS[:1], CalibrationError, message, gamma=0.5, reduction=reduction)
    message = r"4 calibration tokens .* or raise cluster_tokens"  # one of each batch
    refused(build("Llama"), IDS, CalibrationError, message, gamma=0.5, reduction=reduction, cluster_tokens=4)


@pytest.mark.parametrize("reduction", ["average", "representative"])
def test_samples_that_are_all_the_same(reduction):
    """Their activations are not, to the last bit: matrix products sum up rows in more than one way."""
    message = r"no hidden unit of the FFN of layers\.0 varies over the calibration data: give samples that differ"
    refused(dense(), FLOATS[:1].repeat(32, 1), CalibrationError, message, gamma=0.5, reduction=reduction)
    refused(dense(), torch.zeros(32, 6), CalibrationError, message, gamma=0.5, reduction=reduction)


def test_models_without_hidden_units_that_could_be_merged():
    refused(tiny_model("mamba"), IDS, UnsupportedModelError, "no FFN of .* can be narrowed", gamma=0.5)
    message = r"model\.layers\.0\.mlp\.experts: experts get no bias; take compensation='ridge' or 'none'"
    refused(tiny_model("mixtral"), IDS, UnsupportedModelError, message, gamma=0.5, compensation="bias")
    message = r"model\.layers\.0\.mlp\.experts: the units of experts are kept, not merged; take representative"
    refused(tiny_model("mixtral"), IDS, UnsupportedModelError, message, gamma=0.5, variant="paper")


def test_experts_with_widths_of_their_own_are_done_or_refused():
    """No assertion is to fail."""
    model = tiny_model("mixtral")
    with suppress(UnsupportedModelError):
        compress(model, ILLCConfig(gamma=0.5, allocation="adaptive"), IDS, options=DataOptions(batch_size=8))
    assert leftovers(model) == []


@pytest.mark.parametrize("settings", [{}, {"variant": "paper"}], ids=str)
def test_ffns_that_are_shared(settings):
    """The first block is narrowed by then, and has to be put back."""
    model = build("Llama")
    model.model.layers[2].mlp = model.model.layers[1].mlp
    message = r"model\.layers\.1\.mlp\.down_proj is shared .*model\.layers\.2\.mlp\.down_proj"
    refused(model, IDS, PlanError, message, gamma=0.5, **settings)


def test_plain_refuses_what_the_config_cannot_say():
    """T5 has one width for encoder and decoder."""
    model = tiny_seq2seq_model("t5")
    refused(model, IDS, ValueError, "plain", gamma=0.5, plain=True, stack="decoder.block")


# --- an example -------------------------------------------------------------------------------------------------------


def test_an_example_that_is_no_sample():
    refused(build("Llama"), IDS, ValueError, "models that read vectors", gamma=0.5, example=SIX)
    refused(dense(), FLOATS, ValueError, r"one sample of \[6\] numbers", gamma=0.5, example=SIX[:5])


@pytest.mark.parametrize("settings", [{}, {"variant": "paper"}], ids=str)
def test_an_example_far_from_all_samples(settings):
    example = (1e3,) * 6
    refused(dense(), FLOATS, CalibrationError, "no calibration sample is near", gamma=0.5, example=example, **settings)


@pytest.mark.parametrize("near", [0, 1, 2, 3])
def test_an_example_near_the_samples_of_one_batch_only(near):
    """Whichever batch that is, there is something to solve from."""
    x = FLOATS + 100
    x[8 * near : 8 * near + 8] -= 100
    model = dense()
    compress(model, ILLCConfig(gamma=0.5, example=SIX), x, options=DataOptions(batch_size=8))
    assert model.config.intermediate_size == [10, 10, 10]


def test_statistics_of_held_out_batches_alone():
    """An expert that few tokens come to may get all of them there."""
    fitted, held = LeastSquares(3, 2), LeastSquares(3, 2)
    x, y = FLOATS[:, :3], FLOATS[:, 3:5]
    held.update(x, y)
    fit = UnitStatistics(fitted, held, x).fit(torch.zeros(3, 2), affine=True)
    other = UnitStatistics(held, fitted, x).fit(torch.zeros(3, 2), affine=True)
    torch.testing.assert_close(fit.weight, other.weight)
    assert fit.penalty == other.penalty
