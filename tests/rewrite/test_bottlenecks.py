"""Bottlenecks in a file, spliced into a model for a while and for good, and the streams that they read."""

import json
from contextlib import closing

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import hf_compress as hfc
from hf_compress.calibration.data import prepare
from hf_compress.modules.bottleneck import Bottleneck, Form
from hf_compress.rewrite.apply import apply
from hf_compress.rewrite.bottlenecks import Bottlenecks, FittedBottleneck
from tests.helpers.ffns import hooked
from tests.helpers.models import in_dtype, leftovers
from tests.helpers.plans import Before, refused_without_trace
from tests.helpers.tiny import tiny_inputs, tiny_model, tiny_seq2seq_model

HIDDEN = 16
FORMS = {
    "kept": Form(),
    "lost": Form(0.1, "lost"),
    "none": Form(0.0, "none"),
    "gated": Form(0.3, "kept", gated=True),
    "top": Form(0.0, "kept", "top", 3),
    "above": Form(0.0, "kept", "above"),
}


@torch.no_grad()
def place(form=None, hidden=HIDDEN, width=5, features=21, seed=0, **more):
    """A bottleneck with random tensors, which has kept some of its features."""
    module, generator = Bottleneck(hidden, width, form or Form()), torch.Generator().manual_seed(seed)
    for tensor in module.state_dict().values():
        tensor.copy_(torch.randn(tensor.shape, generator=generator) / 3)
    kept = torch.randperm(features, generator=generator)[:width].sort().values
    return FittedBottleneck(module.requires_grad_(False), torch.randn(features, generator=generator), kept, **more)


def behind(*layers, stack="model.layers", **options):
    places = {layer: place(seed=layer, **options) for layer in layers}
    return Bottlenecks(stack, places, {"method": "adaptive_compress", "layers": list(layers)}, 1234)


# --- in a file --------------------------------------------------------------------------------------------------------


def same(found, expected):
    assert (found.stack, found.config, found.tokens) == (expected.stack, expected.config, expected.tokens)
    assert found.layers == expected.layers
    for layer, place in expected.places.items():
        mine = found.places[layer]
        assert mine.module.form == place.module.form
        own, theirs = mine.module.state_dict(), place.module.state_dict()
        assert list(own) == list(theirs)
        for name, tensor in theirs.items():
            assert own[name].dtype == tensor.dtype
            assert torch.equal(own[name], tensor), name
        assert torch.equal(mine.importance, place.importance)
        assert torch.equal(mine.kept, place.kept)
        assert mine.kept.dtype == torch.long
        assert (mine.curve, mine.stopped) == (place.curve, place.stopped)


def test_every_form_comes_back_bit_for_bit(tmp_path):
    curve = {"step": [0, 1], "retention": [0.999, 0.1 + 0.2], "error": [1 / 3, 1e-30], "active": [16.0, 3.5]}
    places = {10 * n: place(form, seed=n, curve=curve) for n, form in enumerate(FORMS.values())}
    places[7] = place(width=21, stopped="diverged in step 3")
    expected = Bottlenecks("model.layers", places, {"skip": 0.1, "layers": [1, 2]}, 99)
    folder = tmp_path / "not" / "there" / "yet"
    assert expected.save(folder).parent == folder
    same(Bottlenecks.load(str(folder)), expected)


