"""ILLC on Transformers: what becomes of whole models, in memory and in files."""

import json
from typing import get_args

import pytest
import torch
from transformers import GraniteConfig, GraniteForCausalLM

from hf_compress.anatomy.anatomy import Anatomy, Block
from hf_compress.anatomy.undo import Undo
from hf_compress.api.compress import make_plan
from hf_compress.methods.illc import ILLCConfig
from hf_compress.methods.illc.config import Compensation, Reduction
from hf_compress.rewrite.apply import apply, carry_out
from hf_compress.rewrite.builders import merge_units, narrow_ffn
from tests.helpers.changes import Trace, forward
from tests.helpers.ffns import FAMILIES, assert_close, bias_of, built, families, hooked, matrix_of, noise, some_units
from tests.helpers.linears import IDS, data_of, dense, illc
from tests.helpers.models import assert_reloads, is_plain, leftovers, watching
from tests.helpers.round_trip import LLAMA, build, logits
from tests.helpers.tiny import tiny_model

NAMES = ("Llama", "GPT-2", "BERT", "ViT")


def ffn(model, index):
    """The first input projection and the output projection of a block's FFN."""
    stack = Anatomy(model).stack()
    parts = Anatomy(model).parts(stack, index).ffn
    return tuple(stack.blocks[index].get_submodule(name) for name in (parts.inputs[0], parts.output))


def widths(model):
    return [matrix_of(ffn(model, index)[1]).shape[0] for index in range(4)]


def kept(before, after, index):
    """Which units of `before` those of `after` are, by what they read."""
    old, new = (matrix_of(ffn(model, index)[0]) for model in (before, after))
    return [next(j for j in range(old.shape[1]) if torch.equal(old[:, j], column)) for column in new.T]


# --- models narrowed --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{"gamma": 0.375}, {"width": 24, "variant": "paper", "plain": True}], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_one_width_is_a_plain_checkpoint(name, settings, tmp_path):
    model = build(name)
    before, full = logits(model), widths(model)[0]
    illc(model, **settings)
    assert widths(model) == [settings.get("width", full * 3 // 8)] * 4
    assert is_plain(model)
    assert not torch.equal(logits(model), before)
    assert_reloads(model, tmp_path / "out", logits)
    assert model.compression_report.after.parameters < model.compression_report.before.parameters
    json.dumps(model.compression_report.notes)  # as a report is saved


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        *(("Llama", {}), ("GPT-2", {"variant": "paper"}), ("BERT", {"compensation": "bias"})),
        *(("ViT", {"iterative": False}), ("Llama", {"allocation": "adaptive", "reduction": "variance"})),
    ],
)
def test_a_plan_is_made_without_a_trace_and_is_what_compress_does(name, settings):
    model, other = build(name), build(name)
    before = Trace.of(model)
    plan = make_plan(model, ILLCConfig(gamma=0.5, **settings), data_of(model))
    assert before.difference(model) is None
    assert leftovers(model) == []
    illc(other, gamma=0.5, **settings)  # the same each time: nothing draws from torch's own generator
    apply(plan, model)
    assert torch.equal(logits(model), logits(other))


@pytest.mark.parametrize("compensation", get_args(Compensation))
@pytest.mark.parametrize("reduction", get_args(Reduction))
def test_every_reduction_with_every_compensation(reduction, compensation, tmp_path):
    model = build("Llama")
    illc(model, width=20, reduction=reduction, compensation=compensation)
    assert widths(model) == [20] * 4
    assert is_plain(model) == (compensation != "bias")  # Llama's projections have none
    if reduction == "average":
        with pytest.raises(StopIteration):
            kept(build("Llama"), model, 0)
    else:
        assert all(len(set(kept(build("Llama"), model, index))) == 20 for index in range(4))
    if not is_plain(model):
        assert_reloads(model, tmp_path / "out", logits)


@pytest.mark.parametrize("name", NAMES)
def test_magnitude_is_the_original_without_the_other_units(name):
    model, handles = build(name), []
    for index in range(4):
        out = ffn(model, index)[1]
        norms = matrix_of(out).square().sum(1)
        mask = (norms >= norms.sort().values[-24]).float()
        handles.append(out.register_forward_pre_hook(lambda _, args, mask=mask: (args[0] * mask, *args[1:])))
    with hooked(*handles):
        expected = logits(model)
    illc(model, width=24, reduction="magnitude", compensation="none")
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)


