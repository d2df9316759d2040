"""LRP on Transformers: what becomes of whole models, in memory and in files, and slow loops over what is decided."""

import json

import pytest
import torch

from hf_compress.anatomy.anatomy import Anatomy
from hf_compress.anatomy.parts import linear_map
from hf_compress.api.compress import compress, make_plan
from hf_compress.calibration.vocabulary import special_ids
from hf_compress.evaluation.size import parameter_count
from hf_compress.methods.lrp import LRPConfig
from hf_compress.modules.packed import MixedPrecisionLinear
from hf_compress.modules.sparse import SparseLinear
from tests.helpers.changes import Trace, forward
from tests.helpers.linears import IDS, buffer_bytes, data_of, linears, lrp, made, mask_of, masks, stored, weight_of
from tests.helpers.models import assert_reloads, in_dtype, is_plain
from tests.helpers.round_trip import build, train
from tests.helpers.tiny import tiny_seq2seq_model

ALL = ("Llama", "Qwen3", "Mixtral", "GPT-2", "BERT", "ViT", "Dense")
WITHOUT_EXPERTS = tuple(name for name in ALL if name != "Mixtral")
PAPER = {"variant": "paper"}


def output(model):
    """What it gives on the calibration data."""
    return forward(model, {model.main_input_name: data_of(model)})


def blocks(model):
    return Anatomy(model).stack().blocks


def weights_in(model):
    """How many weights the linear maps of its blocks have."""
    return sum(linear_map(module).numel() for module in linears(model).values())


def ffn_widths(model):
    stack = Anatomy(model).stack()
    parts = [Anatomy(model).parts(stack, index).ffn for index in range(len(stack))]
    return [
        linear_map(block.get_submodule(ffn.output)).shape[0] for block, ffn in zip(stack.blocks, parts, strict=True)
    ]


# --- weights ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "scope"), [*((name, "layer") for name in ALL), ("Llama", "row"), ("GPT-2", "row")])
def test_weights(name, scope, tmp_path):
    model = made(name)
    shapes = {path: linear_map(module).T.shape for path, module in linears(model).items()}
    before, trace = output(model), Trace.of(model)
    lrp(model, sparsity=0.375, **({} if scope == "layer" else {"scope": scope}))  # which is the default
    found = masks(model)
    assert {path: mask.shape for path, mask in found.items()} == shapes
    for path, mask in found.items():
        assert int(mask.sum()) == mask.numel() * 5 // 8
        assert model.get_submodule(path).weight.numel() == mask.numel() * 5 // 8
        assert (len(set(mask.sum(dim=1).tolist())) == 1) == (scope == "row")
    assert not is_plain(model)
    assert not torch.equal(output(model), before)
    now = Trace.of(model).tensors
    others = [n for n in trace.tensors if n.rpartition(".")[0] not in shapes and n in now]
    assert others
    assert all(torch.equal(now[n], trace.tensors[n]) for n in others)
    assert_reloads(model, tmp_path / "out", output)
    json.dumps(model.compression_report.notes)  # as a report is saved


@pytest.mark.parametrize("pattern", [(2, 4), (1, 4), (5, 8)])
@pytest.mark.parametrize("name", ["Llama", "GPT-2", "Dense"])
def test_n_of_each_m(name, pattern, tmp_path):
    model, (n, m) = lrp(made(name), granularity="n:m", pattern=pattern), pattern
    for mask in masks(model).values():
        assert all(sum(row[i : i + m]) == n for row in mask.tolist() for i in range(0, len(row), m))
    if pattern == (2, 4):
        assert_reloads(model, tmp_path / "out", output)


@pytest.mark.parametrize("name", ["Qwen3", "GPT-2", "Dense"])
def test_whole_rows(name, tmp_path):
    model = lrp(made(name), granularity="row", sparsity=0.75)
    for mask in masks(model).values():
        whole = mask.all(dim=1)
        assert torch.equal(mask.any(dim=1), whole)
        assert int(whole.sum()) == len(mask) // 4
    assert_reloads(model, tmp_path / "out", output)


@pytest.mark.parametrize("name", ALL)
def test_the_papers_pruning(name, tmp_path):
    model = lrp(made(name), **PAPER)
    found = masks(model)
    assert found.keys() == linears(made(name)).keys()
    shares = [float(mask.float().mean()) for mask in found.values()]
    assert 0.2 < min(shares) <= max(shares) < 0.8, "about half of random weights have a relevance above 0"
    assert_reloads(model, tmp_path / "out", output)