@pytest.mark.parametrize("features", [1, 7, 8, 9, 64])
def test_kept_features_of_any_number(tmp_path, features):
    for width in {1, features // 2 or 1, features}:
        expected = Bottlenecks("model.layers", {0: place(width=width, features=features)}, {})
        expected.save(tmp_path)
        same(Bottlenecks.load(tmp_path), expected)


def test_saving_leaves_one_file_and_replaces_an_older_one(tmp_path):
    behind(1).save(tmp_path)
    path = behind(2, 0).save(tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
    assert Bottlenecks.load(tmp_path).layers == [0, 2]


def test_a_save_that_fails_leaves_the_older_file(tmp_path, monkeypatch):
    behind(1).save(tmp_path)
    monkeypatch.setattr(
        "hf_compress.numerics.tensor_file.save_file", lambda *_, **__: (_ for _ in ()).throw(OSError("full"))
    )
    with pytest.raises(OSError, match="full"):
        behind(2).save(tmp_path)
    assert Bottlenecks.load(tmp_path).layers == [1]


def test_a_folder_without_them_is_refused(tmp_path):
    with pytest.raises(ValueError, match="has no"):
        Bottlenecks.load(tmp_path)


def test_a_newer_version_or_another_file_is_refused(tmp_path):
    path = behind(1).save(tmp_path)
    with safe_open(path, framework="pt") as file:
        facts = json.loads(file.metadata()["hf_compress"])
    for metadata in ({"hf_compress": json.dumps(facts | {"version": 2})}, None):
        save_file({"x": torch.zeros(1)}, path, metadata)
        with pytest.raises(ValueError, match="version"):
            Bottlenecks.load(tmp_path)


def test_what_fit_gives_comes_back_and_so_do_its_settings(tmp_path, model, ids):
    config = hfc.AdaptiveCompressConfig(layers=(1, 3), retention_final=0.5, decay_steps=0)
    fitted = hfc.fit(model, config, ids)
    fitted.save(tmp_path)
    found = Bottlenecks.load(tmp_path)
    fitted.config = json.loads(json.dumps(fitted.config))
    same(found, fitted)
    assert type(config).from_dict(found.config) == config


def test_what_is_loaded_learns_no_more_than_what_was_saved(tmp_path):
    expected = behind(1)
    expected.save(tmp_path)
    found = Bottlenecks.load(tmp_path).places[1].module
    assert not any(parameter.requires_grad for parameter in expected.places[1].module.parameters())
    assert not any(parameter.requires_grad for parameter in found.parameters())


# --- in a model -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def logits(model, ids):
    return model(input_ids=ids).logits


@pytest.mark.parametrize("form", ["kept", "lost", "none", "top", "above"])
def test_spliced_for_a_while_is_applied_for_good(model, ids, form):
    found = behind(0, 2, 4, form=FORMS[form])
    plain = logits(model, ids)
    before = Before.of(model)
    with found.spliced(model):
        spliced = logits(model, ids)
    before.check(model)
    assert torch.equal(logits(model, ids), plain)
    apply(found.plan(model), model)
    assert torch.equal(logits(model, ids), spliced)
    assert not torch.allclose(spliced, plain, atol=0.1)


@pytest.mark.parametrize("model_type", ["gpt2", "opt", "qwen3"])
def test_spliced_is_applied_in_other_models(model_type):
    model = tiny_model(model_type)
    stack = {"gpt2": "transformer.h", "opt": "model.decoder.layers", "qwen3": "model.layers"}[model_type]
    found, ids = behind(0, 1, stack=stack, hidden=64), tiny_inputs(model)["input_ids"]
    with found.spliced(model):
        spliced = logits(model, ids)
    assert not leftovers(model)
    apply(found.plan(model), model)
    assert torch.equal(logits(model, ids), spliced)


def test_a_plan_takes_tensors_and_leaves_the_bottlenecks_alone(model, ids):
    found, twin = behind(1), behind(1)
    apply(found.plan(model), model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    same(found, twin)


def test_what_a_plan_says_of_its_bottlenecks(model):
    found = behind(1, 3)
    found.places[3] = place(curve={"error": [0.5, 0.25], "active": []}, stopped="diverged")
    notes = found.plan(model).notes
    assert notes["tokens"] == 1234
    json.dumps(notes)
    first, third = notes["bottlenecks"]["1"], notes["bottlenecks"]["3"]
    assert [first[name] for name in ("features", "of", "stopped")] == [5, 21, ""]
    assert [third[name] for name in ("features", "of", "stopped", "error")] == [5, 21, "diverged", 0.25]
    assert "active" not in third


def test_some_of_them_are_spliced_alone(model, ids):
    with behind(1, 3).spliced(model, [3]):
        some = logits(model, ids)
    with behind(3).spliced(model):
        assert torch.equal(logits(model, ids), some)
    with behind(1, 3).spliced(model):
        assert not torch.equal(logits(model, ids), some)


def test_a_splice_ends_on_an_error_too(model, ids):
    plain, found = logits(model, ids), behind(1)
    with pytest.raises(KeyboardInterrupt), found.spliced(model):
        raise KeyboardInterrupt
    assert not leftovers(model)
    assert torch.equal(logits(model, ids), plain)


def test_splicing_where_there_is_no_bottleneck_leaves_no_hook(model):
    with pytest.raises(KeyError), behind(1).spliced(model, [1, 2]):
        pass
    assert not leftovers(model)


def test_in_bfloat16_the_stream_is_squeezed_in_float32(model, ids):
    model = in_dtype(model, torch.bfloat16)
    found, seen = behind(1), []
    handle = model.model.layers[2].register_forward_pre_hook(lambda block, args: seen.append(args[0]))
    logits(model, ids)
    with found.spliced(model):
        logits(model, ids)
    handle.remove()
    assert seen[1].dtype == torch.bfloat16
    assert torch.equal(seen[1], found.places[1].module(seen[0].float()).bfloat16())


def test_gradients_flow_through_a_splice_to_the_model(model, ids):
    found = behind(1)
    with found.spliced(model):
        model(input_ids=ids).logits.square().mean().backward()
    assert model.model.layers[0].mlp.up_proj.weight.grad.abs().max() > 0
    assert found.places[1].module.encoder.grad is None


# --- streams ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def streams_by_hand(model, batch, layers):
    kept = {}
    handles = [
        model.model.layers[layer].register_forward_hook(lambda b, a, out, layer=layer: kept.update({layer: out}))
        for layer in layers
    ]
    with hooked(*handles):
        model(input_ids=batch.inputs["input_ids"].long(), attention_mask=batch.inputs["attention_mask"].long())
    return kept


def test_streams_are_those_of_hooks_and_masks_those_of_real_tokens(model, calibration):
    read = [(layer, stream.clone(), real.clone()) for layer, stream, real in behind(3, 0).read(model, calibration)]
    assert [layer for layer, _, _ in read] == [0, 3] * len(calibration)
    words = 0
    for number, batch in enumerate(calibration):
        expected = streams_by_hand(model, batch, (0, 3))
        for layer, stream, real in read[2 * number : 2 * number + 2]:
            torch.testing.assert_close(stream, expected[layer], rtol=0, atol=0)
            ids = batch.inputs["input_ids"]
            assert real.tolist() == [[token >= 4 for token in text] for text in ids.tolist()]
            words += int(real.sum())
    assert words == 2 * 92


def test_streams_of_a_bfloat16_model_are_float32(model, calibration):
    model = in_dtype(model, torch.bfloat16)
    for layer, stream, _ in behind(1).read(model, calibration):
        assert (layer, stream.dtype) == (1, torch.float32)


def test_blocks_behind_the_last_are_not_run(model, calibration):
    calls = []
    for index, block in enumerate(model.model.layers):
        block.register_forward_pre_hook(lambda block, args, index=index: calls.append(index))
    list(behind(0, 2).read(model, calibration))
    assert calls == [0, 1, 2] * len(calibration)


def test_the_model_is_as_it_was_once_all_is_read(model, calibration):
    model.train()
    model.model.layers[1].eval()
    modes, before = [module.training for module in model.modules()], Before.of(model)
    assert len(list(behind(1, 2).read(model, calibration))) == 2 * len(calibration)
    before.check(model)
    assert [module.training for module in model.modules()] == modes


def test_a_read_that_is_given_up_leaves_no_hook(model, calibration):
    streams = behind(1, 2).read(model, calibration)
    next(streams)
    streams.close()
    assert not leftovers(model)
    assert torch.is_grad_enabled()


def test_whoever_reads_can_learn_from_what_it_reads(model, calibration):
    probe = torch.nn.Linear(HIDDEN, 1)
    with closing(behind(1).read(model, calibration)) as streams:
        for _, stream, real in streams:
            probe(stream[real]).square().mean().backward()
    assert probe.weight.grad.abs().max() > 0


def test_the_model_can_be_used_between_two_streams(model, calibration, ids):
    plain = logits(model, ids)
    with closing(behind(1).read(model, calibration)) as streams:
        next(streams)
        assert torch.equal(logits(model, ids), plain)


def test_the_decoder_of_an_encoder_decoder_has_its_tokens_one_place_to_the_right():
    model = tiny_seq2seq_model("t5")
    start, data = model.config.decoder_start_token_id, torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
    found = behind(0, 1, stack="decoder.block", hidden=64)
    given = torch.cat([torch.full_like(data[:, :1], start), data[:, :-1]], dim=1)
    seen = []
    with (
        torch.no_grad(),
        hooked(model.decoder.block[0].register_forward_hook(lambda block, args, out: seen.append(out[0]))),
    ):
        model(input_ids=data, decoder_input_ids=given)
    (first, stream, real), _ = found.read(model, prepare(data, model, None))
    assert first == 0
    torch.testing.assert_close(stream, seen[0])
    assert real.tolist() == [[False, True, True, True]] * 2


def test_bottlenecks_of_a_model_with_other_blocks_are_refused(model):
    with pytest.raises(ValueError, match="no residual stack"):
        behind(1, stack="transformer.h").plan(model)
    with pytest.raises(ValueError, match="got 5"):
        behind(1, 5).plan(model)


def test_bottlenecks_of_another_width_leave_the_model_as_it_was(model):
    with refused_without_trace(model, hfc.UnsupportedModelError):
        apply(behind(1, hidden=32).plan(model), model)
