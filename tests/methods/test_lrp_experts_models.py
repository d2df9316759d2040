"""LRP on whole mixtures of experts: what is pruned and rounded, what is loaded again, and what is left as it was."""

import sys
from functools import cache

import pytest
import torch
from torch import nn

from hf_compress.anatomy.anatomy import Anatomy
from hf_compress.api.compress import compress, make_plan
from hf_compress.calibration.capture import forward as run_batch
from hf_compress.calibration.capture import inference
from hf_compress.calibration.data import DataOptions
from hf_compress.errors import UnsupportedModelError
from hf_compress.methods.lrp import LRPConfig, experts, weights
from hf_compress.methods.lrp.scores import watch_rows
from hf_compress.modules.experts import SeparateExperts
from hf_compress.modules.packed import MixedPrecisionLinear
from hf_compress.modules.sparse import SparseLinear
from hf_compress.plan.edits import RemoveBlocks
from hf_compress.plan.plan import Plan
from hf_compress.rewrite.apply import apply
from hf_compress.rewrite.builders import split_experts
from hf_compress.storage.save import save
from tests.helpers.changes import forward, generate
from tests.helpers.linears import IDS, buffer_bytes, lrp, mask_of, masks, stored, weight_of
from tests.helpers.mixtures import (
    BLOCKS,
    apart,
    batches_of,
    maps_of,
    mixtral,
    path_of,
    relevances_by_token,
)
from tests.helpers.models import assert_reloads, in_dtype, leftovers, refusing
from tests.helpers.plans import Before
from tests.helpers.round_trip import train
from tests.helpers.runs import same, state_of
from tests.helpers.stock import stock_outcomes
from tests.helpers.tiny import tiny_model


def output(model):
    return forward(model, {"input_ids": IDS})


def made(name):
    return tiny_model("gpt_oss") if name == "gpt_oss" else mixtral()


def experts_of(model, kind):
    """The maps of experts that are stored as a kind of module, by path."""
    return {path: module for path, module in stored(model, kind).items() if ".experts." in path}


def file_bytes(folder):
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


TEXTS = [{"input_ids": ids[None]} for ids in IDS]
BITS = {"bits": 4.5, "group_size": 16}
HALF = {"sparsity": 0.5}
N_OF_M = {"granularity": "n:m"}
PAPER = {"variant": "paper"}
WHOLE = {
    "bits": BITS,
    "sparse": HALF,
    "both": HALF | BITS,
    "rows": HALF | {"granularity": "row"},
    "n:m": N_OF_M,
    "n:m and bits": N_OF_M | BITS,
    "paper": PAPER,
    "paper, two precisions": PAPER | {"prune": False, "split": (8, 4), "group_size": 16},
    "per module": {"bits": 8.5, "group_size": 32, "per": "module"},
    "heads and bits": HALF | BITS | {"granularity": "head"},
    "by rows": HALF | {"scope": "row"},
    "in the whole model": HALF | {"scope": "model"},
}
CASES = [("mixtral", case) for case in WHOLE]
CASES += [("gpt_oss", case) for case in ("bits", "sparse", "both", "rows", "n:m", "n:m and bits", "by rows")]


def settings_of(name, case):
    """Relevance has no rule for the gate of GPT-OSS, which is a function; norms of inputs do."""
    return WHOLE[case] | ({"score": "wanda"} if name == "gpt_oss" and case != "bits" else {})


@pytest.fixture(scope="module")
def compressed(tmp_path_factory):
    """Each case once: the model, and where it is saved."""
    folder = tmp_path_factory.mktemp("experts")

    @cache
    def get(name, case):
        model = lrp(made(name), **settings_of(name, case))
        return model, save(model, folder / f"{name}, {case}")

    return get