# --- units ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WITHOUT_EXPERTS)
def test_neurons_leave_a_plain_checkpoint(name, tmp_path):
    model = made(name)
    full = ffn_widths(model)[0]
    before = model.num_parameters()
    lrp(model, granularity="neuron", sparsity=0.625)
    assert ffn_widths(model) == [full * 3 // 8] * len(blocks(model))
    assert is_plain(model)
    assert model.num_parameters() < before
    assert_reloads(model, tmp_path / "out", output)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["n_inner" if name == "GPT-2" else "intermediate_size"] == full * 3 // 8
    assert "quantization_config" not in written


@pytest.mark.parametrize("name", WITHOUT_EXPERTS)
def test_the_papers_neurons(name, tmp_path):
    """As many as have no relevance, so that blocks differ, and what stays is as it was."""
    model, before = lrp(made(name), granularity="neuron", **PAPER), made(name)
    widths = ffn_widths(model)
    assert 0 < min(widths) <= max(widths) < ffn_widths(before)[0]
    first, old = (
        blocks(m)[0].get_submodule(Anatomy(m).parts(Anatomy(m).stack(), 0).ffn.output) for m in (model, before)
    )
    rows = [row.tolist() for row in linear_map(old)]
    assert all(row.tolist() in rows for row in linear_map(first))
    assert_reloads(model, tmp_path / "out", output)


@pytest.mark.parametrize(("name", "left"), [("Llama", 1), ("Qwen3", 1), ("Mixtral", 1), ("BERT", 2), ("ViT", 2)])
def test_heads(name, left, tmp_path):
    """Of groups of queries, two of which share a key, in three of these families; a head is 8 wide."""
    model, old = lrp(made(name), granularity="head", sparsity=0.5), made(name)
    outputs = {"q_proj": 16, "k_proj": 8 * left, "v_proj": 8 * left, "query": 16, "key": 16, "value": 16}
    found = {path: m for path, m in model.named_modules() if path.rpartition(".")[2] in outputs}
    assert found
    for path, module in found.items():
        assert module.out_features == outputs[path.rpartition(".")[2]]
        rows = [row.tolist() for row in old.get_submodule(path).weight]
        assert all(row.tolist() in rows for row in module.weight), "these are as they were"
    assert_reloads(model, tmp_path / "out", output)


@pytest.mark.parametrize("name", WITHOUT_EXPERTS)
def test_blocks(name, tmp_path):
    model = made(name)
    count = len(blocks(model))
    lrp(model, granularity="block", sparsity=0.5)
    relevances = model.compression_report.notes["relevance"]
    gone = sorted(range(count), key=relevances.__getitem__)[: int(count / 2 + 0.5)]
    (edit,) = model.compression_report.edits
    assert edit["blocks"] == sorted(gone)
    assert len(blocks(model)) == count - len(gone)
    assert is_plain(model)
    assert_reloads(model, tmp_path / "out", output)


# --- precision --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "symmetric"), [*((name, False) for name in ALL), ("Llama", True), ("Dense", True)])
def test_bits(name, symmetric, tmp_path):
    packed, aim = lrp(made(name), bits=4.25, group_size=32, symmetric=symmetric), 4.25 * weights_in(made(name)) / 8
    assert 0.98 * aim <= buffer_bytes(packed) <= aim
    assert len(stored(packed, MixedPrecisionLinear)) == len(linears(made(name)))
    assert not linears(packed)
    assert not is_plain(packed)
    assert_reloads(packed, tmp_path / "out", output)


@pytest.mark.parametrize("name", ["Llama", "Mixtral"])
def test_bytes_to_aim_at(name, tmp_path):
    aim = weights_in(made(name)) * 5 // 8
    model = lrp(made(name), target_bytes=aim, group_size=16)
    assert 0.98 * aim <= buffer_bytes(model) <= aim
    assert_reloads(model, tmp_path / "out", output)


@pytest.mark.parametrize(
    "settings", [{"sparsity": 0.5}, {"granularity": "n:m"}, {"granularity": "row", "sparsity": 0.5}]
)
@pytest.mark.parametrize("name", ["Llama", "GPT-2"])
def test_sparse_and_in_few_bits(name, settings, tmp_path):
    """The mask is counted: a bit of every weight."""
    model, aim = lrp(made(name), bits=3, group_size=64, **settings), 3 * weights_in(made(name)) / 8
    assert 0.98 * aim <= buffer_bytes(model) <= aim
    assert all(float(mask.float().mean()) == 0.5 for mask in masks(model).values())
    assert all(m.weight.dtype == torch.int8 for m in stored(model, SparseLinear).values())
    assert_reloads(model, tmp_path / "out", output)


@pytest.mark.parametrize("granularity", ["neuron", "head"])
@pytest.mark.parametrize("name", ["Llama", "BERT", "ViT"])
def test_narrow_and_in_few_bits(name, granularity, tmp_path):
    model = lrp(made(name), granularity=granularity, sparsity=0.25, bits=4.5, group_size=16)
    maps = stored(model, MixedPrecisionLinear)
    count = sum(m.in_features * m.out_features for m in maps.values())
    assert 0.98 * 4.5 * count / 8 <= buffer_bytes(model) <= 4.5 * count / 8
    widths = {m.in_features for path, m in maps.items() if path.endswith(("down_proj", "output.dense", "fc2"))}
    assert (48 in widths) == (granularity == "neuron")
    assert_reloads(model, tmp_path / "out", output)


@pytest.mark.parametrize("granularity", ["none", "neuron"])
@pytest.mark.parametrize("name", ["Llama", "GPT-2", "ViT", "Dense"])
def test_the_papers_two_precisions(name, granularity, tmp_path):
    """The half above the median in 8 bits, the other in 4, and a bit a weight to tell them apart."""
    settings = {"prune": False} if granularity == "none" else {"granularity": "neuron"}
    model, old = lrp(made(name), split=(8, 4), group_size=8, symmetric=True, **settings, **PAPER), made(name)
    maps = stored(model, SparseLinear)
    assert maps.keys() == linears(old).keys()
    for path, module in maps.items():
        mask, count = mask_of(module), module.in_features * module.out_features
        assert 0.4 * count <= int(mask.sum()) <= 0.5 * count, "half, but for those like the median: dead units' weights"
        upper, lower = -(-int(mask.sum()) // 8), -(-int((~mask).sum()) // 8)
        assert module.bits.tolist() == [8] * upper + [4] * lower
        assert not list(module.parameters()) or [n for n, _ in module.named_parameters()] == ["bias"]
        if granularity == "none":
            gaps = (module.unpacked() - weight_of(old.get_submodule(path))).abs()
            assert float(gaps[mask].mean()) < 0.3 * float(gaps[~mask].mean())
    assert_reloads(model, tmp_path / "out", output)


def test_precisions_above_what_zeros_are_stored_for():
    model = lrp(made("Llama"), split=(12, 3), prune=False, **PAPER)
    assert {int(bits) for m in stored(model, SparseLinear).values() for bits in m.bits} == {3, 12}


@pytest.mark.parametrize("side", ["encoder", "decoder"])
def test_packed_maps_read_what_they_would(side):
    """T5 casts what the last map of an FFN reads to the dtype of its weight."""
    model = tiny_seq2seq_model("t5").requires_grad_(False)
    ids = torch.randint(8, 90, (4, 6), generator=torch.Generator().manual_seed(0))
    before = model(input_ids=ids, decoder_input_ids=ids).logits
    stack = next(stack.path for stack in Anatomy(model).stacks if side in stack.path)
    model = compress(model, LRPConfig(bits=9, group_size=32, stack=stack), ids)
    after = model(input_ids=ids, decoder_input_ids=ids).logits
    assert float((after - before).norm()) < 0.1 * float(before.norm())


def test_notes_tell_what_was_done():
    model = lrp(made("Llama"), sparsity=0.5, bits=4)
    notes = model.compression_report.notes
    assert notes["score"] == "relevance"
    for told in notes["linears"]:
        module = model.get_submodule(told["linear"])
        assert told["kept"] == pytest.approx(float(mask_of(module).float().mean()))
        assert sum(told["groups"].values()) == module.packing.groups
        assert {int(bits) for bits in told["groups"]} == set(module.bits.tolist())


# --- the same each time -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "granularity"), [("Llama", "weight"), ("Llama", "neuron"), ("Mixtral", "weight")])
def test_random_scores_are_those_of_their_seed(name, granularity):
    settings = {"sparsity": 0.5, "score": "random", "granularity": granularity}
    first, same, other = (output(lrp(made(name), seed=seed, **settings)) for seed in (1, 1, 2))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"variant": "paper", "granularity": "neuron", "split": (8, 4)}, ("signed", True, True)),
        ({"granularity": "n:m", "pattern": [1, 4]}, ("relevance", True, False)),
        ({"bits": 4}, ("relevance", False, True)),
    ],
)
def test_the_variant_names_the_rest(settings, expected):
    config = LRPConfig(**settings)
    assert (config.score_name, config.prunes, config.quantizes) == expected


