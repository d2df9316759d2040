"""LRP on Transformers: what becomes of whole models, in memory and in files, and slow loops over what is decided."""

import json

import pytest
import torch

import hf_compress as hfc
from hf_compress.anatomy.anatomy import Anatomy
from hf_compress.anatomy.parts import is_linear, linear_map
from hf_compress.api.compress import compress, make_plan
from hf_compress.calibration.capture import hooked
from hf_compress.calibration.data import DataOptions, special_ids
from hf_compress.evaluation.size import parameter_count
from hf_compress.methods.base.settings import CompressionConfig, config_class
from hf_compress.methods.lrp import LRPConfig
from hf_compress.modules.packed import MixedPrecisionLinear
from hf_compress.modules.sparse import SparseLinear
from hf_compress.plan.plan import Plan
from hf_compress.storage.save import save
from tests.helpers.changes import Trace, forward
from tests.helpers.linears import (
    FLOATS,
    IDS,
    buffer_bytes,
    data_of,
    dense,
    linears,
    mask_of,
    masks,
    stored,
    weight_of,
)
from tests.helpers.models import in_dtype
from tests.helpers.round_trip import build, train
from tests.helpers.tiny import randomise, tiny_seq2seq_model

CLASSES = torch.randint(0, 3, (40,), generator=torch.Generator().manual_seed(8))
ALL = ("Llama", "Qwen3", "Mixtral", "GPT-2", "BERT", "ViT", "Dense")
WITHOUT_EXPERTS = tuple(name for name in ALL if name != "Mixtral")
PAPER = {"variant": "paper"}


def made(name):
    """A model in which everything matters; 32 wide where there is a choice."""
    return dense(hidden_size=32, intermediate_size=64) if name == "Dense" else build(name)


def run(model, data=None, **settings):
    data = data_of(model) if data is None else data
    return compress(model, LRPConfig(**settings), data, options=DataOptions(batch_size=8))


def output(model):
    """What it gives on the calibration data."""
    return forward(model, {model.main_input_name: data_of(model)})


def blocks(model):
    return Anatomy(model).stack().blocks


def is_plain(model):
    return getattr(model.config, "quantization_config", None) is None


def assert_reloads(model, folder):
    again = type(model).from_pretrained(folder if folder.exists() else save(model, folder))
    assert torch.equal(output(again), output(model))
    assert is_plain(again) == is_plain(model)


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
    run(model, sparsity=0.375, **({} if scope == "layer" else {"scope": scope}))  # which is the default
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
    assert_reloads(model, tmp_path / "out")
    json.dumps(model.compression_report.notes)  # as a report is saved


@pytest.mark.parametrize("pattern", [(2, 4), (1, 4), (5, 8)])
@pytest.mark.parametrize("name", ["Llama", "GPT-2", "Dense"])
def test_n_of_each_m(name, pattern, tmp_path):
    model, (n, m) = made(name), pattern
    run(model, granularity="n:m", pattern=pattern)
    for mask in masks(model).values():
        assert all(sum(row[i : i + m]) == n for row in mask.tolist() for i in range(0, len(row), m))
    if pattern == (2, 4):
        assert_reloads(model, tmp_path / "out")


@pytest.mark.parametrize("name", ["Qwen3", "GPT-2", "Dense"])
def test_whole_rows(name, tmp_path):
    model = made(name)
    run(model, granularity="row", sparsity=0.75)
    for mask in masks(model).values():
        whole = mask.all(dim=1)
        assert torch.equal(mask.any(dim=1), whole)
        assert int(whole.sum()) == len(mask) // 4
    assert_reloads(model, tmp_path / "out")


@pytest.mark.parametrize("name", ALL)
def test_the_papers_pruning(name, tmp_path):
    model = made(name)
    run(model, **PAPER)
    found = masks(model)
    assert found.keys() == linears(made(name)).keys()
    shares = [float(mask.float().mean()) for mask in found.values()]
    assert 0.2 < min(shares) <= max(shares) < 0.8, "about half of random weights have a relevance above 0"
    assert_reloads(model, tmp_path / "out")