def hidden_of(model, index):
    """What the output projection of a block's FFN reads on the calibration data."""
    with watching({"output": ffn(model, index)[1]}) as seen:
        forward(model, {model.main_input_name: data_of(model)})
    return seen["output"][0].flatten(0, -2).double()


def test_variance_is_the_measure_of_flap():
    model, original = build("GPT-2"), build("GPT-2")
    scores = hidden_of(original, 0).var(0) * matrix_of(ffn(original, 0)[1]).double().square().sum(1)
    illc(model, width=24, reduction="variance")
    assert set(kept(original, model, 0)) == set(scores.topk(24).indices.tolist())


def test_random_units_are_those_of_the_seed():
    found = [illc(build("Llama"), width=20, reduction="random", seed=seed) for seed in (0, 0, 1)]
    first, again, other = ([kept(build("Llama"), model, index) for index in range(4)] for model in found)
    assert first == again != other
    assert first[0] != first[1]


@pytest.mark.parametrize("compensation", ["none", "ridge"])
def test_a_cluster_is_stood_for_by_its_member_that_contributes_most(compensation):
    """Without a ridge it writes what all of the cluster wrote."""
    model, original = build("GPT-2"), build("GPT-2")
    illc(model, width=20, reduction="representative", compensation=compensation, clustering="agglomerative")
    labels = torch.tensor(model.compression_report.notes["blocks"][0]["clusters"])
    out = matrix_of(ffn(original, 0)[1])
    share = hidden_of(original, 0).var(0) * out.double().square().sum(1)
    members = [(labels == label).nonzero().flatten() for label in range(20)]
    assert kept(original, model, 0) == [int(some[share[some].argmax()]) for some in members]
    if compensation == "none":
        sums = torch.stack([out[some].sum(0) for some in members])
        torch.testing.assert_close(matrix_of(ffn(model, 0)[1]), sums)


def granite():
    """What its blocks write enters the stream three tenths as large."""
    torch.manual_seed(0)
    return GraniteForCausalLM(GraniteConfig(**LLAMA, residual_multiplier=0.3)).eval()


@pytest.mark.parametrize("name", ["GPT-2", "ViT", "Granite"])
def test_a_bias_makes_up_for_the_mean(name):
    """The stream after an FFN has the mean that it had, over the calibration data; no more is asked of it."""

    def means(model):
        with watching(dict(enumerate(Anatomy(model).stack().blocks))) as seen:
            forward(model, {model.main_input_name: data_of(model)})
        return torch.stack([stream.flatten(0, -2).mean(0) for _, stream in seen.values()])

    make = {"Granite": granite}.get(name, lambda: build(name))
    settings = {"width": 8, "reduction": "random"}
    original, biased, bare = (
        means(make() if how is None else illc(make(), compensation=how, **settings)) for how in (None, "bias", "none")
    )
    size = original.abs().max()
    torch.testing.assert_close(biased / size, original / size, rtol=0, atol=1e-4)
    assert (bare - original).abs().max() > 1e-2 * size


@pytest.mark.parametrize("variant", ["paper", "compensated"])
def test_a_bias_of_its_own_needs_the_plugin(variant, tmp_path):
    model = illc(build("Llama"), width=20, variant=variant, compensation="ridge", bias=True)
    assert all(bool(ffn(model, index)[1].bias.any()) for index in range(4))
    assert not is_plain(model)
    assert_reloads(model, tmp_path / "out", logits)


@pytest.mark.parametrize("name", ["Llama", "Dense"])
def test_adaptive_widths_share_one_budget(name, tmp_path):
    """An FFN that writes much keeps much."""
    fields = {"num_hidden_layers": 4, "num_labels": 2, "residual": True, "use_bias": True}
    model = build(name) if name == "Llama" else dense(**fields)
    with torch.no_grad():
        ffn(model, 2)[1].weight *= 5
    full = widths(model)[0]
    illc(model, gamma=0.5, allocation="adaptive")
    found = widths(model)
    assert sum(found) == 4 * full // 2
    assert max(found) == found[2] > min(found) >= 1
    assert is_plain(model) == (name == "Dense")  # whose config has a width for each block
    assert_reloads(model, tmp_path / "out", lambda one: forward(one, {one.main_input_name: data_of(one)}))