@pytest.mark.parametrize(("name", "case"), CASES)
def test_experts_are_pruned_and_rounded_and_load_as_they_were_saved(name, case, compressed, tmp_path):
    model, folder = compressed(name, case)
    original = made(name)
    shapes = {path: (m.out_features, m.in_features) for path, m in maps_of(apart(made(name))).items()}
    kind = MixedPrecisionLinear if case in ("bits", "per module", "heads and bits") else SparseLinear
    found = experts_of(model, kind)
    assert {path: (m.out_features, m.in_features) for path, m in found.items()} == shapes
    assert not [p for p, m in model.named_modules() if type(m) is nn.Linear and ".experts." in p]
    assert all(p.ndim < 3 for p in model.parameters()), "the tensors of all experts are gone"
    packs = "bits" in WHOLE[case] or "split" in WHOLE[case]
    assert all((module.weight.dtype == torch.int8) == packs for module in found.values())
    if name == "gpt_oss":
        bias = original.model.layers[1].mlp.experts.gate_up_proj_bias[2]
        assert torch.equal(found[path_of(1, 2, "up")].bias, bias)
    assert not torch.equal(output(model), output(original))
    again = type(model).from_pretrained(folder)
    assert torch.equal(output(again), output(model))
    assert isinstance(again.model.layers[0].mlp.experts, SeparateExperts)
    original.save_pretrained(tmp_path / "original")
    assert file_bytes(folder) < 0.95 * file_bytes(tmp_path / "original")