# --- other dtypes, other rules, training ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "settings"),
    [
        (torch.float16, {"sparsity": 0.5}),
        (torch.float16, {"granularity": "neuron", "sparsity": 0.25}),
        (torch.bfloat16, {"sparsity": 0.5}),
        (torch.bfloat16, {"bits": 4, "group_size": 32}),
        (torch.bfloat16, {"sparsity": 0.5, "bits": 4}),
    ],
    ids=str,
)
def test_models_in_half_precision(dtype, settings, tmp_path):
    model = lrp(in_dtype(made("Llama"), dtype), **settings)
    maps = stored(model, SparseLinear)
    if "bits" not in settings and maps:
        assert {m.weight.dtype for m in maps.values()} == {dtype}
    assert output(model).dtype == dtype
    assert_reloads(model, tmp_path / "out", output, dtype=dtype)


def test_half_precision_decides_almost_as_single_does():
    single, half = lrp(made("Llama"), sparsity=0.5), lrp(in_dtype(made("Llama"), torch.bfloat16), sparsity=0.5)
    same = [(mask == masks(half)[path]).float().mean() for path, mask in masks(single).items()]
    assert min(same) > 0.9


def test_attention_by_either_rule():
    """CP leaves queries and keys without relevance; there is still something to keep of them."""
    model, other = lrp(made("Llama"), sparsity=0.5, composite="cp"), lrp(made("Llama"), sparsity=0.5)
    found, full = masks(model), masks(other)
    assert found.keys() == full.keys()
    assert all(float(mask.float().mean()) == 0.5 for mask in found.values())
    assert any(not torch.equal(found[path], full[path]) for path in found)
    lrp(made("Llama"), bits=4, group_size=32, composite="cp")


