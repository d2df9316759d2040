"""LayerCollapse in closed form: the maps against least squares by hand, the choice against brute force, bad input."""

import copy

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hf_compress.anatomy.anatomy import Anatomy, Block
from hf_compress.api.compress import compress, make_plan
from hf_compress.calibration.data import DataOptions, prepare
from hf_compress.errors import CalibrationError, UnsupportedModelError
from hf_compress.methods.layer_collapse import LayerCollapseConfig
from hf_compress.methods.layer_collapse.linear import fit_ffns
from hf_compress.rewrite.apply import apply
from hf_compress.rewrite.builders import linear_ffn
from hf_compress.rewrite.record import recorded
from tests.helpers.changes import Trace
from tests.helpers.models import assert_reloads, refusing, watching
from tests.helpers.round_trip import build, inputs
from tests.helpers.tiny import tiny_model

SMALL, EIGHT = DataOptions(batch_size=3), DataOptions(batch_size=8)


def data_of(model, samples=96):
    """Calibration data in twelve batches."""
    generator = torch.Generator().manual_seed(7)
    if model.main_input_name == "pixel_values":
        return prepare(torch.randn(samples, 3, 16, 16, generator=generator), model, None, EIGHT)
    return prepare(torch.randint(4, 90, (samples, 12), generator=generator), model, None, EIGHT)


def seen(model, data, reader, writer):
    """What an FFN reads and writes on every real token, batch by batch."""
    batches = []
    for batch in data:
        with torch.no_grad(), watching({"reader": reader, "writer": writer}) as found:
            model(**{k: v.long() if not v.is_floating_point() else v for k, v in batch.inputs.items()})
        x, y = found["reader"][0], found["writer"][1]
        real = batch.real if batch.real is not None else torch.ones(x.shape[:2], dtype=torch.bool)
        batches.append((x[real].double(), y[real].double()))
    return batches


FFNS = {
    "Llama": lambda block: (block.mlp.gate_proj, block.mlp.down_proj),
    "GPT-2": lambda block: (block.mlp.c_fc, block.mlp.c_proj),
    "BERT": lambda block: (block.intermediate.dense, block.output.dense),
    "ViT": lambda block: (block.mlp.fc1, block.mlp.fc2),
}


def ridge(rows, penalty):
    """The map and the bias that minimise the squared error plus the penalty times the mean variance of the inputs."""
    x, y = (torch.cat(part) for part in zip(*rows, strict=True))
    cx, cy = x - x.mean(0), y - y.mean(0)
    gram = cx.T @ cx
    weight = torch.linalg.solve(gram + penalty * gram.diagonal().mean() * torch.eye(len(gram)), cx.T @ cy)
    return weight, y.mean(0) - x.mean(0) @ weight


@pytest.mark.parametrize("penalty", [1e-3, 0.5])
@pytest.mark.parametrize("family", FFNS)
def test_the_map_is_ridge_regression_and_judged_on_what_it_has_not_seen(family, penalty):
    model = build(family)
    stack, data = Anatomy(model).stack(), data_of(model)
    fit = fit_ffns(model, stack, data, [1], penalty)[1]
    batches = seen(model, data, *FFNS[family](stack.blocks[1]))
    weight, bias = ridge(batches, penalty)
    assert torch.allclose(fit.maps[0].double(), weight, rtol=1e-4, atol=1e-6)
    assert torch.allclose(fit.bias, bias, atol=1e-6)
    weight, bias = ridge([rows for number, rows in enumerate(batches) if number % 4 != 3], penalty)
    x, y = (torch.cat(part) for part in zip(*batches[3::4], strict=True))
    error = (x @ weight + bias - y).square().sum()
    assert fit.r2 == pytest.approx(float(1 - error / (y - y.mean(0)).square().sum()), abs=1e-6)


@pytest.mark.parametrize("rank", [1, 5, 32])
def test_a_low_rank_is_the_best_of_its_rank(rank):
    """Of all maps of a rank, the one nearest to the full map's predictions: their truncated SVD."""
    model = build("Llama")
    stack, data = Anatomy(model).stack(), data_of(build("Llama"))
    full, low = (fit_ffns(model, stack, data, [1], 1e-3, rank=r)[1] for r in (None, rank))
    x = torch.cat([x for x, _ in seen(model, data, *FFNS["Llama"](stack.blocks[1]))])
    predicted = (x - x.mean(0)) @ full.maps[0].double()
    u, s, v = torch.linalg.svd(predicted, full_matrices=False)
    best = u[:, :rank] * s[:rank] @ v[:rank]
    assert [tuple(factor.shape) for factor in low.maps] == [(32, rank), (rank, 32)]
    assert torch.allclose((x - x.mean(0)) @ low.maps[0].double() @ low.maps[1].double(), best, atol=1e-6)


def test_what_is_left_unexplained_is_held_against_the_stream():
    model = build("Llama")
    stack, data = Anatomy(model).stack(), data_of(build("Llama"))
    fits = fit_ffns(model, stack, data, [0, 3], 1e-3)
    with torch.no_grad():
        stack.blocks[3].mlp.down_proj.weight *= 10
    assert fit_ffns(model, stack, data, [3], 1e-3)[3].in_stream == pytest.approx(100 * fits[3].in_stream, rel=1e-3)
    assert fit_ffns(model, stack, data, [3], 1e-3)[3].r2 == pytest.approx(fits[3].r2, abs=1e-4)


