"""Plans of every kind on models whose weights are on the disk, block by block, and taking them back."""

import gc
import weakref

import pytest
import torch
from torch import nn

from hf_compress.anatomy.anatomy import Anatomy
from hf_compress.anatomy.dispatch import without_values
from hf_compress.anatomy.residency import resident
from hf_compress.anatomy.store import keep_changes_in
from hf_compress.anatomy.undo import Undo
from hf_compress.calibration.data import Batch
from hf_compress.errors import PlanError
from hf_compress.plan.edits import RemoveBlocks
from hf_compress.plan.plan import Plan
from hf_compress.rewrite.apply import carry_out
from hf_compress.rewrite.builders import linear_ffn, split_experts
from hf_compress.rewrite.edits.sealed import Seal
from hf_compress.rewrite.guard import outputs_without
from hf_compress.rewrite.probe import Probe, same_outputs
from hf_compress.rewrite.site import Site
from tests.helpers.disk import in_memory, logits_of, offloaded
from tests.helpers.plans import BLOCK, DOWN, HIDDEN, PLANS, Before, model_for
from tests.helpers.tiny import tiny_inputs

WAYS = {**PLANS, "split": lambda model: split_experts(model, f"{BLOCK}.mlp.experts")}


def models(name, folder):
    """A model in memory, and the same one on the disk."""
    plain = model_for("experts" if name == "split" else name).eval()
    return plain, offloaded(plain, folder)


def plan_on_disk(name, model):
    with resident(model.get_submodule(BLOCK)):
        return WAYS[name](model)


@pytest.mark.parametrize("name", WAYS)
def test_it_becomes_what_it_would_be_in_memory(name, tmp_path):
    plain, model = models(name, tmp_path)
    before = logits_of(plain)
    carry_out(plan_on_disk(name, model), model, Undo())
    carry_out(WAYS[name](plain), plain, Undo())
    assert without_values(model) == in_memory(model) == []
    assert torch.equal(logits_of(model), logits_of(plain))
    assert name == "split" or not torch.equal(logits_of(plain), before)
    assert {name: tensor.shape for name, tensor in model.state_dict().items()} == {
        name: tensor.shape for name, tensor in plain.state_dict().items()
    }
    with resident(model.get_submodule(BLOCK)):
        assert torch.equal(logits_of(model), logits_of(plain))
        for name, tensor in plain.get_submodule(BLOCK).state_dict().items():
            assert torch.equal(model.get_submodule(BLOCK).state_dict()[name], tensor)


@pytest.mark.parametrize("name", WAYS)
def test_it_is_taken_back(name, tmp_path):
    _, model = models(name, tmp_path)
    store, expected, undo = keep_changes_in(model, tmp_path / "changes"), logits_of(model), Undo()
    before = Before.of(model)
    attached = {path: module._hf_hook for path, module in model.named_modules() if hasattr(module, "_hf_hook")}
    carry_out(plan_on_disk(name, model), model, undo)
    assert len([*store.folder.iterdir()]) > 0
    undo.rollback()
    gc.collect()
    before.check(model)
    assert all(model.get_submodule(path)._hf_hook is hook for path, hook in attached.items())
    assert [*store.folder.iterdir()] == []
    assert torch.equal(logits_of(model), expected)


@pytest.mark.parametrize("part", ["cpu", "disk"])
def test_only_the_part_on_the_disk_is_stored(part, tmp_path):
    plain = model_for("narrow").eval()
    outside = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    other = {"cpu": "disk", "disk": "cpu"}[part]
    blocks = {f"model.layers.{index}": part if index == 0 else other for index in range(4)}
    model = offloaded(plain, tmp_path, outside | blocks)
    store, undo, expected = keep_changes_in(model, tmp_path / "changes"), Undo(), logits_of(model)
    carry_out(plan_on_disk("linear", model), model, undo)
    carry_out(WAYS["linear"](plain), plain, Undo())
    assert bool([*store.folder.iterdir()]) == (part == "disk")
    assert all(tensor.is_meta == (part == "disk") for tensor in model.get_submodule(BLOCK).parameters())
    assert torch.equal(logits_of(model), logits_of(plain))
    undo.rollback()
    assert torch.equal(logits_of(model), expected)


def test_blocks_go_and_come_back(tmp_path):
    plain, model = models("narrow", tmp_path)
    expected, undo = logits_of(model), Undo()
    new = torch.full_like(plain.get_parameter(f"{DOWN}.weight"), 0.25)
    plan = Plan((RemoveBlocks("model.layers", (1, 2)),), {f"{DOWN}.weight": new})
    for one, steps in ((plain, Undo()), (model, undo)):
        carry_out(plan, one, steps)
    assert in_memory(model) == []
    assert torch.equal(logits_of(model), logits_of(plain))
    model.save_pretrained(tmp_path / "smaller")
    saved = type(model).from_pretrained(tmp_path / "smaller")
    assert all(torch.equal(tensor, saved.state_dict()[name]) for name, tensor in plain.state_dict().items())
    undo.rollback()
    assert torch.equal(logits_of(model), expected)


def test_the_guard_sees_what_it_sees_in_memory(tmp_path):
    plain, model = models("narrow", tmp_path)
    outputs = [
        outputs_without(one, {Anatomy(one).stack(): (1, 2)}, Probe.of(one, Batch(tiny_inputs(plain), None)))
        for one in (plain, model)
    ]
    assert same_outputs(*outputs)


def test_an_undo_keeps_no_weights(tmp_path):
    """Or taking back many blocks would need the memory of the whole model."""
    _, model = models("linear", tmp_path)
    undo, kept = Undo(), []
    for index in range(4):
        block = Anatomy(model).block(index)
        with resident(block.module):
            kept += [weakref.ref(tensor) for tensor in block.module.parameters()]
            plan = linear_ffn(block, [torch.eye(HIDDEN)], torch.zeros(HIDDEN))
        carry_out(plan, model, undo)
    gc.collect()
    assert in_memory(model) == []
    assert not any(one() is not None for one in kept)


def test_a_seal_on_a_module_on_the_disk(tmp_path):
    plain, model = models("narrow", tmp_path)
    expected = logits_of(plain)
    for one in (plain, model):
        Seal("model.norm").restructure(Site(one, Undo()))
    assert without_values(model) == []
    assert torch.equal(logits_of(model), expected)
    assert model.state_dict().keys() == plain.state_dict().keys()
    model.save_pretrained(tmp_path / "sealed")


def test_a_plan_made_of_weights_that_were_away(tmp_path):
    _, model = models("narrow", tmp_path)
    with pytest.raises(PlanError, match=r"gate_proj\.weight has no values: it was made while"):
        carry_out(WAYS["narrow"](model), model, Undo())


def test_what_a_plan_leaves_empty_is_named(tmp_path):
    _, model = models("narrow", tmp_path)
    plan = plan_on_disk("narrow", model)
    undo = Undo()
    with pytest.raises(PlanError, match=r"changes model\.layers\.0\.mlp\.down_proj\.weight but gives no values"):
        carry_out(Plan(plan.edits, {n: t for n, t in plan.tensors.items() if n != f"{DOWN}.weight"}), model, undo)
    undo.rollback()
    assert isinstance(model.get_submodule(DOWN), nn.Linear)
    assert without_values(model) == []