@pytest.mark.parametrize("settings", [{"sparsity": 0.5}, PAPER, {"prune": False, "split": (8, 4)} | PAPER], ids=str)
@pytest.mark.parametrize("name", ["Llama", "GPT-2"])
def test_training_keeps_zeros_zero(name, settings, tmp_path):
    model = lrp(made(name), **settings)
    before = {path: weight_of(module) for path, module in stored(model, SparseLinear).items()}
    found = masks(model)
    train(model)
    for path, module in stored(model, SparseLinear).items():
        after = weight_of(module)
        if "split" in settings:
            assert torch.equal(after, before[path]), "what is packed is not trained"
        else:
            assert not after[~found[path]].any()
            assert not torch.equal(after, before[path])
    assert_reloads(model.eval(), tmp_path / "out", output)


@pytest.mark.parametrize(
    ("settings", "share"),
    [
        ({"bits": 4}, 1),
        ({"prune": False, "split": (8, 4)} | PAPER, 1),
        ({"sparsity": 0.5}, 0.5),
        ({"sparsity": 0.5, "bits": 4}, 0.5),
    ],
)
def test_packed_weights_count_as_parameters(settings, share):
    """They are buffers, but a model is not smaller for that; weights that are left out are."""
    model, old = lrp(made("Llama"), group_size=32, **settings), made("Llama")
    assert parameter_count(model) == old.num_parameters() - (1 - share) * weights_in(old)
    assert model.compression_report.after.parameters == parameter_count(model)


# --- special tokens ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["BERT", "Llama"])
def test_special_tokens_count_where_a_head_reads_them(name, monkeypatch):
    """Of an encoder all that it attends to enters statistics, of a decoder what is no special token."""
    model, ids, seen = build(name), IDS.clone(), []
    special = special_ids(model.config, None)[0]
    ids[:, 0], mask = special, torch.ones_like(ids)
    mask[:, -2:] = 0
    monkeypatch.setattr(
        "hf_compress.methods.lrp.plan.plan_weights",
        lambda config, context, *_: seen.extend(batch.real for batch in context.calibration) or {},
    )
    make_plan(model, LRPConfig(bits=5, group_size=32), [{"input_ids": ids, "attention_mask": mask}])
    expected = mask.bool()
    if name == "Llama":
        expected = expected & (ids != special)
    assert torch.equal(seen[0], expected)


@pytest.mark.parametrize(
    "settings",
    [{"bits": 10, "group_size": 32}, {"sparsity": 0.5}, {"sparsity": 0.5, "granularity": "neuron"}],
    ids=["bits", "weights", "neurons"],
)
def test_a_frozen_model_is_scored_and_stays_frozen(settings):
    """By relevance and by gradients, which come through what is not trained."""
    frozen, trained = (lrp(build("Llama").requires_grad_(grad), **settings) for grad in (False, True))
    assert all(torch.equal(value, trained.state_dict()[name]) for name, value in frozen.state_dict().items())
    assert not any(parameter.requires_grad for parameter in frozen.parameters())
    assert all(parameter.requires_grad for parameter in trained.parameters())