@pytest.mark.parametrize(
    ("name", "case"),
    [(name, case) for name, case in CASES if "heads" not in case and {*WHOLE[case]} & {*HALF, *N_OF_M}],
)
def test_the_share_of_weights_that_go(name, case, compressed):
    model, _ = compressed(name, case)
    found = {path: mask for path, mask in masks(model).items() if ".experts." in path}
    for path, mask in found.items():
        if case != "in the whole model":
            assert int(mask.sum()) == mask.numel() // 2, path
        if case == "by rows":
            assert set(mask.sum(dim=1).tolist()) == {mask.shape[1] // 2}
        if "n:m" in case:
            assert set(mask.view(-1, 4).sum(dim=1).tolist()) == {2}
        if case == "rows":
            assert set(mask.sum(dim=1).tolist()) == {0, mask.shape[1]}
    joined = torch.cat([mask.flatten() for mask in masks(model).values()])
    assert abs(float(joined.double().mean()) - 0.5) < 1e-3
    if case == "in the whole model":
        assert len({float(mask.double().mean()) for mask in found.values()}) > 4


@pytest.mark.parametrize(
    ("name", "case"), [("mixtral", "bits"), ("mixtral", "both"), ("gpt_oss", "bits"), ("gpt_oss", "n:m and bits")]
)
def test_the_budget_counts_the_weights_of_all_experts(name, case, compressed):
    """All that is stored, beside biases, is within the bits asked for, of the linear maps and those of experts."""
    model, _ = compressed(name, case)
    linears = {path: m for path, m in apart(made(name)).named_modules() if isinstance(m, nn.Linear)}
    count = sum(m.weight.numel() for path, m in linears.items() if ".layers." in path)  # the router is no linear map
    aim = WHOLE[case]["bits"] * count / 8
    assert 0.97 * aim <= buffer_bytes(model) <= aim
    found = experts_of(model, (MixedPrecisionLinear, SparseLinear))
    assert len({int(bits) for module in found.values() for bits in module.bits}) > 1


@pytest.mark.parametrize("case", ["sparse", "both"])
def test_scores_decide_which_weights_of_an_expert_stay(case, compressed):
    """|w| · (E |R| / |w|) ** ¼, by the loop over tokens and texts."""
    model, _ = compressed("mixtral", case)
    _, absolute, _ = relevances_by_token(mixtral(), TEXTS)
    for path, module in maps_of(apart(mixtral())).items():
        size = module.weight.detach().double().abs()
        scores = (size * (absolute[path] / len(IDS) / size) ** 0.25).flatten()
        best = set(scores.argsort(descending=True)[: len(scores) // 2].tolist())
        own = set(mask_of(model.get_submodule(path)).flatten().nonzero().flatten().tolist())
        assert len(own) == len(best)
        assert len(own ^ best) <= 4, "but for ties and the rounding of sums"


def test_the_paper_keeps_what_has_a_positive_relevance(compressed):
    model, _ = compressed("mixtral", "paper")
    signed, _, _ = relevances_by_token(mixtral(), TEXTS)
    for path, module in maps_of(apart(mixtral())).items():
        own = model.get_submodule(path)
        mask = mask_of(own)
        sure = signed[path].abs() > 1e-4 * signed[path].abs().max()
        assert torch.equal(mask[sure], (signed[path] > 0)[sure])
        assert torch.equal(own.unpacked(), module.weight * mask), "and leaves it as it is"


def test_the_papers_two_precisions(compressed):
    model, _ = compressed("mixtral", "paper, two precisions")
    signed, _, _ = relevances_by_token(mixtral(), TEXTS)
    for path, module in maps_of(apart(mixtral())).items():
        own = model.get_submodule(path)
        upper = mask_of(own)
        assert abs(float(upper.double().mean()) - 0.5) < 0.02
        gaps = (own.unpacked() - module.weight.detach()).abs()
        assert float(gaps[upper].mean()) < 0.3 * float(gaps[~upper].mean())
        if bool(signed[path].any()):
            assert float(signed[path][upper].min()) >= float(signed[path][~upper].max()) - 1e-4


@pytest.mark.parametrize(("settings", "plain"), [(HALF, {"compensation": "none"}), (BITS, {"rounding": "nearest"})])
def test_compensated_weights_of_experts_are_nearer(settings, plain):
    """With what an expert reads, and not what all tokens are; in its own outputs."""
    split, rows = apart(mixtral()), {}
    (batch,) = batches_of(split, IDS, len(IDS))
    with inference(split), watch_rows(Anatomy(split).stack(), batch, maps_of(split), rows.__setitem__):
        run_batch(split, batch)
    assert rows.keys() == maps_of(split).keys()
    first, second = (lrp(mixtral(), **settings, **more) for more in ({}, plain))
    for path, module in maps_of(split).items():
        if ".layers.0." in path and path.endswith("up"):  # which reads the same in all
            changes = (weight_of(model.get_submodule(path)) - weight_of(module) for model in (first, second))
            better, worse = (float((rows[path] @ change.T).square().mean()) for change in changes)
            assert better < worse


@pytest.mark.parametrize("case", ["bits", "both", "rows"])
def test_half_precision(case, tmp_path):
    single, model = (lrp(one, **WHOLE[case]) for one in (mixtral(), in_dtype(mixtral(), torch.bfloat16)))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert_reloads(model, tmp_path / "out", output, dtype=torch.bfloat16)
    for path, mask in masks(model).items():
        alike = float((mask == masks(single)[path]).double().mean())
        assert alike > (0.6 if case == "rows" else 0.9), "it decides almost as single precision does"
    for path, module in experts_of(model, (MixedPrecisionLinear, SparseLinear)).items():
        if "bits" in WHOLE[case]:
            first, second = (m.bits.double().mean() for m in (module, single.get_submodule(path)))
            assert abs(float(first - second)) < 0.5


@pytest.mark.parametrize("settings", [BITS, HALF, HALF | BITS], ids=str)
def test_experts_that_single_batches_do_not_reach(settings, tmp_path):
    """Texts of two tokens, one in a batch, and few of them scored: what is known of an expert differs by the batch."""
    read, split = set(), apart(mixtral())
    for path, module in maps_of(split).items():
        module.register_forward_pre_hook(lambda *_, path=path: read.add(path))
    split(input_ids=IDS[:1, :2])
    assert len(read) < 2 * 4 * BLOCKS
    model = mixtral()
    compress(model, LRPConfig(tokens=3, **settings), IDS[:12, :2], options=DataOptions(batch_size=1))
    assert len(experts_of(model, (MixedPrecisionLinear, SparseLinear))) == 2 * 4 * BLOCKS
    assert_reloads(model, tmp_path / "out", output)


def test_training_goes_on_and_keeps_zeros_zero(tmp_path):
    model = lrp(mixtral(), **HALF)
    before = {path: module.unpacked().detach() for path, module in experts_of(model, SparseLinear).items()}
    train(model)
    for path, module in experts_of(model, SparseLinear).items():
        after = module.unpacked().detach()
        assert not after[~mask_of(module)].any()
        assert not torch.equal(after, before[path])
    again = assert_reloads(model.eval(), tmp_path / "out", output)
    assert torch.equal(generate(again, {"input_ids": IDS[:2]}), generate(model, {"input_ids": IDS[:2]}))


# --- without the plugin -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_stock_transformers_stops(compressed, tmp_path):
    cases = [("mixtral", case) for case in ("bits", "sparse", "both", "rows", "paper", "heads and bits")]
    folders = [str(compressed(*case)[1]) for case in [*cases, ("gpt_oss", "bits"), ("gpt_oss", "rows")]]
    assert stock_outcomes(folders, tmp_path) == dict.fromkeys(folders, 2 * ["size mismatch"])


# --- the same each time, and nothing left behind ----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
@pytest.mark.parametrize("case", ["bits", "both"])
def test_one_seed_one_result(name, case, compressed):
    first, _ = compressed(name, case)
    torch.manual_seed(99)
    again = lrp(made(name), **settings_of(name, case))
    assert same(state_of(again), state_of(first))


@pytest.mark.parametrize("case", ["bits", "sparse", "both", "paper", "heads and bits"])
def test_a_plan_is_made_without_a_trace_and_is_what_compress_does(case, compressed):
    model = mixtral()
    before = Before.of(model)
    plan = make_plan(model, LRPConfig(**WHOLE[case]), IDS, options=DataOptions(batch_size=8))
    before.check(model)
    assert leftovers(model) == []
    apply(plan, model)
    assert torch.equal(output(model), output(compressed("mixtral", case)[0]))


@pytest.mark.parametrize("case", ["bits", "sparse"])
def test_what_is_apart_already_gets_the_same(case, compressed, caplog):
    model = mixtral()
    for index in range(BLOCKS):
        apply(split_experts(model, f"model.layers.{index}.mlp.experts"), model)
    lrp(model, **WHOLE[case])
    assert "stay as they are" not in caplog.text
    expected = compressed("mixtral", case)[0]
    assert torch.equal(output(model), output(expected))
    assert state_of(model).keys() == state_of(expected).keys()


def test_blocks_that_go_afterwards(tmp_path):
    model = lrp(mixtral(), **BITS)
    apply(Plan((RemoveBlocks("model.layers", (0,)),)), model)
    again = assert_reloads(model, tmp_path / "out", output)
    assert len(experts_of(again, MixedPrecisionLinear)) == 8


def unchanged(model, error, message, **settings):
    before = Before.of(model)
    with refusing(model, error, message):
        lrp(model, **settings)
    before.check(model)
    assert leftovers(model) == []
    assert not hasattr(model, "compression_report")


@pytest.mark.parametrize(
    ("name", "message", "settings"),
    [
        ("mixtral", "bits=3 leaves 1.00 bits for each weight", {"bits": 3, "group_size": 16}),
        ("mixtral", "do not come in groups of 5", {"granularity": "n:m", "pattern": (2, 5)}),
        ("mixtral", "have experts|has experts", HALF | {"granularity": "neuron"}),
        ("gpt_oss", "relevance is lost or made up", HALF),
        ("gpt_oss", "relevance is lost or made up", PAPER),
        ("gpt_oss", "relevance is lost or made up", BITS | {"allocation": "relevance"}),
    ],
    ids=str,
)
def test_a_refusal_leaves_the_model_as_it_was(name, message, settings):
    unchanged(made(name), (ValueError, UnsupportedModelError), message, **settings)


@pytest.mark.parametrize("error", [RuntimeError("broken"), KeyboardInterrupt("stop")], ids=["error", "interrupt"])
@pytest.mark.parametrize("where", ["solve", "apply", "split"])
def test_a_failure_leaves_the_model_as_it_was(where, error, monkeypatch):
    calls = []

    def fail(*args, **kwargs):
        calls.append(args)
        raise error

    place = {
        "solve": (weights, "solve_masked"),
        "apply": (sys.modules["hf_compress.rewrite.apply"], "check_parity"),
        "split": (experts, "_check_same"),
    }
    monkeypatch.setattr(*place[where], fail)
    unchanged(mixtral(), type(error), str(error), **HALF)
    assert calls


def test_experts_that_would_not_write_the_same_are_refused(monkeypatch):
    """Before anything is scored, and with the path of the mixture."""
    own = SeparateExperts.forward
    monkeypatch.setattr(SeparateExperts, "forward", lambda *args: 1.01 * own(*args))
    unchanged(
        mixtral(),
        UnsupportedModelError,
        r"the experts of model\.layers\.0\.mlp\.experts write something else .*by 0\.01",
        **HALF,
    )


def test_experts_that_cannot_be_taken_apart_stay_as_they_are(caplog, tmp_path):
    model, original = tiny_model("llama4_text"), tiny_model("llama4_text")
    lrp(model, score="magnitude", **HALF)
    assert "tensors of three dimensions stay as they are" in caplog.text
    mixtures = [path for path, module in original.named_modules() if type(module).__name__ == "Llama4TextExperts"]
    assert mixtures
    for path in mixtures:
        assert path in caplog.text
        for name, tensor in original.get_submodule(path).named_parameters():
            assert torch.equal(model.get_submodule(path).get_parameter(name), tensor)
    assert stored(model, SparseLinear)
    assert_reloads(model, tmp_path / "out", output)