def test_a_linear_ffn_is_found_and_collapsed_without_loss():
    model = tiny_model("opt")
    model.model.decoder.layers[2].activation_fn = torch.nn.ReLU()
    with torch.no_grad():
        model.model.decoder.layers[2].fc1.bias += 1000  # far above zero, where ReLU is linear
    data = data_of(model)
    before = Trace.of(model)
    plan = make_plan(model, LayerCollapseConfig(target_r2=0.9999), torch.cat([b.inputs["input_ids"] for b in data]))
    assert before.difference(model) is None
    assert [step["block"] for step in plan.notes["collapsed"]] == [2]
    ids = torch.arange(4, 16)[None]
    with torch.no_grad():
        expected = model(ids).logits
        apply(plan, model)
        assert torch.allclose(model(ids).logits, expected, atol=1e-2, rtol=1e-3)


@pytest.mark.parametrize("criterion", ["stream", "loss", "linearity"])
def test_each_sees_the_errors_of_those_before(criterion, model, framing_tokenizer, texts):
    config = LayerCollapseConfig(num_layers=2, criterion=criterion)
    data = prepare(texts, model, framing_tokenizer, SMALL)
    plan = make_plan(model, config, texts, framing_tokenizer, SMALL)
    first, second = (step["block"] for step in plan.notes["collapsed"])
    stack = Anatomy(model).stack()
    fit = fit_ffns(model, stack, data, [first], config.penalty)[first]
    changed = copy.deepcopy(model)
    own = Anatomy(changed).stack()
    apply(linear_ffn(Block(changed, own, first), [fit.maps[0].float()], fit.bias.float()), changed)
    fit = fit_ffns(changed, Anatomy(changed).stack(), data, [second], config.penalty)[second]
    name = f"model.layers.{second}.mlp.down_proj"
    assert torch.equal(plan.tensors[f"{name}.weight"], fit.maps[0].float().T)
    assert plan.notes["collapsed"][1]["r2"][str(second)] == fit.r2


def test_the_loss_is_that_of_the_collapsed_model(model, framing_tokenizer, texts):
    config = LayerCollapseConfig(num_layers=1, criterion="loss", choice_samples=12)
    data = prepare(texts, model, framing_tokenizer, SMALL)
    (step,) = make_plan(model, config, texts, framing_tokenizer, SMALL).notes["collapsed"]
    fits = fit_ffns(model, Anatomy(model).stack(), data, list(range(5)), config.penalty)
    tried = sorted(fits, key=lambda index: fits[index].in_stream)[:3]
    assert {*step["cost"]} == {str(index) for index in tried}
    assert step["block"] == min(tried, key=lambda index: step["cost"][str(index)])
    for index, fit in ((index, fits[index]) for index in tried):
        changed = copy.deepcopy(model)
        apply(linear_ffn(Anatomy(changed).block(index), [fit.maps[0].float()], fit.bias.float()), changed)
        loss = count = 0.0
        for batch in data:
            ids = batch.inputs["input_ids"].long()
            with torch.no_grad():
                logits = changed(ids, attention_mask=batch.inputs["attention_mask"]).logits[:, :-1]
            real = batch.real[:, 1:]
            loss += torch.nn.functional.cross_entropy(logits[real], ids[:, 1:][real], reduction="sum").item()
            count += real.sum().item()
        assert step["cost"][str(index)] == pytest.approx(loss / count, rel=1e-5)


@pytest.mark.parametrize("family", FFNS)
def test_collapsed_models_load(family, tmp_path):
    model = build(family)
    data = torch.cat([batch.inputs[model.main_input_name] for batch in data_of(model)])
    compress(model, LayerCollapseConfig(ratio=0.5), data, options=EIGHT)
    assert [type(edit).__name__ for edit in recorded(model.config)][:2] == ["LinearFFN", "LinearFFN"]
    assert_reloads(model.eval(), tmp_path / "out", lambda one: one(**inputs(one)).logits)
    report = model.compression_report
    assert report.after.parameters < report.before.parameters


def test_all_of_them_and_with_a_rank(model, framing_tokenizer, texts, tmp_path):
    compress(model, LayerCollapseConfig(num_layers=5, rank=2), texts, framing_tokenizer, SMALL)
    loaded = assert_reloads(model, tmp_path / "out", lambda one: one(torch.arange(4, 16)[None]).logits)
    assert all(layer.mlp.up_proj.weight.shape[0] == 2 for layer in loaded.model.layers)


def refused(model, error, message, data=None, **settings):
    ids = torch.randint(4, 20, (96, 12)) if data is None else data
    with refusing(model, error, message):
        compress(model, LayerCollapseConfig(**settings), ids, options=EIGHT)


def test_models_and_data_that_do_not_fit(model):
    refused(
        tiny_model("mixtral"), UnsupportedModelError, "no FFN of model.layers .*: block 0 has experts", num_layers=1
    )
    refused(model, ValueError, "num_layers=6", num_layers=6)
    refused(model, ValueError, "no FFN has R² of at least 0.999999: block 0", target_r2=0.999999)
    message = "every 4th batch, or on the last, held out: give at least 2"
    refused(model, CalibrationError, message, torch.full((8, 6), 5), num_layers=1)
    compress(model, LayerCollapseConfig(num_layers=1), torch.randint(4, 20, (24, 12)), options=EIGHT)  # three do


def test_what_would_grow_is_refused():
    sizes = {"hidden_size": 32, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=99)).eval()
    message = "768 parameters, and the map would have 1,056"
    refused(model, UnsupportedModelError, message, num_layers=1)
    compress(model, LayerCollapseConfig(num_layers=1, rank=4), torch.randint(4, 90, (96, 12)), options=EIGHT)
