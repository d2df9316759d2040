"""Linear maps that read tokens of all samples in one dimension, as shared experts do, and Gram matrices in parts."""

import pytest
import torch

from hf_compress.anatomy.anatomy import Anatomy
from hf_compress.anatomy.parts import is_linear
from hf_compress.api.compress import compress
from hf_compress.attribution.scores import _Sums
from hf_compress.calibration.capture import forward, inference
from hf_compress.calibration.data import Batch, Calibration, DataOptions, prepare
from hf_compress.calibration.memory import WorkingMemory, working_within
from hf_compress.calibration.sweep import start_pairs
from hf_compress.methods.base.context import CalibrationContext
from hf_compress.methods.lrp import LRPConfig, error_costs, scores
from hf_compress.methods.lrp import grams as lrp_grams
from hf_compress.methods.lrp.grams import _ReadApart, _Shared, grams_of, in_parts, sharing
from hf_compress.methods.lrp.linears import block_linears, linears_of
from hf_compress.methods.lrp.scores import part_of_tokens, watch_rows
from hf_compress.numerics.moments import Moments
from tests.helpers.tiny import tiny_model

SHARED = "model.layers.0.mlp.shared_expert.up_proj"
IDS = torch.randint(8, 90, (3, 7), generator=torch.Generator().manual_seed(1))
LENGTHS = torch.tensor([7, 4, 2])
MASK = (torch.arange(7) < LENGTHS[:, None]).long()


def batch_of(model, ids=IDS, mask=MASK):
    inputs = {"input_ids": ids, "attention_mask": mask}
    (batch,) = prepare(inputs, model, None, DataOptions(batch_size=8)).batches
    return batch


def rows_of(model, batch):
    """What the shared expert of the first block reads at real tokens."""
    seen = []
    maps = {SHARED: model.get_submodule(SHARED)}
    with inference(model), watch_rows(Anatomy(model).stack(), batch, maps, lambda path, rows: seen.append(rows)):
        forward(model, batch)
    (rows,) = seen
    return rows


def test_padding_is_left_out_where_tokens_are_in_one_dimension():
    model = tiny_model("qwen2_moe")
    given = []
    model.get_submodule(SHARED).register_forward_pre_hook(lambda module, args: given.append(args[0].shape))
    rows = rows_of(model, batch_of(model))
    assert given == [(21, 64)], "or the family has changed, and this tests nothing"
    alone = [rows_of(model, batch_of(model, IDS[i : i + 1, :n], MASK[i : i + 1, :n])) for i, n in enumerate(LENGTHS)]
    torch.testing.assert_close(rows, torch.cat(alone), rtol=1e-4, atol=1e-5)


def test_relevances_are_summed_over_the_tokens_of_a_sample_first():
    """No family with such maps has rules for all that it does, so this looks at the sums alone."""
    given, gradient = (torch.randn(3, 7, n, generator=torch.Generator().manual_seed(n)) for n in (4, 5))
    found = []
    for shape in ((3, 7), (21,)):
        sums = _Sums({"map": torch.nn.Linear(4, 5)}, signed=True, absolute=True)
        sums.samples = 3
        sums.take_weights("map", given.view(*shape, 4), gradient.view(*shape, 5))
        found.append((sums.weights["signed"]["map"], sums.weights["absolute"]["map"]))
    expected = torch.einsum("sto,sti->soi", gradient, given)
    for signed, absolute in found:
        torch.testing.assert_close(signed, expected.sum(dim=0))
        torch.testing.assert_close(absolute, expected.abs().sum(dim=0))


@pytest.mark.parametrize(
    ("asked", "tokens", "part"),
    [(32768, 50000, 16384), (32768, 20000, 10000), (32768, 6000, 4096), (32768, 3000, 3000), (1000, 50000, 1000)],
)
def test_errors_are_weighed_on_half_of_the_tokens_but_not_on_few(asked, tokens, part):
    batches = [Batch({"input_ids": torch.zeros(1, 1)}, torch.ones(1, tokens, dtype=torch.bool))]
    context = CalibrationContext(None, Calibration(batches))
    assert part_of_tokens(context, asked, error_costs.WEIGHED) == part


