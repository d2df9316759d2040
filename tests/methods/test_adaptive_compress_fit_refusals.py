"""AdaptiveCompress: what `hf_compress.fit` refuses or warns of, and how much data it says that it needs."""

import logging
import math
import re
from dataclasses import replace

import pytest
import torch

import hf_compress as hfc
from hf_compress.errors import CalibrationError
from hf_compress.methods.adaptive_compress import AdaptiveCompressConfig
from tests.helpers.fitting import DATA, TRAINED, VARIANTS, config, everything
from tests.helpers.models import leftovers


@pytest.mark.parametrize("variant", TRAINED)
def test_divergence_is_told_and_leaves_finite_weights(model, ids, caplog, variant):
    with caplog.at_level(logging.WARNING, "hf_compress"):
        found = hfc.fit(model, [config(variant, learning_rate=1e6), config("pca")], ids, options=DATA)[0]
    for layer, place in found.places.items():
        assert "diverged" in place.stopped
        assert all(tensor.isfinite().all() for tensor in place.module.state_dict().values())
        assert any(f"block {layer} diverged" in record.getMessage() for record in caplog.records)
    assert not leftovers(model)


def test_what_does_not_diverge_is_not_warned_of(model, ids, caplog):
    found = hfc.fit(model, everything(), ids, options=DATA)
    assert not any(place.stopped for one in found for place in one.places.values())
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def needed_tokens(error):
    return int(re.search(r"need about ([\d,]+) tokens", str(error.value))[1].replace(",", ""))


def ids_of(tokens, width=8):
    generator = torch.Generator().manual_seed(1)
    return torch.randint(4, 64, (math.ceil(tokens / width), width), generator=generator)


@pytest.mark.parametrize("tokens", [48, 32])
@pytest.mark.parametrize("updates", [1, 4])
@pytest.mark.parametrize(
    "settings",
    [
        {"warmup_steps": 10, "decay_steps": 20},
        {"warmup_steps": 0, "decay_steps": 37},
        {"warmup_steps": 37, "decay_steps": 0},
        {"decay_steps": 40},
        {"warmup_steps": 30},
    ],
)
def test_the_tokens_that_a_schedule_is_said_to_need_are_enough(model, settings, updates, tokens):
    small = ids_of(tokens)
    one = AdaptiveCompressConfig(layers=[0], updates=updates, **settings)
    with pytest.raises(CalibrationError, match=f"{tokens} make") as error:
        hfc.fit(model, one, small, options=DATA)
    hfc.fit(model, one, ids_of(needed_tokens(error)), options=DATA)
    with pytest.raises(CalibrationError, match="warm-up"):
        hfc.fit(model, one, ids_of(needed_tokens(error) * 0.7), options=DATA)


@pytest.mark.parametrize("settings", [{"warmup_steps": 10, "decay_steps": 21}, {"decay_steps": 39}])
def test_the_epochs_that_a_schedule_is_said_to_need_are_enough(model, ids, settings):
    one = AdaptiveCompressConfig(layers=[0], updates=2, **settings)
    with pytest.raises(CalibrationError) as error:
        hfc.fit(model, one, ids, options=DATA)
    epochs = int(re.search(r"epochs=(\d+)", str(error.value))[1])
    hfc.fit(model, replace(one, epochs=epochs), ids, options=DATA)
    with pytest.raises(CalibrationError):
        hfc.fit(model, replace(one, epochs=epochs - 1), ids, options=DATA)


@pytest.mark.parametrize("variant", ["pca", "linear", "topk", "batchtopk"])
def test_peers_have_no_schedule_to_come_to_the_end_of(model, ids, variant):
    hfc.fit(model, config(variant, warmup_steps=1000, decay_steps=1000), ids, options=DATA)


@pytest.mark.parametrize("variant", VARIANTS)
def test_fewer_tokens_than_the_stream_is_wide_are_refused(model, variant):
    with pytest.raises(CalibrationError, match=r"15 tokens behind block \d are too few to tell 16 feat.*at least 16"):
        hfc.fit(model, config(variant), torch.arange(5, 20)[None])
    hfc.fit(model, config("pca"), torch.arange(5, 21)[None])
    assert not leftovers(model)


NO_CONFIGS = (None, "default", [], ["default"], 3, {"variant": "paper"}, hfc.MKAConfig(ratio=0.5))


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (config(layers=[5]), ValueError, "block 5.*0 to 4"),
        (config(layers=[0, 7]), ValueError, "block 7.*0 to 4"),
        (AdaptiveCompressConfig(fractions=[0.25, 0.3, 1.0]), ValueError, r"twice.*\[1, 1, 4\]"),
        *((wrong, TypeError, "AdaptiveCompressConfig") for wrong in NO_CONFIGS),
        *(([config(), wrong], TypeError, "AdaptiveCompressConfig") for wrong in NO_CONFIGS),
        *(([config(), other], ValueError, "same") for other in (config(outliers=5.0), config(stack="model.layers"))),
    ],
    ids=str,
)
def test_configs_that_cannot_be_fitted(model, ids, given, error, message):
    with pytest.raises(error, match=message):
        hfc.fit(model, given, ids)


@pytest.mark.parametrize("data", [None, [], 5, torch.tensor([[1, 2, 0]])])
def test_data_without_a_token_is_refused(model, data):
    with pytest.raises(CalibrationError):
        hfc.fit(model, config(), data)
