"""A change after a change: what an earlier one has left in another form is told, with what to do; nothing is wrong."""

import copy
from functools import cache

import pytest
import torch

import hf_compress as hfc
from hf_compress.anatomy.anatomy import Block
from hf_compress.calibration.data import DataOptions
from hf_compress.rewrite.builders import heads_of, narrow_ffn
from tests.helpers.language import tiny_llama
from tests.helpers.models import refusing
from tests.helpers.round_trip import build
from tests.helpers.tiny import tiny_model

IDS = torch.randint(4, 60, (32, 12), generator=torch.Generator().manual_seed(7))
OPTIONS = DataOptions(batch_size=8)
FIRST = {
    "packed": hfc.LRPConfig(bits=10, group_size=32, allocation="error"),
    "sparse": hfc.LRPConfig(sparsity=0.5, score="magnitude"),
    "one linear map": hfc.LayerCollapseConfig(num_layers=3),
}
THEN = {
    "ffn": [
        hfc.ILLCConfig(gamma=0.5),
        hfc.LayerCollapseConfig(num_layers=1),
        hfc.LayerCollapseConfig(variant="paper"),
        hfc.LRPConfig(sparsity=0.5, granularity="neuron"),
    ],
    "linear": [
        hfc.ILLCConfig(head_gamma=0.5),
        FIRST["packed"],
        FIRST["sparse"],
        hfc.LRPConfig(sparsity=0.5, granularity="head"),
        hfc.LRPConfig(sparsity=0.5, granularity="block"),
        hfc.MKAConfig(num_merges=1),
        hfc.MKAConfig(num_merges=1, variant="paper"),
    ],
}


@cache
def changed(form):
    return hfc.compress(tiny_llama(3), FIRST[form], IDS, options=OPTIONS)


@pytest.mark.parametrize("config", [*THEN["ffn"], *THEN["linear"]], ids=lambda config: config.method)
@pytest.mark.parametrize("form", FIRST)
def test_what_an_earlier_change_has_taken_is_told(form, config):
    if form == "one linear map" and config in THEN["linear"]:
        return
    model = copy.deepcopy(changed(form))
    with refusing(model, hfc.UnsupportedModelError, rf"has left model\.layers\.\d\S+ {form}; do this before that one"):
        hfc.compress(model, config, IDS, options=OPTIONS)


def test_it_is_told_of_a_model_that_was_loaded_and_by_a_draft(tmp_path):
    hfc.save(changed("packed"), tmp_path / "packed")
    model = type(changed("packed")).from_pretrained(tmp_path / "packed")
    stack = hfc.Anatomy(model).stack()
    for draft in (lambda: narrow_ffn(Block(model, stack, 1), range(2)), lambda: heads_of(Block(model, stack, 1))):
        with pytest.raises(hfc.UnsupportedModelError, match=r"has left model\.layers\.1\S+ packed"):
            draft()


def test_no_other_cause_is_blamed_on_it():
    """Experts are in the way of a linear map whether they are packed or not, and no FFN is missing at its heads."""
    mixture = hfc.compress(build("Mixtral"), FIRST["packed"], IDS, options=OPTIONS)
    with pytest.raises(hfc.UnsupportedModelError, match=r"block 0 has experts$"):
        hfc.compress(mixture, hfc.LayerCollapseConfig(num_layers=1), IDS, options=OPTIONS)
    model = copy.deepcopy(changed("one linear map"))
    hfc.compress(model, hfc.ILLCConfig(head_gamma=0.5), IDS, options=OPTIONS)


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("xglm", hfc.ILLCConfig(head_gamma=0.5), r"model\.layers\.0\.self_attn does not run \(RuntimeError: shape"),
        ("xglm", hfc.LRPConfig(sparsity=0.5, granularity="head"), r"model\.layers\.0\.self_attn does not run"),
        ("mllama", hfc.ILLCConfig(gamma=0.5), r"model\.layers\.\d does not run on the calibration data"),
    ],
    ids=lambda value: value if value in ("xglm", "mllama") else "",
)
def test_a_part_that_does_not_run_as_a_method_tries_it_is_named(name, config, message):
    model = tiny_model(name)
    data = IDS % model.config.get_text_config().vocab_size
    for attempt in (hfc.make_plan, hfc.compress):
        with refusing(model, ValueError, message):
            attempt(model, config, data, options=OPTIONS)


def test_a_part_that_does_not_run_once_it_is_changed_is_refused():
    """An FFN that its block gives the stream besides, as MPT's does."""
    model = tiny_model("mpt")
    data = IDS % model.config.vocab_size
    with refusing(model, hfc.UnsupportedModelError, "does not run after the change: TypeError"):
        hfc.compress(model, hfc.LayerCollapseConfig(ratio=0.5, rank=2), data, options=OPTIONS)


def test_an_error_of_our_own_is_passed_on(monkeypatch):
    """What no module of the model raises is a bug, or a word for whoever called; so is a lack of memory."""
    model = tiny_llama(2)
    for error in (KeyError, ValueError, torch.OutOfMemoryError):

        def fail(*_, error=error):
            raise error("ours")

        monkeypatch.setattr("hf_compress.api.one_method.plan_for", fail)
        with pytest.raises(error, match="ours"):
            hfc.compress(model, hfc.DropBlocksConfig(num_blocks=1, criterion="last"))
    monkeypatch.undo()
    model.model.layers[1].mlp.act_fn.forward = fail
    with pytest.raises(torch.OutOfMemoryError):
        hfc.compress(model, hfc.ILLCConfig(gamma=0.5), IDS, options=OPTIONS)