@pytest.mark.parametrize(
    ("settings", "batches"),
    [
        ({"bits": 5, "group_size": 16}, 4),
        ({"bits": 5, "group_size": 16, "allocation": "relevance"}, 8),
        ({"sparsity": 0.5}, 8),
        ({"sparsity": 0.5, "granularity": "neuron"}, 8),
    ],
)
def test_bits_are_given_by_half_of_the_tokens_and_what_goes_by_all(settings, batches, monkeypatch):
    monkeypatch.setattr(scores, "_FEW", 1)
    seen = []

    def counting(function, batches_of):
        def counted(*args, **kwargs):
            seen.append(len(batches_of(*args)))
            return function(*args, **kwargs)

        return counted

    of_relevance = counting(scores.relevance_sums_by_blocks, lambda model, stack, batches, *_: batches)
    monkeypatch.setattr(scores, "relevance_sums_by_blocks", of_relevance)
    monkeypatch.setattr(error_costs, "energies", counting(error_costs.energies, lambda streams, *_: streams.runners))
    ids = torch.randint(8, 90, (8, 16), generator=torch.Generator().manual_seed(3))
    compress(tiny_model("llama"), LRPConfig(**settings), ids, options=DataOptions(batch_size=1))
    assert seen == [batches]


@pytest.mark.parametrize("settings", [{"bits": 5, "group_size": 16}, {"sparsity": 0.5}])
def test_gram_matrices_in_parts(settings):
    whole = compress(tiny_model("mixtral"), LRPConfig(**settings), IDS).state_dict()
    linears = {path: m for path, m in tiny_model("mixtral").named_modules() if is_linear(m) and "layers.0" in path}
    with working_within(WorkingMemory(sums=3 * 8 * 64**2)):
        assert [len(part) for part in in_parts(linears)] == [3, 1], "queries, keys and values; what attention writes"
        in_parts_too = compress(tiny_model("mixtral"), LRPConfig(**settings), IDS).state_dict()
    for name, tensor in in_parts_too.items():
        assert torch.equal(tensor, whole[name])


# --- Gram matrices of what several maps read -------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [0, 1])
def test_processes_in_which_other_experts_run_have_grams_in_one_order(rank, monkeypatch):
    """Or they would take turns with different ones."""
    own = [(["b", "c"], {"b": "b", "c": "c"}), (["c", "a"], {"c": "c", "a": "a"})]
    sums, first = {path: Moments(4) for path in own[rank][0]}, own[rank][1]
    everywhere = [(True, apart, dict.fromkeys(paths, (4, torch.float64, "cpu"))) for paths, apart in own]
    monkeypatch.setattr(lrp_grams, "here", lambda: (rank, 2))
    monkeypatch.setattr(lrp_grams, "told", lambda _: everywhere)
    monkeypatch.setattr(lrp_grams, "_sums_of", lambda *_, **__: (sums, first))
    monkeypatch.setattr(Moments, "reduce", lambda *_: None)
    assert list(grams_of(None, 0, dict.fromkeys("bca"), [])) == ["b", "c", "a"]


def grams_and_rows(model, onwards=False):
    """Of the first block on three batches; the rows that each map read, and the streams afterwards."""
    data, stack = prepare(IDS, model, None, DataOptions(batch_size=1)), Anatomy(model).stack()
    maps, read = linears_of(stack, 0, block_linears(stack)), {}

    def keep(path):
        return lambda module, args: read.setdefault(path, []).append(args[0].flatten(0, -2))

    with inference(model):
        pairs = start_pairs(model, stack, data, data.tokens)
        handles = [module.register_forward_pre_hook(keep(path)) for path, module in maps.items()]
        grams = grams_of(stack, 0, maps, pairs, onwards)
        for handle in handles:
            handle.remove()
        past = [pair.runner.run(0, pair.original) for pair in pairs]
    return grams, read, pairs, past


