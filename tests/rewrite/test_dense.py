"""Packed and sparse weights written out: the same model, with matrices."""

import pytest
import torch

import hf_compress as hfc
from hf_compress.anatomy.undo import Undo
from hf_compress.errors import UnsupportedModelError
from hf_compress.modules.compact import CompactLinear
from hf_compress.modules.experts import SeparateExperts
from hf_compress.rewrite import dense
from hf_compress.rewrite.dense import write_out
from hf_compress.rewrite.record import recorded
from tests.helpers.changes import Trace, forward
from tests.helpers.linears import lrp, made
from tests.helpers.models import saved_and_loaded
from tests.helpers.tiny import tiny_inputs

SETTINGS = {
    "bits": {"bits": 6, "group_size": 16},
    "sparse": {"sparsity": 0.5},
    "both": {"sparsity": 0.25, "bits": 7, "group_size": 16},
}


@pytest.mark.parametrize("kind", SETTINGS)
@pytest.mark.parametrize("name", ["Llama", "GPT-2", "Mixtral"])
def test_it_gives_what_it_gave_and_is_a_plain_checkpoint(name, kind, tmp_path):
    model = made(name)
    lrp(model, **SETTINGS[kind])
    inputs = tiny_inputs(model)
    before = forward(model, inputs)
    paths = write_out(model)
    assert paths
    compact = (CompactLinear, SeparateExperts)
    assert not any(isinstance(module, compact) for module in model.modules())
    assert recorded(model.config) == ()
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if name == "Mixtral" else {"rtol": 0, "atol": 0}  # experts sum otherwise
    torch.testing.assert_close(forward(model, inputs), before, **tolerance)
    assert type(saved_and_loaded(model, tmp_path, inputs)) is type(model)
    assert write_out(model) == []


def test_other_changes_stay(make_llama, calibration, tmp_path):
    """A model with FFNs of several widths, and then fewer bits, keeps the widths."""
    model = make_llama(layers=3)
    hfc.compress(model, hfc.ILLCConfig(ratio=0.3, allocation="adaptive"), calibration)
    left = recorded(model.config)
    hfc.compress(model, hfc.LRPConfig(bits=6, group_size=16), calibration)
    inputs = tiny_inputs(model)
    before = forward(model, inputs)
    write_out(model)
    assert recorded(model.config) == left
    torch.testing.assert_close(forward(model, inputs), before, rtol=0, atol=0)
    saved_and_loaded(model, tmp_path, inputs)


def test_a_model_without_such_weights_stays_as_it_is(make_llama):
    model = make_llama(layers=2)
    trace = Trace.of(model)
    assert write_out(model) == []
    assert trace.difference(model) is None


def test_after_an_error_it_is_as_it_was(monkeypatch):
    model = made("Llama")
    lrp(model, **SETTINGS["bits"])
    trace = Trace.of(model)

    def fail(model, edits, undo: Undo):
        raise RuntimeError("no")

    monkeypatch.setattr(dense, "record", fail)
    with pytest.raises(RuntimeError, match="no"):
        write_out(model)
    assert trace.difference(model) is None


def test_an_offloaded_model_is_refused(monkeypatch):
    monkeypatch.setattr(dense, "is_offloaded", lambda model: True)
    with pytest.raises(UnsupportedModelError, match="the model is offloaded: load it whole"):
        write_out(made("Llama"))
