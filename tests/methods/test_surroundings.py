"""Gradients are taken where a caller has switched them off, and what collects streams sees spliced bottlenecks."""

import copy

import pytest
import torch

import hf_compress as hfc
from tests.helpers.language import tiny_llama
from tests.helpers.tiny import tiny_base_model

IDS = torch.randint(4, 60, (24, 24), generator=torch.Generator().manual_seed(0))
ADAPTIVE = {"layers": [1], "updates": 2, "warmup_steps": 1, "decay_steps": 1}
DROPPED = hfc.DropBlocksConfig(num_blocks=1)
PACKED = hfc.LRPConfig(bits=7, group_size=8)


def test_bottlenecks_spliced_for_a_while_are_collected_too():
    model = tiny_llama(4)
    model(IDS, output_hidden_states=True)
    hfc.compress(model, hfc.AdaptiveCompressConfig(variant="pca", **ADAPTIVE), IDS)
    found = hfc.fit(model, hfc.AdaptiveCompressConfig(variant="pca", layers=[1], retention_final=0.5), IDS)
    with torch.no_grad(), found.spliced(model):
        spliced = model(IDS, output_hidden_states=True).hidden_states
    with torch.no_grad():
        once = model(IDS, output_hidden_states=True).hidden_states
        expected = found.places[1].module(once[2])
    torch.testing.assert_close(spliced[2], expected)
    assert not torch.allclose(once[2], expected, atol=1e-3)


def test_a_model_of_inference_mode_is_refused_with_the_remedy():
    with torch.inference_mode():
        model = tiny_llama(2)
    for refused in (
        lambda: hfc.compress(model, DROPPED, IDS),
        lambda: hfc.make_plan(model, DROPPED, IDS),
        lambda: hfc.heal(model, tiny_llama(2), IDS),
        lambda: hfc.relevance(model, IDS[:2]),
    ):
        with pytest.raises(hfc.UnsupportedModelError, match=r"made under torch\.inference_mode.* copy\.deepcopy"):
            refused()
    hfc.compress(copy.deepcopy(model), DROPPED, IDS)(IDS).logits.sum().backward()


@pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
def test_what_takes_gradients_takes_them_where_they_are_off(off):
    model, teacher = tiny_llama(3), tiny_llama(3)
    before = model.lm_head.weight.clone()
    with off():
        ids = IDS.clone()
        hfc.heal(model, teacher, ids, lora=None)
        hfc.fit(model, hfc.AdaptiveCompressConfig(variant="linear", **ADAPTIVE), ids)
        hfc.relevance(model, ids[:2])
        hfc.analyze(model, ids)
        plan = hfc.make_plan(model, PACKED, ids)
        dense = hfc.models.from_sequential(
            torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.ReLU(), torch.nn.Linear(5, 2))
        )
        assert not torch.is_grad_enabled()
    assert not torch.equal(model.lm_head.weight, before)
    assert plan.edits
    dense(torch.randn(3, 4)).logits.sum().backward()
    model(IDS).logits.sum().backward()


def test_the_callers_tensors_get_no_gradient():
    model = tiny_base_model("vit")
    pixels = torch.randn(8, 3, model.config.image_size, model.config.image_size).requires_grad_()
    hfc.compress(model, PACKED, pixels)
    assert pixels.grad is None