@pytest.mark.parametrize("onwards", [False, True])
def test_maps_that_read_one_tensor_have_one_gram(onwards):
    grams, read, pairs, past = grams_and_rows(tiny_model("llama"), onwards)
    names = [[path.rpartition(".")[2] for path in paths] for paths in sharing(grams)]
    assert names == [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]
    for path, gram in grams.items():
        rows = torch.cat(read[path]).double()
        torch.testing.assert_close(gram.double(), rows.T @ rows, rtol=1e-4, atol=1e-5)
    for pair, after in zip(pairs, past, strict=True):
        assert torch.equal(pair.compressed, after if onwards else pair.original)


def test_sums_are_begun_once_for_all_batches(monkeypatch):
    """Each takes a matrix of the width of its layer."""
    begun = []

    def counted(*args):
        begun.append(args)
        return Moments(*args)

    monkeypatch.setattr(lrp_grams, "Moments", counted)
    grams, _, pairs, _ = grams_and_rows(tiny_model("llama"))
    assert len(begun) == len(sharing(grams)) < len(sharing(grams)) * len(pairs)


def test_maps_that_do_not_always_read_one_tensor_have_grams_of_their_own():
    """Values read another tensor in every second batch, so that all grams are made once more, each alone."""
    model, calls = tiny_model("llama"), []

    def other(module, args):
        calls.append(None)
        return (2 * args[0],) if len(calls) % 2 == 0 else None

    model.model.layers[0].self_attn.v_proj.register_forward_pre_hook(other)
    grams, read, _, _ = grams_and_rows(model)
    assert [len(paths) for paths in sharing(grams)] == [1] * 7
    for path, gram in grams.items():
        rows = torch.cat(read[path][-3:]).double()
        torch.testing.assert_close(gram.double(), rows.T @ rows, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("settings", ["", "onwards", "some maps"])
def test_nobody_asks_what_the_last_map_gives(settings):
    """From the second of three batches on; but not where the streams move on, or where other maps may come after it."""
    model, calls = tiny_model("llama"), []
    last = model.model.layers[0].mlp.down_proj
    own = last.forward
    vars(last)["forward"] = lambda given: calls.append(None) or own(given)
    data, stack = prepare(IDS, model, None, DataOptions(batch_size=1)), Anatomy(model).stack()
    maps = linears_of(stack, 0, block_linears(stack))
    if settings == "some maps":
        del maps["model.layers.0.self_attn.q_proj"]
    with inference(model):
        grams_of(stack, 0, maps, start_pairs(model, stack, data, 21), settings == "onwards")
    assert len(calls) == (3 if settings else 1)


def test_maps_that_run_in_another_order_later_have_grams_of_their_own():
    """On the second batch attention reads what the FFN has written, which is not to be left out then."""
    model, calls = tiny_model("llama"), []
    block = model.model.layers[0]
    own = block.forward

    def turned(stream, **kwargs):
        calls.append(None)
        more = block.mlp(block.post_attention_layernorm(stream)) if len(calls) == 2 else 0
        return own(stream + more, **kwargs)

    vars(block)["forward"] = turned
    grams, read, _, _ = grams_and_rows(model)
    assert [len(paths) for paths in sharing(grams)] == [1] * 7
    for path, gram in grams.items():
        rows = torch.cat(read[path][-3:]).double()
        torch.testing.assert_close(gram.double(), rows.T @ rows, rtol=1e-4, atol=1e-5)


def test_a_map_that_runs_less_often_shares_nothing():
    shared = _Shared()
    one, two = torch.zeros(1), torch.zeros(1)  # two tensors that are alike
    assert [shared.is_new("a", one), shared.is_new("b", one), shared.is_new("a", two)] == [True, False, True]
    with pytest.raises(_ReadApart):
        shared.checked()