@pytest.mark.parametrize(("gamma", "batch_size"), [(0.03, 8), (0.5, 32)], ids=["few units", "nothing held out"])
def test_adaptive_widths_in_a_corner(gamma, batch_size):
    model = illc(build("Llama"), batch_size=batch_size, gamma=gamma, allocation="adaptive", reduction="magnitude")
    assert sum(widths(model)) == 4 * int(gamma * 64 + 0.5)


def test_experts_are_narrowed_too():
    """Every other block of this model has an FFN; of each expert, as of that, units are kept."""
    model, original = tiny_model("qwen3_moe"), tiny_model("qwen3_moe")
    illc(model, gamma=0.5)
    found = [(note["block"], note["width"]) for note in model.compression_report.notes["blocks"]]
    assert found == [(0, 48), (1, 24), (2, 48), (3, 24)]
    for old, new in zip(original.model.layers[1::2], model.model.layers[1::2], strict=True):
        for before, after in zip(old.mlp.experts.gate_up_proj, new.mlp.experts.gate_up_proj, strict=True):
            assert len({next(j for j in range(96) if torch.equal(before[j], row)) for row in after}) == 48


def test_padding_and_batches_left_out_do_not_count():
    padded = {"input_ids": torch.nn.functional.pad(IDS, (0, 4), value=5)}
    padded["attention_mask"] = (torch.arange(16) < 12).long().expand(32, 16)
    some = IDS.view(8, 4, 12)[::2].flatten(0, 1)  # one token would be one batch; but four it is at least
    settings = {"width": 20, "batch_size": 4}
    all_of_them, few = illc(build("Llama"), IDS, **settings), illc(build("Llama"), IDS, tokens=1, **settings)
    torch.testing.assert_close(logits(illc(build("Llama"), padded, **settings)), logits(all_of_them))
    torch.testing.assert_close(logits(illc(build("Llama"), some, **settings)), logits(few))
    assert not torch.allclose(logits(few), logits(all_of_them), atol=1e-3)


# --- drafts -----------------------------------------------------------------------------------------------------------


@families(["llama", "phi3", "gpt2", "bert", "t5", "opt"])
def test_units_that_are_alike_merge_without_loss(name):
    model, stack, given, _ = built(name)
    family, labels = FAMILIES[name], torch.arange(FAMILIES[name].width) % 40
    block = stack.blocks[family.index]
    with torch.no_grad():
        for path in Anatomy(model).parts(stack, family.index).ffn.inputs:
            for parameter in block.get_submodule(path).parameters():
                axis = next(axis for axis, size in enumerate(parameter.shape) if size % family.width == 0)
                halves = parameter.split(family.width, axis)
                parameter.copy_(torch.cat([half.index_select(axis, labels) for half in halves], axis))
    expected = forward(model, given)
    carry_out(merge_units(Block(model, stack, family.index), labels), model, Undo())
    assert matrix_of(model.get_submodule(family.path(family.last))).shape[0] == 40
    assert_close(forward(model, given), expected)


@pytest.mark.parametrize("biased", [True, False])
@families(["llama", "phi3", "gpt2", "bert", "t5", "opt"])
def test_units_kept_write_what_they_are_told(name, biased):
    model, stack, given, reference = built(name)
    family, units = FAMILIES[name], some_units(FAMILIES[name].width, 40)
    last = model.get_submodule(family.path(family.last))
    hidden = matrix_of(last).shape[1]
    matrix, bias = noise(40, hidden, scale=0.1), noise(hidden, seed=9) if biased else None
    added = bias_of(last, hidden) if bias is None else bias
    with hooked(last.register_forward_hook(lambda _, args, out: args[0][..., units] @ matrix + added)):
        expected = forward(model, given)
    carry_out(narrow_ffn(Block(model, stack, family.index), units, (matrix, bias)), model, Undo())
    assert_close(forward(model, given), expected, reference)


@pytest.mark.parametrize("labels", [torch.zeros(63).long(), torch.arange(64) // 2 * 2, torch.zeros(64, 1).long()])
def test_labels_that_leave_a_cluster_empty_or_a_unit_out(labels):
    model = build("Llama")
    with pytest.raises(ValueError, match="labels must give each of 64 hidden units a cluster, none of them empty"):
        merge_units(Anatomy(model).block(0), labels)