# --- units ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WITHOUT_EXPERTS)
def test_neurons_leave_a_plain_checkpoint(name, tmp_path):
    model = made(name)
    full = ffn_widths(model)[0]
    before = model.num_parameters()
    run(model, granularity="neuron", sparsity=0.625)
    assert ffn_widths(model) == [full * 3 // 8] * len(blocks(model))
    assert is_plain(model)
    written = json.loads((save(model, tmp_path / "out") / "config.json").read_text())
    if name == "GPT-2":
        assert written["n_inner"] == full * 3 // 8
    else:
        assert written["intermediate_size"] == full * 3 // 8
    assert "quantization_config" not in written
    assert model.num_parameters() < before
    assert_reloads(model, tmp_path / "out")


@pytest.mark.parametrize("name", WITHOUT_EXPERTS)
def test_the_papers_neurons(name, tmp_path):
    """As many as have no relevance, so that blocks differ, and what stays is as it was."""
    model, before = made(name), made(name)
    full = ffn_widths(before)[0]
    run(model, granularity="neuron", **PAPER)
    widths = ffn_widths(model)
    assert 0 < min(widths) <= max(widths) < full
    first, old = (
        blocks(m)[0].get_submodule(Anatomy(m).parts(Anatomy(m).stack(), 0).ffn.output) for m in (model, before)
    )
    rows = [row.tolist() for row in linear_map(old)]
    assert all(row.tolist() in rows for row in linear_map(first))
    assert_reloads(model, tmp_path / "out")


@pytest.mark.parametrize(("name", "left"), [("Llama", 1), ("Qwen3", 1), ("Mixtral", 1), ("BERT", 2), ("ViT", 2)])
def test_heads(name, left, tmp_path):
    """Of groups of queries, two of which share a key, in three of these families; a head is 8 wide."""
    model, old = made(name), made(name)
    run(model, granularity="head", sparsity=0.5)
    outputs = {"q_proj": 16, "k_proj": 8 * left, "v_proj": 8 * left, "query": 16, "key": 16, "value": 16}
    found = {path: m for path, m in model.named_modules() if path.rpartition(".")[2] in outputs}
    assert found
    for path, module in found.items():
        assert module.out_features == outputs[path.rpartition(".")[2]]
        rows = [row.tolist() for row in old.get_submodule(path).weight]
        assert all(row.tolist() in rows for row in module.weight), "these are as they were"
    assert_reloads(model, tmp_path / "out")


@pytest.mark.parametrize("name", WITHOUT_EXPERTS)
def test_blocks(name, tmp_path):
    model = made(name)
    count = len(blocks(model))
    run(model, granularity="block", sparsity=0.5)
    relevances = model.compression_report.notes["relevance"]
    gone = sorted(range(count), key=relevances.__getitem__)[: int(count / 2 + 0.5)]
    (edit,) = model.compression_report.edits
    assert edit["blocks"] == sorted(gone)
    assert len(blocks(model)) == count - len(gone)
    assert is_plain(model)
    assert_reloads(model, tmp_path / "out")


# --- precision --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "symmetric"), [*((name, False) for name in ALL), ("Llama", True), ("Dense", True)])
def test_bits(name, symmetric, tmp_path):
    model = made(name)
    count = sum(linear_map(m).numel() for m in linears(model).values())
    packed = run(model, bits=4.25, group_size=32, symmetric=symmetric)
    assert 0.98 * 4.25 * count / 8 <= buffer_bytes(packed) <= 4.25 * count / 8
    assert len(stored(packed, MixedPrecisionLinear)) == len(linears(made(name)))
    assert not linears(packed)
    assert not is_plain(packed)
    assert_reloads(packed, tmp_path / "out")


@pytest.mark.parametrize("name", ["Llama", "Mixtral"])
def test_bytes_to_aim_at(name, tmp_path):
    model = made(name)
    aim = sum(linear_map(m).numel() for m in linears(model).values()) * 5 // 8
    run(model, target_bytes=aim, group_size=16)
    assert 0.98 * aim <= buffer_bytes(model) <= aim
    assert_reloads(model, tmp_path / "out")


@pytest.mark.parametrize(
    "settings", [{"sparsity": 0.5}, {"granularity": "n:m"}, {"granularity": "row", "sparsity": 0.5}]
)
@pytest.mark.parametrize("name", ["Llama", "GPT-2"])
def test_sparse_and_in_few_bits(name, settings, tmp_path):
    """The mask is counted: a bit of every weight."""
    model = made(name)
    count = sum(linear_map(m).numel() for m in linears(model).values())
    run(model, bits=3, group_size=64, **settings)
    assert 0.98 * 3 * count / 8 <= buffer_bytes(model) <= 3 * count / 8
    assert all(float(mask.float().mean()) == 0.5 for mask in masks(model).values())
    assert all(m.weight.dtype == torch.int8 for m in stored(model, SparseLinear).values())
    assert_reloads(model, tmp_path / "out")


@pytest.mark.parametrize("granularity", ["neuron", "head"])
@pytest.mark.parametrize("name", ["Llama", "BERT", "ViT"])
def test_narrow_and_in_few_bits(name, granularity, tmp_path):
    model = made(name)
    run(model, granularity=granularity, sparsity=0.25, bits=4.5, group_size=16)
    maps = stored(model, MixedPrecisionLinear)
    count = sum(m.in_features * m.out_features for m in maps.values())
    assert 0.98 * 4.5 * count / 8 <= buffer_bytes(model) <= 4.5 * count / 8
    widths = {m.in_features for path, m in maps.items() if path.endswith(("down_proj", "output.dense", "fc2"))}
    assert (48 in widths) == (granularity == "neuron")
    assert_reloads(model, tmp_path / "out")


@pytest.mark.parametrize("granularity", ["none", "neuron"])
@pytest.mark.parametrize("name", ["Llama", "GPT-2", "ViT", "Dense"])
def test_the_papers_two_precisions(name, granularity, tmp_path):
    """The half above the median in 8 bits, the other in 4, and a bit a weight to tell them apart."""
    settings = {"prune": False} if granularity == "none" else {"granularity": "neuron"}
    model, old = made(name), made(name)
    run(model, split=(8, 4), group_size=8, symmetric=True, **settings, **PAPER)
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
    assert_reloads(model, tmp_path / "out")


def test_precisions_above_what_zeros_are_stored_for():
    model = run(made("Llama"), split=(12, 3), prune=False, **PAPER)
    assert {int(bits) for m in stored(model, SparseLinear).values() for bits in m.bits} == {3, 12}


# --- who decides ------------------------------------------------------------------------------------------------------


def products(model, x, classes):
    """x · g of every sample and linear map by plain autograd: of a ReLU network without biases that is relevance.

    Returns what a map reads times the gradient at what it writes, (samples, outputs, inputs), by path.
    """
    maps, read, wrote = linears(model), {}, {}
    handles = []
    for path, module in maps.items():

        def keep(module, args, out, path=path):
            out.retain_grad()
            read[path], wrote[path] = args[0].detach(), out

        handles.append(module.register_forward_hook(keep))
    found = model(input_values=x).logits
    found[torch.arange(len(x)), found.argmax(1) if classes is None else classes].sum().backward()
    for handle in handles:
        handle.remove()
    model.zero_grad()
    return {path: torch.stack([g.T @ r for g, r in zip(wrote[path].grad, read[path], strict=True)]) for path in maps}


@pytest.mark.parametrize("classes", [None, CLASSES], ids=["predicted", "label"])
def test_the_paper_leaves_out_what_has_no_relevance(classes):
    """R = w · mean (x g) <= 0, of the class of the label where there is one."""
    model, old = dense(), dense()
    data = FLOATS if classes is None else {"input_values": FLOATS, "labels": classes}
    run(model, data, **PAPER)
    for path, found in products(old, FLOATS, classes).items():
        relevance = found.double().mean(dim=0) * weight_of(old.get_submodule(path))
        sure = (relevance.abs() > 1e-7) | (relevance == 0)
        assert sure.float().mean() > 0.9
        assert torch.equal(mask_of(model.get_submodule(path))[sure], (relevance > 0)[sure])


def test_no_relevance_at_all_is_none():
    """Of a unit that is never active it is 0, to the last bit: it goes, alone or weight by weight."""
    weights, neurons = dense(), dense()
    for model in (weights, neurons):
        with torch.no_grad():
            model.layers[1].mlp.up_proj.weight[3] = 0
    run(weights, **PAPER)
    assert not mask_of(weights.layers[1].mlp.up_proj)[3].any()
    assert not mask_of(weights.layers[1].mlp.down_proj)[:, 3].any()
    run(neurons, granularity="neuron", **PAPER)
    assert bool((neurons.layers[1].mlp.up_proj.weight != 0).any(dim=1).all())


@pytest.mark.parametrize("settings", [{}, {"granularity": "neuron"}, {"prune": False, "split": (8, 4)}], ids=str)
def test_the_paper_solves_for_nothing(settings):
    """What stays is what it was, but for rounding."""
    model, old = dense(intermediate_size=21), dense(intermediate_size=21)
    run(model, **PAPER, **settings)
    for path, module in stored(model, SparseLinear).items():
        if "split" in settings:
            torch.testing.assert_close(weight_of(module), weight_of(old.get_submodule(path)), atol=0.15, rtol=0)
        else:
            assert torch.equal(weight_of(module), weight_of(old.get_submodule(path)) * mask_of(module))
    if settings.get("granularity"):
        for index in range(3):
            rows = [row.tolist() for row in old.layers[index].mlp.up_proj.weight]
            kept = [rows.index(row.tolist()) for row in model.layers[index].mlp.up_proj.weight]
            new, before = (m.layers[index].mlp.down_proj.weight for m in (model, old))
            assert torch.equal(new, before[:, kept])


def test_the_papers_neurons_are_those_with_relevance():
    model, old = dense(), dense()
    run(model, granularity="neuron", **PAPER)
    found = products(old, FLOATS, None)
    for index in range(3):
        name = f"layers.{index}.mlp.down_proj"
        relevance = (found[name].double().mean(dim=0) * weight_of(old.get_submodule(name))).sum(dim=0)
        expected = old.layers[index].mlp.up_proj.weight[relevance > 1e-9]
        assert torch.equal(model.layers[index].mlp.up_proj.weight, expected)


def test_the_papers_halves_are_those_about_the_median():
    model, old = dense(), dense()
    run(model, prune=False, split=(8, 4), **PAPER)
    for path, found in products(old, FLOATS, None).items():
        relevance = (found.double().mean(dim=0) * weight_of(old.get_submodule(path))).flatten()
        median = relevance.sort().values[(relevance.numel() - 1) // 2]
        sure = (relevance - median).abs() > 1e-7
        assert torch.equal(mask_of(model.get_submodule(path)).flatten()[sure], (relevance > median)[sure])


def best(scores, count):
    """A mask of the `count` largest of a flat list."""
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:count]
    return [i in set(order) for i in range(len(scores))]


def rows_of(scores, share):
    return torch.tensor([best(row, int(len(row) * share + 0.5)) for row in scores.tolist()])


@pytest.mark.parametrize("temper", [0.0, 0.25, 1.0])
def test_tempered_relevance(temper):
    """|w| · (E |x g|)^temper, the largest of each row."""
    model, old = dense(), dense()
    run(model, sparsity=0.5, temper=temper, scope="row")
    for path, found in products(old, FLOATS, None).items():
        scores = weight_of(old.get_submodule(path)).abs() * found.abs().mean(dim=0) ** temper
        assert torch.equal(mask_of(model.get_submodule(path)), rows_of(scores, 0.5))


def norms(model, data, real):
    """Root of the mean square of what each map reads at real tokens."""
    read, handles = {}, []
    for path, module in linears(model).items():

        def keep(module, args, out, path=path):
            read[path] = args[0][real]

        handles.append(module.register_forward_hook(keep))
    forward(model, data)
    for handle in handles:
        handle.remove()
    return {path: torch.stack([row.square() for row in rows]).mean(dim=0).sqrt() for path, rows in read.items()}


@pytest.mark.parametrize("name", ["Llama", "GPT-2"])
def test_wanda_and_magnitude_are_their_definitions(name):
    """|w| · |x| of real tokens against others of the row; and |w| alone. Padding does not count."""
    mask = (torch.arange(12) < torch.arange(32)[:, None] % 9 + 4).long()
    data = {"input_ids": IDS, "attention_mask": mask}
    measured = norms(made(name), data, mask.bool())
    for score in ("wanda", "magnitude"):
        model, old = made(name), made(name)
        run(model, data, sparsity=0.25, score=score, scope="row")
        for path, norm in measured.items():
            scores = weight_of(old.get_submodule(path)).abs() * (norm if score == "wanda" else 1)
            assert (
                mask_of(model.get_submodule(path)) == rows_of(scores, 0.75)
            ).float().mean() > 0.999  # of equals, any


def test_padding_of_a_decoder_that_reads_one_place_later():
    """T5's reads a start token, then the text but for its last word: those are its real tokens."""
    real = torch.arange(12) < torch.arange(32)[:, None] % 5 + 3
    model, old, path = tiny_seq2seq_model("t5"), tiny_seq2seq_model("t5"), "decoder.block.0.layer.0.SelfAttention.q"
    data = {"input_ids": IDS + 4, "attention_mask": real.long()}
    started = torch.cat([torch.full((32, 1), old.config.decoder_start_token_id), data["input_ids"][:, :-1]], dim=1)
    read = []
    with hooked([old.get_submodule(path).register_forward_pre_hook(lambda _, args: read.append(args[0]))]):
        forward(old, data | {"decoder_input_ids": started})
    shifted = torch.cat([torch.zeros(32, 1, dtype=torch.bool), real[:, :-1]], dim=1)
    norm = read[0][shifted].square().mean(dim=0).sqrt()
    run(model, data, sparsity=0.5, score="wanda", scope="row", stack="decoder.block")
    expected = rows_of(old.get_submodule(path).weight.detach().abs() * norm, 0.5)
    assert torch.equal(mask_of(model.get_submodule(path)), expected)


@pytest.mark.parametrize("scope", ["row", "layer", "model"])
def test_scopes(scope):
    """Compared within a row, a layer, or the whole stack."""
    model, old = dense(), dense()
    run(model, sparsity=0.4, score="magnitude", scope=scope)
    sizes = {path: linear_map(module).T.detach().abs() for path, module in linears(old).items()}
    found = masks(model)
    if scope == "row":
        assert all(torch.equal(found[path], rows_of(size, 0.6)) for path, size in sizes.items())
    elif scope == "layer":
        for path, size in sizes.items():
            expected = best(size.flatten().tolist(), int(size.numel() * 0.6 + 0.5))
            assert found[path].flatten().tolist() == expected
    else:
        joined = [value for size in sizes.values() for value in size.flatten().tolist()]
        expected = best(joined, int(len(joined) * 0.6 + 0.5))
        assert [one for path in sizes for one in found[path].flatten().tolist()] == expected


@pytest.mark.parametrize("scope", ["row", "model"])
def test_rows_go_by_the_sums_of_their_scores(scope):
    model, old = dense(), dense()
    run(model, granularity="row", sparsity=0.4, score="magnitude", scope=scope)
    sums = {path: linear_map(module).T.detach().abs().sum(dim=1) for path, module in linears(old).items()}
    found = {path: mask.any(dim=1).tolist() for path, mask in masks(model).items()}
    if scope == "row":
        assert found == {path: best(s.tolist(), int(len(s) * 0.6 + 0.5)) for path, s in sums.items()}
    else:
        joined = torch.cat(list(sums.values())).tolist()
        assert [one for path in sums for one in found[path]] == best(joined, int(len(joined) * 0.6 + 0.5))


def test_n_of_m_are_the_best_of_their_group():
    model, old = dense(), dense()
    run(model, granularity="n:m", pattern=(1, 4), score="magnitude")
    for path, module in linears(old).items():
        groups = linear_map(module).T.detach().abs().reshape(-1, 4)
        assert torch.equal(mask_of(model.get_submodule(path)).reshape(-1, 4), rows_of(groups, 0.25))


@pytest.mark.parametrize("score", ["relevance", "magnitude", "wanda"])
def test_neurons_are_those_with_the_best_scores(score):
    """E |R| of the unit; the length of what it writes; that times how much it is active."""
    model, old = dense(), dense()
    run(model, granularity="neuron", sparsity=0.5, score=score)
    found, measured = products(old, FLOATS, None), norms(old, {"input_values": FLOATS}, torch.ones(40, 1).bool())
    for index in range(3):
        name = f"layers.{index}.mlp.down_proj"
        weight = weight_of(old.get_submodule(name))
        scores = (found[name] * weight).sum(dim=1).abs().mean(dim=0)
        if score != "relevance":
            scores = weight.norm(dim=0) * (measured[name] if score == "wanda" else 1)
        kept = torch.tensor(best(scores.tolist(), 10))
        assert torch.equal(model.layers[index].mlp.up_proj.weight, old.layers[index].mlp.up_proj.weight[kept])


def test_neurons_of_the_whole_model():
    """Widths then differ, and add up to the share."""
    model, old = dense(), dense()
    run(model, granularity="neuron", sparsity=0.5, score="magnitude", scope="model")
    norms_of = torch.stack([layer.mlp.down_proj.weight.detach().norm(dim=0) for layer in old.layers])
    kept = torch.tensor(best(norms_of.flatten().tolist(), 30)).view(3, 20)
    assert model.config.intermediate_size == kept.sum(dim=1).tolist()
    assert len(set(model.config.intermediate_size)) > 1


# --- bits by cost ----------------------------------------------------------------------------------------------------


def with_dead_units():
    """The first 8 of 16 hidden units of each block never do anything."""
    model = dense(hidden_size=16, intermediate_size=16, residual=True, use_bias=True)
    with torch.no_grad():
        for layer in model.layers:
            layer.mlp.up_proj.bias[:8] = -1e3
    return model


@pytest.mark.parametrize("allocation", ["fisher", "relevance", "error", "uniform"])
def test_more_bits_for_what_is_worth_more(allocation):
    """By what outputs feel, dead units' weights get the fewest there are; by error alone they are like any other."""
    model = run(with_dead_units(), bits=7.75, group_size=8, symmetric=True, allocation=allocation)  # 3 for steps
    dead, alive = [], []
    for layer in model.layers:
        up, down = layer.mlp.up_proj.bits.view(16, 2), layer.mlp.down_proj.bits.view(16, 2)
        dead += [*up[:8].flatten().tolist(), *down[:, 0].tolist()]
        alive += [*up[8:].flatten().tolist(), *down[:, 1].tolist()]
    if allocation in ("fisher", "relevance"):
        assert set(dead) == {2}
        assert sum(alive) / len(alive) > 7
    elif allocation == "error":
        assert abs(sum(alive) / len(alive) - sum(dead) / len(dead)) < 0.75
        assert len(set(alive)) > 1
    else:
        assert set(dead) | set(alive) == {4, 5}


def test_groups_with_larger_errors_get_more_bits():
    model = dense(hidden_size=16, intermediate_size=32, num_hidden_layers=1)
    with torch.no_grad():
        model.layers[0].mlp.up_proj.weight[:8] *= 20
    run(model, bits=8, group_size=8, symmetric=True, allocation="error")
    bits = model.layers[0].mlp.up_proj.bits.view(32, 2).float()
    assert float(bits[:8].mean()) > float(bits[8:].mean()) + 1


@pytest.mark.parametrize("bits", [4.0, 5.0])
def test_uniform_bits_are_all_the_same(bits):
    model = run(made("Llama"), bits=bits + 0.75, group_size=32, symmetric=True, allocation="uniform")
    assert {int(b) for m in stored(model, MixedPrecisionLinear).values() for b in m.bits} == {int(bits)}


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
    model = run(made("Llama"), sparsity=0.5, bits=4)
    notes = model.compression_report.notes
    assert notes["score"] == "relevance"
    for told in notes["linears"]:
        module = model.get_submodule(told["linear"])
        assert told["kept"] == pytest.approx(float(mask_of(module).float().mean()))
        assert sum(told["groups"].values()) == module.packing.groups
        assert {int(bits) for bits in told["groups"]} == set(module.bits.tolist())


# --- what is left makes up for what went ------------------------------------------------------------------------------


def lively(name):
    """Weights so large that blocks matter beside the stream, as in a trained model."""
    model = made(name)
    randomise(model, seed=3)
    return model


def off(name, **settings):
    """How far the outputs are from the original's."""
    model = lively(name)
    before = output(model)
    run(model, **settings)
    return float((output(model) - before).square().mean())


@pytest.mark.parametrize("name", ["Llama", "GPT-2", "Dense"])
@pytest.mark.parametrize(
    "settings",
    [
        {"sparsity": 0.3, "score": "magnitude"},
        {"sparsity": 0.3},
        {"granularity": "n:m", "pattern": (3, 4)},
        {"granularity": "neuron", "sparsity": 0.3},
    ],
    ids=str,
)
def test_compensation_brings_outputs_nearer(name, settings):
    assert off(name, **settings) < off(name, compensation="none", **settings)


@pytest.mark.parametrize("name", ["Llama", "GPT-2", "Dense"])
@pytest.mark.parametrize("allocation", ["fisher", "relevance", "uniform"])
def test_so_does_compensated_rounding(name, allocation):
    settings = {"bits": 4, "group_size": 32, "allocation": allocation}
    assert off(name, **settings) < 0.8 * off(name, rounding="nearest", **settings)


@pytest.mark.parametrize("name", ["Llama", "GPT-2"])
def test_without_compensation_the_rest_is_as_it_was(name):
    model, old = made(name), made(name)
    run(model, sparsity=0.5, compensation="none")
    for path, module in stored(model, SparseLinear).items():
        assert torch.equal(weight_of(module), weight_of(old.get_submodule(path)) * mask_of(module))
    model = run(made(name), bits=8.7, group_size=32, rounding="nearest")
    for path, module in stored(model, MixedPrecisionLinear).items():
        steps = module.steps.view(torch.bfloat16).float().view(module.out_features, -1)
        gaps = (weight_of(module) - weight_of(old.get_submodule(path))).abs().view(module.out_features, -1, 32)
        assert bool((gaps.amax(dim=2) <= 0.501 * steps).all())


def test_what_needs_no_data_works_without():
    model, old = made("Llama"), made("Llama")
    compress(model, LRPConfig(sparsity=0.5, score="magnitude", scope="row", compensation="none"))
    path = "model.layers.0.mlp.up_proj"
    assert torch.equal(mask_of(model.get_submodule(path)), rows_of(old.get_submodule(path).weight.abs(), 0.5))
    model = compress(made("Llama"), LRPConfig(bits=4, group_size=32, allocation="error", rounding="nearest"))
    assert stored(model, MixedPrecisionLinear)


# --- the same each time -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("granularity", ["weight", "neuron"])
def test_random_scores_are_those_of_their_seed(granularity):
    settings = {"sparsity": 0.5, "score": "random", "granularity": granularity}
    first, same, other = (output(run(made("Llama"), seed=seed, **settings)) for seed in (1, 1, 2))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


def test_settings_survive_json_and_the_variant_names_the_rest():
    config = LRPConfig(variant="paper", granularity="neuron", split=(8, 4), seed=3, temper=0)
    assert CompressionConfig.from_dict(json.loads(config.to_json())) == config
    assert config_class("lrp") is LRPConfig is hfc.LRPConfig
    assert (config.score_name, config.prunes, config.quantizes) == ("signed", True, True)
    config = LRPConfig(granularity="n:m", pattern=[1, 4])
    assert CompressionConfig.from_dict(json.loads(config.to_json())) == config
    assert (config.score_name, config.prunes, config.quantizes) == ("relevance", True, False)
    config = LRPConfig(bits=4)
    assert (config.prunes, config.quantizes) == (False, True)


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
    model = in_dtype(made("Llama"), dtype)
    run(model, **settings)
    maps = stored(model, SparseLinear)
    if "bits" not in settings and maps:
        assert {m.weight.dtype for m in maps.values()} == {dtype}
    assert output(model).dtype == dtype
    again = type(model).from_pretrained(save(model, tmp_path / "out"), dtype=dtype)
    assert torch.equal(output(again), output(model))


def test_half_precision_decides_almost_as_single_does():
    single, half = run(made("Llama"), sparsity=0.5), run(in_dtype(made("Llama"), torch.bfloat16), sparsity=0.5)
    same = [(mask == masks(half)[path]).float().mean() for path, mask in masks(single).items()]
    assert min(same) > 0.9


def test_attention_by_either_rule():
    """CP leaves queries and keys without relevance; there is still something to keep of them."""
    model, other = run(made("Llama"), sparsity=0.5, composite="cp"), run(made("Llama"), sparsity=0.5)
    found, full = masks(model), masks(other)
    assert found.keys() == full.keys()
    assert all(float(mask.float().mean()) == 0.5 for mask in found.values())
    assert any(not torch.equal(found[path], full[path]) for path in found)
    run(made("Llama"), bits=4, group_size=32, composite="cp")


@pytest.mark.parametrize("settings", [{"sparsity": 0.5}, PAPER, {"prune": False, "split": (8, 4)} | PAPER], ids=str)
@pytest.mark.parametrize("name", ["Llama", "GPT-2"])
def test_training_keeps_zeros_zero(name, settings, tmp_path):
    model = run(made(name), **settings)
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
    model.eval()
    assert_reloads(model, tmp_path / "out")


def test_packed_weights_count_as_parameters():
    """They are buffers, but a model is not smaller for that; weights that are left out are."""
    dense = sum(parameter.numel() for parameter in build("Llama").parameters())
    linear = sum(
        module.weight.numel() for _, module in build("Llama").model.layers.named_modules() if is_linear(module)
    )
    for settings, share in (
        ({"bits": 4}, 1),
        ({"variant": "paper", "prune": False, "split": (8, 4)}, 1),
        ({"sparsity": 0.5}, 0.5),
        ({"sparsity": 0.5, "bits": 4}, 0.5),
    ):
        model = compress(build("Llama"), LRPConfig(group_size=32, **settings), IDS, options=DataOptions(batch_size=8))
        assert parameter_count(model) == dense - (1 - share) * linear
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
        lambda config, context, *_: seen.extend(batch.real for batch in context.calibration) or Plan(),
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
    ids = torch.randint(4, 60, (32, 12), generator=torch.Generator().manual_seed(7))
    frozen, trained = build("Llama").requires_grad_(False), build("Llama")
    for model in (frozen, trained):
        compress(model, LRPConfig(**settings), ids, options=DataOptions(batch_size=8))
    assert all(torch.equal(value, trained.state_dict()[name]) for name, value in frozen.state_dict().items())
    assert not any(parameter.requires_grad for parameter in frozen.parameters())
    assert all(parameter.requires_grad for parameter in trained.parameters())
