"""AdaptiveCompress: how `hf_compress.fit` goes about a model and its data, one config or several, stopped or not."""

import math
from dataclasses import replace

import pytest
import torch

import hf_compress as hfc
from hf_compress.calibration.capture import hooked
from hf_compress.calibration.data import DataOptions
from hf_compress.calibration.memory import WorkingMemory, working_within
from hf_compress.errors import CalibrationError
from hf_compress.methods.adaptive_compress import AdaptiveCompressConfig
from hf_compress.methods.adaptive_compress.learner import StreamMoments
from hf_compress.methods.adaptive_compress.learner_run import LearnerRun
from tests.helpers.fitting import DATA, DICTIONARIES, VARIANTS, assert_same, config, everything, interrupt
from tests.helpers.language import tiny_llama, words
from tests.helpers.models import in_dtype, leftovers, watching
from tests.helpers.plans import Before, hooks
from tests.helpers.tiny import tiny_base_model, tiny_seq2seq_model

# --- the model --------------------------------------------------------------------------------------------------------


@pytest.fixture
def lived_in(model):
    """A model in a state of its own: partly training, partly frozen, with a hook and a gradient."""
    model.train()
    model.model.layers[2].eval()
    model.lm_head.weight.requires_grad_(False)
    model.model.layers[4].register_forward_hook(lambda *_: None)
    model.model.norm.weight.grad = torch.ones(16)
    return model


def check_untouched(model, before):
    before.check(model)
    assert [name for name, p in model.named_parameters() if p.grad is not None] == ["model.norm.weight"]
    assert torch.is_grad_enabled()


def test_the_model_is_as_it_was(lived_in, ids):
    before, random = Before.of(lived_in), torch.get_rng_state()
    hfc.fit(lived_in, everything(), ids, options=DATA)
    check_untouched(lived_in, before)
    assert torch.equal(torch.get_rng_state(), random)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize(
    ("owner", "name", "call"), [(StreamMoments, "update", 3), (LearnerRun, "learn", 1), (LearnerRun, "learn", 6)]
)
def test_the_model_is_as_it_was_when_fitting_ends_in_the_middle(lived_in, ids, monkeypatch, owner, name, call, error):
    before = Before.of(lived_in)
    interrupt(monkeypatch, owner, name, call, error)
    with pytest.raises(error, match="in the middle"):
        hfc.fit(lived_in, config(), ids, options=DATA)
    check_untouched(lived_in, before)


@pytest.mark.parametrize("start", [200, 1])
def test_activations_that_are_not_finite_name_their_block_and_leave_no_hook(lived_in, ids, monkeypatch, start):
    """Met at the start, or only when it trains."""
    monkeypatch.setattr("hf_compress.methods.adaptive_compress.fit.START_TOKENS", start)
    data = ids.clamp(max=62)
    data[11] = 63
    with torch.no_grad():
        lived_in.model.embed_tokens.weight[63] = float("nan")
    before, modes = hooks(lived_in), [module.training for module in lived_in.modules()]
    with pytest.raises(CalibrationError, match=r"model\.layers\.1 gives NaN"):
        hfc.fit(lived_in, config(), data, options=DATA)
    assert (hooks(lived_in), [module.training for module in lived_in.modules()]) == (before, modes)


def counted(model):
    """How often each block has run, from now on."""
    calls = [0] * 5
    for index, block in enumerate(model.model.layers):
        block.register_forward_hook(lambda *_, index=index: calls.__setitem__(index, calls[index] + 1))
    return calls


def test_blocks_behind_the_last_that_is_chosen_are_never_run(model, ids):
    calls = counted(model)
    hfc.fit(model, [config(layers=(0,)), config("linear", layers=(2,))], ids, options=DATA)
    assert calls == [4, 4, 4, 0, 0]  # four batches once: what they show for the start is kept to learn from


