"""ILLC where it cannot work: settings that make no sense, data and models that do not fit, and nothing left behind."""

from contextlib import suppress

import pytest
import torch

from hf_compress.errors import CalibrationError, PlanError, UnsupportedModelError
from hf_compress.methods.base.ridge import RidgeFit
from hf_compress.methods.base.units import UnitStatistics
from hf_compress.methods.illc import ILLCConfig
from hf_compress.numerics.ridge import LeastSquares
from tests.helpers.linears import FLOATS, IDS, dense, illc
from tests.helpers.models import leftovers, refusing
from tests.helpers.round_trip import build
from tests.helpers.tiny import tiny_model, tiny_seq2seq_model

SIX = (0.0,) * 6


def refused(model, error, message, data=None, **settings):
    """It says why, and the model is as it was."""
    with refusing(model, error, message):
        illc(model, data, **{"gamma": 0.5} | settings)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"variant": "paper", "gamma": 0.5}, ("average", "none")),
        ({"width": 3}, ("elimination", "ridge")),
        ({"width": 3, "variant": "paper", "reduction": "random", "compensation": "bias"}, ("random", "bias")),
    ],
)
def test_the_variant_names_the_rest(settings, expected):
    config = ILLCConfig(**settings)
    assert (config.reduction_name, config.compensation_name) == expected


def test_more_units_than_there_are():
    message = "width=65 asks for more hidden units than block 0 has, 64"
    refused(build("Llama"), ValueError, message, gamma=None, width=65)


@pytest.mark.parametrize("reduction", ["average", "representative"])
def test_too_little_to_tell_units_apart(reduction):
    message = r"12 calibration tokens .* cannot tell 32 clusters of hidden units of the FFN of model\.layers\.0 apart"
    refused(build("Llama"), CalibrationError, message, IDS[:1], reduction=reduction)
    message = r"4 calibration tokens .* or raise cluster_tokens"  # one of each batch
    refused(build("Llama"), CalibrationError, message, reduction=reduction, cluster_tokens=4)


@pytest.mark.parametrize("reduction", ["average", "representative"])
def test_samples_that_are_all_the_same(reduction):
    """Their activations are not, to the last bit: matrix products sum up rows in more than one way."""
    message = r"no hidden unit of the FFN of layers\.0 varies over the calibration data: give samples that differ"
    refused(dense(use_bias=True), CalibrationError, message, FLOATS[:1].repeat(32, 1), reduction=reduction)
    refused(dense(use_bias=True), CalibrationError, message, torch.zeros(32, 6), reduction=reduction)


def test_models_without_hidden_units_that_could_be_merged():
    refused(tiny_model("mamba"), UnsupportedModelError, "no FFN of .* can be narrowed")
    message = r"model\.layers\.0\.mlp\.experts: experts get no bias; take compensation='ridge' or 'none'"
    refused(tiny_model("mixtral"), UnsupportedModelError, message, compensation="bias")
    message = r"model\.layers\.0\.mlp\.experts: the units of experts are kept, not merged; take representative"
    refused(tiny_model("mixtral"), UnsupportedModelError, message, variant="paper")


def test_experts_with_widths_of_their_own_are_done_or_refused():
    """No assertion is to fail."""
    model = tiny_model("mixtral")
    with suppress(UnsupportedModelError):
        illc(model, gamma=0.5, allocation="adaptive")
    assert leftovers(model) == []


@pytest.mark.parametrize("settings", [{}, {"variant": "paper"}], ids=str)
def test_ffns_that_are_shared(settings):
    """The first block is narrowed by then, and has to be put back."""
    model = build("Llama")
    model.model.layers[2].mlp = model.model.layers[1].mlp
    message = r"model\.layers\.1\.mlp\.down_proj is shared .*model\.layers\.2\.mlp\.down_proj"
    refused(model, PlanError, message, **settings)


def test_plain_refuses_what_the_config_cannot_say():
    """T5 has one width for encoder and decoder."""
    model = tiny_seq2seq_model("t5")
    refused(model, ValueError, "plain", plain=True, stack="decoder.block")


def test_an_example_that_is_no_sample():
    refused(build("Llama"), ValueError, "models that read vectors", example=SIX)
    refused(dense(use_bias=True), ValueError, r"one sample of \[6\] numbers", example=SIX[:5])


@pytest.mark.parametrize("settings", [{}, {"variant": "paper"}], ids=str)
def test_an_example_far_from_all_samples(settings):
    example = (1e3,) * 6
    refused(dense(use_bias=True), CalibrationError, "no calibration sample is near", example=example, **settings)


@pytest.mark.parametrize("near", [0, 1, 2, 3])
def test_an_example_near_the_samples_of_one_batch_only(near):
    """Whichever batch that is, there is something to solve from."""
    x = FLOATS[:32] + 100
    x[8 * near : 8 * near + 8] -= 100
    model = illc(dense(use_bias=True), x, gamma=0.5, example=SIX)
    assert model.config.intermediate_size == [10, 10, 10]


def test_statistics_of_held_out_batches_alone():
    """An expert that few tokens come to may get all of them there."""
    x, y = FLOATS[:, :3], FLOATS[:, 3:5]

    def fitted(held: bool) -> RidgeFit:
        statistics = UnitStatistics(LeastSquares(3, 2), LeastSquares(3, 2), x)
        statistics.update(x, y, held=held)
        return statistics.fit(torch.zeros(3, 2), affine=True)

    fit, other = fitted(True), fitted(False)
    torch.testing.assert_close(fit.weight, other.weight)
    assert fit.penalty == other.penalty