@pytest.mark.parametrize(
    ("room", "start", "runs"),
    [(2**32, 200, 4), (0, 200, 12), (2 * 24 * 16 * 2 * 2, 200, 8), (2**32, 1, 7)],
    ids=["for all", "for none", "for two batches of four", "seen by the start: one batch of four"],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_tokens_are_kept_as_far_as_there_is_room(model, ids, monkeypatch, dtype, room, start, runs):
    monkeypatch.setattr("hf_compress.methods.adaptive_compress.fit.START_TOKENS", start)
    small = in_dtype(model, dtype)
    settings = [config(epochs=2), config("topk", epochs=2)]
    with working_within(WorkingMemory(streams=0)):
        expected = hfc.fit(small, settings, ids, options=DATA)
    calls = counted(small)
    with working_within(WorkingMemory(streams=room * dtype.itemsize // 2)):
        found = hfc.fit(small, settings, ids, options=DATA)
    assert calls == [runs, runs, runs, runs, 0]
    for one, other in zip(found, expected, strict=True):
        assert_same(one, other)


def test_for_principal_components_alone_data_is_gone_through_once(model, ids):
    calls = []
    model.model.layers[1].register_forward_hook(lambda *_: calls.append(None))
    found = hfc.fit(model, config("pca", layers=(1,), epochs=5), ids, options=DATA)
    assert len(calls) == 4
    assert not any(found.places[1].curve.values())


def test_bottlenecks_of_a_bfloat16_model_are_float32_and_near_those_of_float32(model, ids):
    small = in_dtype(model, torch.bfloat16)
    for one in hfc.fit(small, everything(), ids, options=DATA):
        for place in one.places.values():
            assert {tensor.dtype for tensor in place.module.state_dict().values()} == {torch.float32}
            assert {tensor.device.type for tensor in place.module.state_dict().values()} == {"cpu"}
            assert place.importance.dtype == torch.float32
            assert not any(parameter.requires_grad for parameter in place.module.parameters())
    assert {parameter.dtype for parameter in small.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("variant", VARIANTS)
def test_as_many_features_are_kept_as_were_asked_for(model, ids, variant):
    found = hfc.fit(model, config(variant, retention_final=0.55), ids, options=DATA)
    assert found.tokens == 96
    for place in found.places.values():
        width = 64 if variant in DICTIONARIES else 9
        assert place.module.encoder.shape == (16, width)
        assert not place.module.form.gated
        assert len(place.kept) == width
        assert place.kept.tolist() == sorted(set(place.kept.tolist()))
        if variant in ("default", "paper"):
            assert set(place.kept.tolist()) == set(place.importance.topk(9).indices.tolist())
        if variant == "pca":
            continue
        assert place.curve["step"] == list(range(8))
        assert all(len(values) == 8 for values in place.curve.values())
        assert all(math.isfinite(value) for values in place.curve.values() for value in values)


def test_the_curve_tells_of_the_schedule(model, ids):
    settings = {"warmup_steps": 2, "decay_steps": 4, "retention_init": 1.0}
    curve = hfc.fit(model, config(**settings), ids, options=DATA).places[1].curve
    assert curve["retention"] == pytest.approx([1, 1, 1, 0.875, 0.75, 0.625, 0.5, 0.5])
    assert curve["active"] == pytest.approx([16, 16, 16, 14, 12, 10, 8, 8], abs=0.5)  # the last of 16 has no size
    assert curve["error"][0] == pytest.approx(0, abs=1e-6)
    assert curve["error"][-1] > 1e-4


# --- what is learnt from ----------------------------------------------------------------------------------------------


@torch.no_grad()
def real_rows(model, tokenizer, texts, layer):
    """Of each text by itself: what comes out of a block at tokens that are not special."""
    found = []
    for text in texts:
        encoded = torch.tensor(tokenizer(text)["input_ids"])
        with watching({layer: model.model.layers[layer]}) as seen:
            model(input_ids=encoded[None])
        found.append(seen[layer][1][0][encoded >= 4])
    return torch.cat(found)


@pytest.fixture
def seen(monkeypatch):
    """What the run of any learner is given."""
    found, learn = [], LearnerRun.learn

    def watched(self, rows, step, steps):
        found.append(rows.clone())
        learn(self, rows, step, steps)

    monkeypatch.setattr(LearnerRun, "learn", watched)
    return found


def by_first(rows):
    return rows[rows[:, 0].argsort()]


def test_special_tokens_and_padding_are_never_learnt_from(model, framing_tokenizer, texts, seen):
    found = hfc.fit(model, [config("linear", layers=(2,)), config("pca", layers=(2,))], texts, framing_tokenizer, DATA)
    expected = real_rows(model, framing_tokenizer, texts, 2)
    assert len(expected) == 92 == found[0].tokens
    torch.testing.assert_close(by_first(torch.cat(seen)), by_first(expected), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found[1].places[2].module.center, expected.mean(0), rtol=1e-4, atol=1e-4)


def test_tokens_of_many_times_the_median_norm_are_never_learnt_from(model, tokenizer, seen):
    texts = [words(7, seed=seed) for seed in range(12)]
    giant = int(tokenizer(texts[0])["input_ids"][3])
    with torch.no_grad():
        model.model.embed_tokens.weight[giant] *= 1e4
    both = [config("linear", layers=(1,)), config("pca", layers=(1,))]
    found = hfc.fit(model, both, texts, tokenizer, DATA)
    rows = real_rows(model, tokenizer, texts, 1)
    expected = rows[rows.norm(dim=1) < 10 * rows.norm(dim=1).median()]
    assert 0 < len(rows) - len(expected) < 10
    torch.testing.assert_close(by_first(torch.cat(seen)), by_first(expected), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found[1].places[1].module.center, expected.mean(0), rtol=1e-3, atol=1e-3)
    everyone = hfc.fit(model, config("pca", layers=(1,), outliers=1e9), texts, tokenizer, DATA)
    assert everyone.places[1].module.center.norm() > 10 * expected.mean(0).norm()


def test_an_epoch_more_is_the_data_once_more(model, ids):
    names = ("default", "linear", "topk")
    twice = hfc.fit(model, [config(name, epochs=2) for name in names], ids, options=DATA)
    doubled = hfc.fit(model, [config(name) for name in names], torch.cat([ids, ids]), options=DATA)
    for found, expected in zip(twice, doubled, strict=True):
        assert found.tokens == expected.tokens == 192
        for layer, place in expected.places.items():
            assert found.places[layer].curve["step"] == list(range(16))
            assert found.places[layer].curve["error"] == pytest.approx(place.curve["error"], rel=1e-3, abs=1e-5)


# --- one, several, again ----------------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_and_another_another(model, ids):
    for one in everything():
        found = hfc.fit(model, one, ids, options=DATA)
        assert_same(hfc.fit(model, one, ids, options=DATA), found)
        if one.variant == "pca":
            continue
        other = hfc.fit(model, replace(one, seed=1), ids, options=DATA)
        assert not torch.equal(other.places[1].module.encoder, found.places[1].module.encoder)


def test_several_configs_give_what_each_gives_alone(model, ids):
    configs = [*everything(), config("linear", layers=(0,), epochs=2), config(layers=(4, 2), epochs=3, seed=5)]
    together = hfc.fit(model, configs, ids, options=DATA)
    assert [found.config for found in together] == [one.to_dict() for one in configs]
    for one, found in zip(configs, together, strict=True):
        assert_same(found, hfc.fit(model, one, ids, options=DATA))
    assert isinstance(hfc.fit(model, configs[:1], ids, options=DATA), list)


def test_several_configs_with_more_data_than_the_start_needs(model, ids, monkeypatch):
    monkeypatch.setattr("hf_compress.methods.adaptive_compress.fit.START_TOKENS", 6)
    configs = [config("pca", layers=(layer,), outliers=1.05) for layer in (0, 2, 4)]
    many = torch.cat([ids, ids.flip(0, 1), ids.roll(3, 1)])
    together = hfc.fit(model, configs, many, options=DATA)
    for one, found in zip(configs, together, strict=True):
        assert_same(found, hfc.fit(model, one, many, options=DATA))


@pytest.mark.parametrize(
    ("places", "expected"),
    [
        ({}, [1, 2, 3]),
        ({"fractions": (0.2, 0.4, 0.6, 0.8, 1.0)}, [0, 1, 2, 3, 4]),
        ({"fractions": [1.0, 0.41]}, [2, 4]),
        ({"fractions": [0.0001]}, [0]),
        ({"fractions": [0.6 + 1e-15]}, [2]),
        ({"fractions": [1]}, [4]),
        ({"layers": [3, 0]}, [0, 3]),
        ({"layers": range(5)}, [0, 1, 2, 3, 4]),
    ],
)
def test_where_bottlenecks_stand(model, ids, places, expected):
    assert hfc.fit(model, AdaptiveCompressConfig(variant="pca", **places), ids).layers == expected


@pytest.mark.parametrize("layers", [1, 2])
def test_a_shallow_model_has_fewer_places_by_default(layers, ids):
    found = hfc.fit(tiny_llama(layers), AdaptiveCompressConfig(variant="pca"), ids)
    assert found.layers == list(range(layers))


def test_encoders_and_both_sides_of_an_encoder_decoder_are_fitted():
    ids = torch.randint(5, 50, (24, 8), generator=torch.Generator().manual_seed(0))
    found = hfc.fit(tiny_base_model("bert"), AdaptiveCompressConfig(variant="pca", layers=[0]), ids)
    assert found.places[0].module.encoder.shape == (64, 61)
    model = tiny_seq2seq_model("t5")
    for side in ("encoder.block", "decoder.block"):
        assert hfc.fit(model, AdaptiveCompressConfig(variant="pca", layers=[1], stack=side), ids).stack == side
    assert not leftovers(model)


def test_every_patch_of_a_picture_is_learnt_from():
    model = tiny_base_model("vit")
    pixels = torch.randn(8, 3, *[model.config.image_size] * 2, generator=torch.Generator().manual_seed(0))
    found = hfc.fit(model, AdaptiveCompressConfig(variant="pca", layers=[1]), pixels.repeat(4, 1, 1, 1))
    with torch.no_grad(), watching({"block": model.layers[1]}) as seen:
        model(pixels)
    rows = seen["block"][1].flatten(0, 1)
    torch.testing.assert_close(found.places[1].module.center, rows.mean(0), rtol=1e-4, atol=1e-4)


# --- from where it was ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", [3, 12 * 7 - 1, 12 * 12 - 1])
def test_what_is_taken_up_again_ends_bit_for_bit_the_same(model, ids, tmp_path, monkeypatch, call):
    """Six learners of two layers and twelve batches; interrupted in the first, the seventh and the last."""
    options = DataOptions(batch_size=1)
    expected = hfc.fit(model, everything(), ids, options=options)
    with monkeypatch.context() as patched:
        interrupt(patched, LearnerRun, "learn", call, KeyboardInterrupt)
        with pytest.raises(KeyboardInterrupt):
            hfc.fit(model, everything(), ids, options=options, checkpoint=tmp_path, save_every=2)
    calls = []
    nothing_kept = working_within(WorkingMemory(streams=0))
    with nothing_kept, hooked([model.model.layers[0].register_forward_hook(lambda *_: calls.append(None))]):
        found = hfc.fit(model, everything(), ids, options=options, checkpoint=tmp_path, save_every=2)
    assert len(calls) == 12 + 12 - call // 12 // 2 * 2  # for the start all, to learn from what is not on disk
    for one, other in zip(found, expected, strict=True):
        assert_same(one, other)


def test_what_had_come_to_its_end_is_given_again(model, ids, tmp_path):
    first = hfc.fit(model, everything(), ids, options=DATA, checkpoint=tmp_path / "deep" / "down", save_every=1)
    calls = []
    model.model.layers[0].register_forward_hook(lambda *_: calls.append(None))
    again = hfc.fit(model, everything(), ids, options=DATA, checkpoint=tmp_path / "deep" / "down", save_every=1)
    assert len(calls) == 4
    for one, other in zip(again, first, strict=True):
        assert_same(one, other)


def test_what_had_diverged_stays_so(model, ids, tmp_path):
    wild = config("linear", learning_rate=1e6, layers=(1,))
    first = hfc.fit(model, wild, ids, options=DATA, checkpoint=tmp_path, save_every=1)
    assert first.places[1].stopped
    assert_same(hfc.fit(model, wild, ids, options=DATA, checkpoint=tmp_path, save_every=1), first)


def test_what_diverges_once_it_is_taken_up_again_goes_as_far_back(model, ids, tmp_path, monkeypatch):
    monkeypatch.setattr("hf_compress.methods.adaptive_compress.learner_run._KEEP_EVERY", 4)
    options, one = DataOptions(batch_size=1), config("linear", layers=(1,), updates=1, learning_rate=0.01)
    step_of = LearnerRun._step

    def step_into_nothing(self, rows, step, steps):
        if step == 7:
            self.learner.module.encoder.data.fill_(float("nan"))
        step_of(self, rows, step, steps)

    monkeypatch.setattr(LearnerRun, "_step", step_into_nothing)
    expected = hfc.fit(model, one, ids, options=options)
    assert "it is as it was in step 4" in expected.places[1].stopped
    with monkeypatch.context() as patched:
        interrupt(patched, LearnerRun, "_step", 7)
        with pytest.raises(RuntimeError):
            hfc.fit(model, one, ids, options=options, checkpoint=tmp_path, save_every=6)
    assert_same(hfc.fit(model, one, ids, options=options, checkpoint=tmp_path, save_every=6), expected)


OTHER_RUNS = {
    **{
        f"{settings}": (lambda ids, settings=settings: {"config": config(**settings)}, r"other configs.*delete it")
        for settings in (
            *({"seed": 1}, {"l1": 0.5}, {"layers": (1, 2)}),
            *({"epochs": 2}, {"variant": "paper"}, {"skip": 0.1}),
        )
    },
    "two": (lambda ids: {"config": [config(), config()]}, "other configs"),
    "shorter": (lambda ids: {"calibration": ids[:, :-1]}, "other data"),
    "turned": (lambda ids: {"calibration": ids.flip(1)}, "other"),
    "batches": (lambda ids: {"options": DataOptions(4)}, "other"),
    "model": (lambda ids: {"model": tiny_llama(6)}, "other"),
}


@pytest.mark.parametrize("other", OTHER_RUNS)
def test_a_checkpoint_of_another_run_is_refused(model, ids, tmp_path, other):
    run = {"model": model, "config": config(), "calibration": ids, "options": DATA}
    hfc.fit(**run, checkpoint=tmp_path, save_every=1)
    changes, message = OTHER_RUNS[other]
    with pytest.raises(ValueError, match=message):
        hfc.fit(**run | changes(ids), checkpoint=tmp_path, save_every=1)
    assert not leftovers(model)


def test_a_checkpoint_is_written_every_so_many_batches_at_least_one(model, ids, tmp_path):
    with pytest.raises(ValueError, match="save_every"):
        hfc.fit(model, config(), ids, options=DATA, checkpoint=tmp_path, save_every=0)


def test_a_checkpoint_of_a_higher_save_every_is_taken_up_all_the_same(model, ids, tmp_path):
    expected = hfc.fit(model, config(), ids, options=DATA, checkpoint=tmp_path, save_every=3)
    assert_same(hfc.fit(model, config(), ids, options=DATA, checkpoint=tmp_path, save_every=100), expected)


# --- compress ---------------------------------------------------------------------------------------------------------


def test_to_compress_is_to_fit_and_splice(model, ids):
    found = hfc.fit(model, config(), ids)
    with torch.no_grad(), found.spliced(model):
        expected = model(input_ids=ids).logits
    compressed = hfc.compress(model, config(), ids)
    with torch.no_grad():
        torch.testing.assert_close(compressed(input_ids=ids).logits, expected)
