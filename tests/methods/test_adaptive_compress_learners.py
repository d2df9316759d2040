"""AdaptiveCompress: what its peers learn, number by number, and how `hf_compress.fit` goes about it."""

import logging
import math
import re

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA

import hf_compress as hfc
from hf_compress.calibration.data import DataOptions
from hf_compress.errors import CalibrationError
from hf_compress.methods.adaptive_compress import AdaptiveCompressConfig
from hf_compress.methods.adaptive_compress.fit import LEARNERS
from hf_compress.methods.adaptive_compress.learner import StreamMoments
from hf_compress.methods.adaptive_compress.learner_run import LearnerRun
from tests.helpers.language import words
from tests.helpers.models import in_dtype, leftovers
from tests.helpers.plans import Before
from tests.helpers.tiny import tiny_base_model, tiny_seq2seq_model

HIDDEN, TOKENS = 5, 9
VARIANTS = ("default", "paper", "pca", "linear", "topk", "batchtopk")
TRAINED = tuple(name for name in VARIANTS if name != "pca")
DICTIONARIES = ("topk", "batchtopk")


def stream(tokens=TOKENS, seed=0):
    """Tokens with coordinates that belong together, and a mean."""
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(HIDDEN, HIDDEN, generator=torch.Generator().manual_seed(99), dtype=torch.float64)
    return 0.7 + torch.randn(tokens, HIDDEN, generator=generator, dtype=torch.float64) @ common


def learner(variant, rows=None, seed=0, **settings):
    """A learner before its first step, in float64."""
    rows, moments = stream() if rows is None else rows, StreamMoments(HIDDEN, torch.device("cpu"))
    moments.update(rows)
    settings = {"retention_final": 0.4} | settings
    found = LEARNERS[variant](AdaptiveCompressConfig(variant=variant, **settings), moments, seed)
    found.module.double()
    found.importance = found.importance.double()
    return found


@torch.no_grad()
def randomised(variant, **settings):
    """As if it had been trained for a while."""
    found, generator = learner(variant, **settings), torch.Generator().manual_seed(7)
    for parameter in found.module.parameters():
        if parameter.requires_grad:
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    if variant in DICTIONARIES:
        found.module.decoder.div_(found.module.decoder.norm(dim=1, keepdim=True))
    return found


def missed(rebuilt, rows):
    return (rows - rebuilt).detach().square().sum(1).mean().item()


def features_by_hand(module, rows):
    """u and σ of each token, over lists."""
    encoder, bias, center = module.encoder.tolist(), module.bias.tolist(), module.center.tolist()
    found = []
    for h in rows.tolist():
        mean = sum(h) / len(h)
        spread = math.sqrt(sum((x - mean) ** 2 for x in h) / len(h) + 1e-5)
        n = [(x - mean) / spread - b for x, b in zip(h, center, strict=True)]
        u = [sum(n[i] * encoder[i][j] for i in range(len(n))) + bias[j] for j in range(len(bias))]
        found.append((u, mean, spread))
    return found


def decoded_by_hand(module, code, h, mean, spread):
    decoder, center, s = module.decoder.tolist(), module.center.tolist(), module.form.skip
    back = [sum(code[j] * decoder[j][i] for j in range(len(code))) for i in range(len(h))]
    return [spread * (z + (1 - s) * b) + (1 - s) * mean + s * x for z, b, x in zip(back, center, h, strict=True)]


def largest(values, count):
    """Which are the `count` largest."""
    return set(sorted(range(len(values)), key=lambda i: -values[i])[:count])


# --- principal components ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("retention", [0.2, 0.4, 0.41, 1.0])
def test_pca_is_that_of_scikit_learn(retention):
    rows = stream(50)
    module = learner("pca", rows, retention_init=1.0, retention_final=retention).module
    kept = math.ceil(5 * retention)
    reference = PCA(kept).fit(rows.numpy())
    expected = reference.inverse_transform(reference.transform(rows.numpy()))
    assert module.encoder.shape == (5, kept)
    np.testing.assert_allclose(module(rows).detach().numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("skip", [0.1, 0.5])
def test_pca_beside_a_stream_that_passes_by(skip):
    rows = stream(50)
    plain, beside = (learner("pca", rows, skip=share).module(rows) for share in (0.0, skip))
    torch.testing.assert_close(beside, (1 - skip) * plain + skip * rows, rtol=0, atol=1e-5)


@torch.no_grad()
def test_no_affine_map_of_as_many_features_is_better_than_pca():
    rows = stream(50)
    module = learner("pca", rows).module
    best, generator = missed(module(rows), rows), torch.Generator().manual_seed(0)
    state = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    for size in (1e-3, 1e-2, 0.1, 1.0):
        for _ in range(20):
            for name, tensor in module.state_dict().items():
                tensor.copy_(state[name] + size * torch.randn(tensor.shape, generator=generator))
            assert missed(module(rows), rows) > best
    ones = torch.cat([rows, torch.ones(50, 1)], dim=1).numpy()
    for _ in range(10):  # and with the best decoder, offset included, of an encoder that is not its own
        encoder = state["encoder"] + 0.3 * torch.randn(5, 2, generator=generator)
        codes = np.concatenate([(rows @ encoder).numpy(), ones[:, -1:]], axis=1)
        rebuilt = codes @ np.linalg.lstsq(codes, rows.numpy(), rcond=None)[0]
        assert missed(torch.from_numpy(rebuilt), rows) > best
    assert best > 0.01


def test_the_importance_of_components_is_their_variance():
    rows = stream(50)
    found = learner("pca", rows)
    assert found.importance.tolist() == pytest.approx(PCA(5).fit(rows.numpy()).explained_variance_ * 49 / 50, rel=1e-5)
    assert not found.trains


# --- a linear autoencoder ---------------------------------------------------------------------------------------------


def test_the_autoencoder_starts_from_orthonormal_features_of_its_seed():
    found, again, other = (learner("linear", seed=seed).module for seed in (1, 1, 2))
    assert found.encoder.shape == (5, 2)
    torch.testing.assert_close(found.encoder.T @ found.encoder, torch.eye(2, dtype=torch.float64), rtol=0, atol=1e-6)
    torch.testing.assert_close(found.decoder, found.encoder.T)
    torch.testing.assert_close(found.center, stream().mean(0), rtol=0, atol=1e-6)
    assert torch.equal(found.encoder, again.encoder)
    assert not torch.equal(found.encoder, other.encoder)


def test_the_autoencoders_loss_is_its_share_of_the_variance():
    found, rows = randomised("linear", skip=0.2), stream(seed=1)
    module, total = found.module, 0.0
    encoder, decoder, center = module.encoder.tolist(), module.decoder.tolist(), module.center.tolist()
    for h in rows.tolist():
        code = [sum((h[i] - center[i]) * encoder[i][j] for i in range(5)) for j in range(2)]
        for i in range(5):
            back = sum(code[j] * decoder[j][i] for j in range(2)) + 0.8 * center[i] + 0.2 * h[i]
            total += (h[i] - back) ** 2 / TOKENS
    variance = sum((x - m) ** 2 for h in stream().tolist() for x, m in zip(h, stream().mean(0).tolist(), strict=True))
    terms = found.terms(rows)
    assert terms.loss.item() == pytest.approx(total / (variance / TOKENS), rel=1e-9)
    assert terms.error.item() == pytest.approx(terms.loss.item())


def test_the_autoencoder_comes_near_pca_and_not_below():
    rows = stream(60)
    found = learner("linear", rows, learning_rate=0.03, updates=1)
    run, start = LearnerRun(found), missed(found.module(rows), rows)
    for step in range(300):
        run.learn(rows, step, 300)
    best = missed(learner("pca", rows).module(rows), rows)
    assert start > 1.2 * best
    assert best * (1 - 1e-6) <= missed(found.module(rows), rows) < 1.01 * best


# --- dictionaries -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", DICTIONARIES)
def test_a_dictionary_starts_from_unit_directions_and_their_transpose(variant):
    found = learner(variant, expansion=3)
    module = found.module
    assert module.encoder.shape == (5, 15)
    assert module.decoder.norm(dim=1).tolist() == pytest.approx([1.0] * 15)
    assert torch.equal(module.encoder, module.decoder.T)
    assert not module.bias.any()
    assert (found.active, module.form.active) == (2, 2 if variant == "topk" else None)


def test_topk_rectifies_the_largest_of_each_token_and_drops_the_rest():
    module, rows = randomised("topk").module, stream(seed=1)
    with torch.no_grad():
        module.bias -= 6  # so that among the largest are some below 0
    code, seen = module.encode(rows)[0].tolist(), set()
    for t, (u, _, _) in enumerate(features_by_hand(module, rows)):
        stay = largest(u, 2)
        expected = [max(value, 0.0) if j in stay else 0.0 for j, value in enumerate(u)]
        assert code[t] == pytest.approx(expected, abs=1e-9)
        seen.add(sum(value != 0 for value in code[t]))
    assert seen <= {0, 1, 2}
    assert len(seen) > 1, "all of the largest are above 0: the test cannot tell"


@pytest.mark.parametrize("skip", [0.0, 0.3])
def test_the_loss_of_topk_is_its_share_of_the_variance(skip):
    found, rows = randomised("topk", skip=skip), stream(seed=1)
    total, energy = 0.0, [0.0] * 20
    for h, (u, mean, spread) in zip(rows.tolist(), features_by_hand(found.module, rows), strict=True):
        stay = largest(u, 2)
        code = [max(value, 0.0) if j in stay else 0.0 for j, value in enumerate(u)]
        rebuilt = decoded_by_hand(found.module, code, h, mean, spread)
        total += sum((x - y) ** 2 for x, y in zip(h, rebuilt, strict=True)) / TOKENS
        energy = [e + (spread * z) ** 2 / TOKENS for e, z in zip(energy, code, strict=True)]
    terms = found.terms(rows)
    assert terms.loss.item() == pytest.approx(total / found.variance, rel=1e-9)
    assert terms.energy.tolist() == pytest.approx(energy)


@pytest.mark.parametrize("variant", DICTIONARIES)
def test_the_gradient_along_a_direction_is_taken_out(variant):
    found, rows = randomised(variant), stream(seed=1)
    found.terms(rows).loss.backward()
    gradient, decoder = found.module.decoder.grad.clone(), found.module.decoder.detach()
    found.constrain_gradients()
    for own, before, direction in zip(
        found.module.decoder.grad.tolist(), gradient.tolist(), decoder.tolist(), strict=True
    ):
        along = sum(x * y for x, y in zip(before, direction, strict=True))
        assert own == pytest.approx([x - along * y for x, y in zip(before, direction, strict=True)], abs=1e-12)
        assert sum(x * y for x, y in zip(own, direction, strict=True)) == pytest.approx(0, abs=1e-12)
    assert not torch.allclose(gradient, found.module.decoder.grad, atol=1e-4)


@pytest.mark.parametrize("variant", DICTIONARIES)
def test_directions_are_one_long_after_every_step(variant):
    found = learner(variant, updates=1, learning_rate=0.05)
    run, before = LearnerRun(found), found.module.decoder.detach().clone()
    for step in range(5):
        run.learn(stream(seed=step), step, 5)
        assert found.module.decoder.norm(dim=1).tolist() == pytest.approx([1.0] * 20, abs=1e-6)
    assert not torch.allclose(found.module.decoder, before, atol=0.01)


@pytest.mark.parametrize("variant", DICTIONARIES)
def test_features_are_idle_until_they_are_active(variant):
    found, idle = randomised(variant), [0] * 20
    for step in range(6):
        rows = stream(2, seed=step)
        terms = found.terms(rows)
        found.after_step(terms.energy)
        for j in range(20):
            idle[j] = 0 if terms.energy[j] > 0 else idle[j] + 1
        assert found.idle.tolist() == idle
    assert 0 in idle
    assert max(idle) > 1


def with_dead(dead, idle=100, variant="topk", **settings):
    """A dictionary in which some features have not been active for a while, and all features are large enough."""
    found = randomised(variant, dead_steps=100, **settings)
    found.idle[list(dead)] = idle
    with torch.no_grad():
        found.module.bias += 3
        found.module.bias[list(dead)] -= 2  # active were they asked, but not among the largest
    return found


def revival_by_hand(found, dead, rows):
    """‖e − ê‖² / ‖e‖², ê of the two largest (half the width) of the dead."""
    module, left, whole = found.module, 0.0, 0.0
    decoder = module.decoder.tolist()
    for h, (u, mean, spread) in zip(rows.tolist(), features_by_hand(module, rows), strict=True):
        stay = largest(u, 2)
        code = [max(value, 0.0) if j in stay else 0.0 for j, value in enumerate(u)]
        error = [x - y for x, y in zip(h, decoded_by_hand(module, code, h, mean, spread), strict=True)]
        best = [dead[i] for i in largest([u[j] for j in dead], 2)]
        made = [spread * sum(max(u[j], 0.0) * decoder[j][i] for j in best) for i in range(5)]
        left += sum((e - m) ** 2 for e, m in zip(error, made, strict=True))
        whole += sum(e * e for e in error)
    return left / whole


@pytest.mark.parametrize("dead", [[3], [3, 8], [0, 3, 8, 11, 17]])
def test_the_loss_for_dead_features_by_hand(dead):
    rows = stream(seed=1)
    plain, found = with_dead(dead, aux=0.0), with_dead(dead, aux=0.25)
    added = (found.terms(rows).loss - plain.terms(rows).loss).item()
    assert added == pytest.approx(0.25 * revival_by_hand(found, dead, rows), rel=1e-9)


@pytest.mark.parametrize(("idle", "dead"), [(99, False), (100, True), (101, True)])
def test_features_are_dead_from_so_many_steps_on(idle, dead):
    rows = stream(seed=1)
    added = with_dead([3, 8], idle, aux=1.0).terms(rows).loss - with_dead([3, 8], idle, aux=0.0).terms(rows).loss
    assert (added.item() > 0) == dead


def gradients(found, rows):
    found.terms(rows).loss.backward()
    return {name: p.grad.clone() for name, p in found.module.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("variant", DICTIONARIES)
def test_the_loss_for_dead_features_teaches_their_encoder_and_theirs_alone(variant):
    dead, rows = [0, 3, 8, 11], stream(30, seed=1)
    alive = [j for j in range(20) if j not in dead]
    plain, found = (gradients(with_dead(dead, aux=aux, variant=variant), rows) for aux in (0.0, 1.0))
    added = {name: found[name] - plain[name] for name in found}
    assert (added["encoder"][:, dead].norm(dim=0) > 1e-3).all()
    assert (added["decoder"][dead].norm(dim=1) > 1e-3).all()
    assert (added["bias"][dead].abs() > 1e-5).all()
    assert added["encoder"][:, alive].abs().max() < 1e-12
    assert added["decoder"][alive].abs().max() < 1e-12
    assert added["bias"][alive].abs().max() < 1e-12


def test_what_is_missing_counts_as_given():
    """The gradient of dead features is that of ê alone, by finite differences with e held fixed."""
    dead, rows = [3, 8], stream(seed=1)
    plain, found = (gradients(with_dead(dead, aux=aux), rows) for aux in (0.0, 1.0))
    one = with_dead(dead, aux=1.0)
    e = (rows - one.module(rows)).detach()

    def ratio():
        features, context = one.module.read(rows)
        made = context.spread * (features[:, dead].relu() @ one.module.decoder[dead])
        return ((e - made).square().sum() / e.square().sum()).item()

    with torch.no_grad():
        for name, place in (("encoder", (2, 3)), ("decoder", (8, 1)), ("bias", (3,))):
            parameter, values = getattr(one.module, name), []
            for shift in (1e-5, -2e-5):
                parameter[place] += shift
                values.append(ratio())
            parameter[place] += 1e-5
            slope = (values[0] - values[1]) / 2e-5
            assert (found[name] - plain[name])[place].item() == pytest.approx(slope, rel=1e-5, abs=1e-8)


def test_batchtopk_takes_the_largest_of_the_whole_step():
    found, rows = randomised("batchtopk"), stream(seed=1)
    all_features = [u for u, _, _ in features_by_hand(found.module, rows)]
    flat = sorted((value for u in all_features for value in u), reverse=True)
    last = flat[2 * TOKENS - 1]
    total, counts = 0.0, []
    for h, (u, mean, spread) in zip(rows.tolist(), features_by_hand(found.module, rows), strict=True):
        code = [value if value >= last else 0.0 for value in u]
        counts.append(sum(z != 0 for z in code))
        rebuilt = decoded_by_hand(found.module, code, h, mean, spread)
        total += sum((x - y) ** 2 for x, y in zip(h, rebuilt, strict=True)) / TOKENS
    terms = found.terms(rows)
    assert terms.loss.item() == pytest.approx(total / found.variance, rel=1e-9)
    assert terms.active.item() == pytest.approx(2)
    assert sum(counts) == 2 * TOKENS
    assert len(set(counts)) > 1, "as many for every token: the test cannot tell"


def test_batchtopk_keeps_no_feature_below_0():
    found, rows = randomised("batchtopk"), stream(seed=1)
    with torch.no_grad():
        found.module.bias -= 6
    positive = sum(value > 0 for u, _, _ in features_by_hand(found.module, rows) for value in u)
    assert 0 < positive < 2 * TOKENS
    assert found.terms(rows).active.item() == pytest.approx(positive / TOKENS)


def test_batchtopks_threshold_follows_the_smallest_that_are_kept():
    found, expected = randomised("batchtopk"), 0.0
    for step in range(4):
        rows = stream(seed=step)
        flat = sorted((value for u, _, _ in features_by_hand(found.module, rows) for value in u), reverse=True)
        smallest = flat[2 * TOKENS - 1]
        expected = 0.9 * expected + 0.1 * smallest if step else smallest
        found.terms(rows)
        assert found.module.threshold.tolist() == pytest.approx([expected] * 20, rel=1e-6)
    assert expected > 0.1


def test_batchtopks_threshold_is_what_decides_afterwards():
    found, rows = randomised("batchtopk"), stream(seed=1)
    for step in range(30):
        found.terms(stream(seed=step))
    before = found.module.threshold.clone()
    module, kept = found.finished()
    code = module.encode(rows)[0].tolist()
    for t, (u, _, _) in enumerate(features_by_hand(found.module, rows)):
        assert code[t] == pytest.approx([value if value > before[0] and value > 0 else 0.0 for value in u])
    assert torch.equal(module.threshold, before), "it moves when it is used"
    assert before[0] > 0.5
    assert kept.tolist() == list(range(20))


def test_adam_leaves_the_threshold_alone():
    found = learner("batchtopk", updates=1)
    trained = [id(one) for group in LearnerRun(found).optimizer.param_groups for one in group["params"]]
    assert trained == [id(getattr(found.module, name)) for name in ("encoder", "decoder", "center", "bias")]


def test_in_the_end_about_as_many_features_are_active_as_were_asked_for():
    rows = stream(400)
    found = learner("batchtopk", rows, updates=1, learning_rate=0.003)
    run = LearnerRun(found)
    for step in range(60):
        run.learn(stream(400, seed=step), step, 60)
    active = (run.finished()[0](rows.float()), found.module.encode(rows.float())[0] != 0)[1].sum(1).double().mean()
    assert active.item() == pytest.approx(2, abs=0.2)


# --- steps ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", TRAINED)
def test_every_token_of_a_batch_is_learnt_from_once(variant, monkeypatch):
    found, seen = learner(variant, updates=4), []
    terms = found.terms
    monkeypatch.setattr(found, "terms", lambda rows: (seen.append(rows.clone()), terms(rows))[1])
    rows = stream(11)
    LearnerRun(found).learn(rows, 0, 8)
    assert [len(part) for part in seen] == [3, 3, 3, 2]
    assert sorted(torch.cat(seen).tolist()) == sorted(rows.tolist())
    assert torch.cat(seen).tolist() != rows.tolist(), "neighbours in a text come in the same step"


@pytest.mark.parametrize("variant", ["default", "paper"])
def test_a_step_without_tokens_teaches_nothing(variant):
    found = learner(variant, updates=1)
    run, before = LearnerRun(found), found.importance.clone()
    run.learn(stream()[:0], 0, 4)
    assert torch.equal(found.importance, before)
    assert run.curve["error"] == []


@pytest.mark.parametrize("variant", TRAINED)
def test_a_step_that_makes_no_sense_any_more_is_the_last(variant):
    found = learner(variant, updates=1, learning_rate=1e6)
    run = LearnerRun(found)
    for step in range(6):
        run.learn(stream(seed=step), step, 6)
    assert "learning_rate" in run.stopped
    assert not run.goes_on
    assert len(run.curve["error"]) < 6
    module, _ = run.finished()
    assert all(tensor.isfinite().all() for tensor in module.state_dict().values())
    assert missed(module(stream().float()), stream()) < 20 * found.variance


def test_what_is_no_number_stops_it_too_and_the_last_good_state_comes_back():
    found = learner("linear", updates=1)
    run = LearnerRun(found)
    run.learn(stream(), 0, 9)
    kept = found.module.encoder.detach().clone()
    run._good = (1, {name: tensor.clone() for name, tensor in found.state().items()})
    with torch.no_grad():
        found.module.encoder[0, 0] = float("nan")
    run.learn(stream(), 2, 9)
    assert "step 2 (error nan" in run.stopped
    assert "as it was in step 1" in run.stopped
    assert torch.equal(found.module.encoder, kept)


def test_nothing_more_is_learnt_once_it_has_stopped():
    found = learner("linear", updates=9, learning_rate=1e6)
    start, run = found.module.encoder.detach().clone(), LearnerRun(found)
    run.learn(stream(), 0, 9)
    run.learn(stream(), 9, 18)
    assert run.stopped.startswith("diverged in step 1 ")
    assert run.curve["step"] == [0]
    assert torch.equal(found.module.encoder, start)


@pytest.mark.parametrize("variant", ["linear", "topk", "paper"])
def test_a_last_step_that_makes_no_sense_is_noticed(variant):
    found = learner(variant, updates=1, learning_rate=1e6)
    run = LearnerRun(found)
    run.learn(stream(), 0, 1)
    module, _ = run.finished()
    assert run.stopped
    assert missed(module(stream().float()), stream()) < 20 * found.variance


def test_a_stream_far_from_0_is_learnt_by_the_paper_too():
    """ĥ begins as a tenth of h and some noise, so of E‖h‖² it misses most, which is many times the variance here."""
    rows = stream(50)
    rows[:, 2] += 8 * rows.std()
    found = learner("paper", rows, updates=1)
    run = LearnerRun(found)
    for step in range(10):
        run.learn(rows, step, 10)
    assert not run.stopped
    assert len(run.curve["error"]) == 10


# --- fit: the model ---------------------------------------------------------------------------------------------------

DATA = DataOptions(batch_size=3)  # four batches of 24 tokens


def config(variant="default", **settings):
    return AdaptiveCompressConfig(
        variant=variant, **{"layers": (1, 3), "retention_final": 0.5, "updates": 2} | settings
    )


def everything():
    """A config of every kind, with settings at which their parts all matter."""
    more = {"topk": {"dead_steps": 2}, "batchtopk": {"dead_steps": 1}, "default": {"tie_weights": True}}
    return [config(name, learning_rate=0.01, **more.get(name, {})) for name in VARIANTS] + [config(l1=1.0)]


def same(found, expected):
    """Bit for bit."""
    assert found.layers == expected.layers
    assert (found.config, found.tokens, found.stack) == (expected.config, expected.tokens, expected.stack)
    for layer, place in expected.places.items():
        mine = found.places[layer]
        assert torch.equal(mine.importance, place.importance)
        assert torch.equal(mine.kept, place.kept)
        assert (mine.curve, mine.stopped) == (place.curve, place.stopped)
        assert mine.module.form == place.module.form
        for name, tensor in place.module.state_dict().items():
            assert torch.equal(mine.module.state_dict()[name], tensor), f"{name} of block {layer}"


@pytest.fixture
def lived_in(model):
    """A model in a state of its own: partly training, partly frozen, with a hook and a gradient."""
    model.train()
    model.model.layers[2].eval()
    model.lm_head.weight.requires_grad_(False)
    model.model.layers[4].register_forward_hook(lambda *_: None)
    model.model.norm.weight.grad = torch.ones(16)
    return model


def check_untouched(model, before, modes):
    before.check(model)
    assert [module.training for module in model.modules()] == modes
    assert [name for name, p in model.named_parameters() if p.grad is not None] == ["model.norm.weight"]
    assert torch.is_grad_enabled()


def picture(model):
    return Before.of(model), [module.training for module in model.modules()]


def test_the_model_is_as_it_was(lived_in, ids):
    before, random = picture(lived_in), torch.get_rng_state()
    hfc.fit(lived_in, everything(), ids, options=DATA)
    check_untouched(lived_in, *before)
    assert torch.equal(torch.get_rng_state(), random)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize(
    ("where", "call"),
    [("learner.StreamMoments.update", 3), ("learner_run.LearnerRun.learn", 1), ("learner_run.LearnerRun.learn", 6)],
)
def test_the_model_is_as_it_was_when_fitting_ends_in_the_middle(lived_in, ids, monkeypatch, where, call, error):
    before = picture(lived_in)
    interrupt(monkeypatch, where, call, error)
    with pytest.raises(error, match="in the middle"):
        hfc.fit(lived_in, config(), ids, options=DATA)
    check_untouched(lived_in, *before)


def interrupt(monkeypatch, where, call, error=RuntimeError):
    """Have a method raise when it is called for that time."""
    path = f"hf_compress.methods.adaptive_compress.{where}"
    owner, name = path.rsplit(".", 1)
    module, kind = owner.rsplit(".", 1)
    import importlib

    original, calls = getattr(getattr(importlib.import_module(module), kind), name), []

    def counted(*args, **kwargs):
        calls.append(None)
        if len(calls) == call:
            raise error("in the middle")
        return original(*args, **kwargs)

    monkeypatch.setattr(path, counted)


def test_blocks_behind_the_last_that_is_chosen_are_never_run(model, ids):
    calls = [0] * 5
    for index, block in enumerate(model.model.layers):
        block.register_forward_hook(lambda *_, index=index: calls.__setitem__(index, calls[index] + 1))
    hfc.fit(model, [config(layers=(0,)), config("linear", layers=(2,))], ids, options=DATA)
    assert calls == [8, 8, 8, 0, 0]  # four batches twice: for the start, and to learn from


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
            assert set(place.kept.tolist()) == largest(place.importance.tolist(), 9)
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


# --- fit: what is learnt from -----------------------------------------------------------------------------------------


@torch.no_grad()
def real_rows(model, tokenizer, texts, layer):
    """Of each text by itself: what comes out of a block at tokens that are not special."""
    found = []
    for text in texts:
        encoded, kept = tokenizer(text)["input_ids"], []
        handle = model.model.layers[layer].register_forward_hook(lambda b, a, out, kept=kept: kept.append(out[0]))
        model(input_ids=torch.tensor([encoded]))
        handle.remove()
        found += [kept[0][position] for position, token in enumerate(encoded) if token >= 4]
    return torch.stack(found)


def learnt_from(monkeypatch):
    """What the run of any learner is given."""
    seen, learn = [], LearnerRun.learn

    def watched(self, rows, step, steps):
        seen.append(rows.clone())
        learn(self, rows, step, steps)

    monkeypatch.setattr(LearnerRun, "learn", watched)
    return seen


def by_first(rows):
    return rows[rows[:, 0].argsort()]


def test_special_tokens_and_padding_are_never_learnt_from(model, framing_tokenizer, texts, monkeypatch):
    seen = learnt_from(monkeypatch)
    found = hfc.fit(model, [config("linear", layers=(2,)), config("pca", layers=(2,))], texts, framing_tokenizer, DATA)
    expected = real_rows(model, framing_tokenizer, texts, 2)
    assert len(expected) == 92 == found[0].tokens
    torch.testing.assert_close(by_first(torch.cat(seen)), by_first(expected), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found[1].places[2].module.center, expected.mean(0), rtol=1e-4, atol=1e-4)


def test_tokens_of_many_times_the_median_norm_are_never_learnt_from(model, tokenizer, monkeypatch):
    seen = learnt_from(monkeypatch)
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
    twice = hfc.fit(model, everything_in(epochs=2), ids, options=DATA)
    doubled = hfc.fit(model, everything_in(), torch.cat([ids, ids]), options=DATA)
    for found, expected in zip(twice, doubled, strict=True):
        assert found.tokens == expected.tokens == 192
        for layer, place in expected.places.items():
            assert found.places[layer].curve["step"] == list(range(16))
            assert found.places[layer].curve["error"] == pytest.approx(place.curve["error"], rel=1e-3, abs=1e-5)


def everything_in(epochs=1):
    return [config(name, epochs=epochs) for name in ("default", "linear", "topk")]


# --- fit: one, several, again -----------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_and_another_another(model, ids):
    for one in everything():
        found = hfc.fit(model, one, ids, options=DATA)
        same(hfc.fit(model, one, ids, options=DATA), found)
        if one.variant == "pca":
            continue
        other = hfc.fit(model, AdaptiveCompressConfig(**{**settings_of(one), "seed": 1}), ids, options=DATA)
        assert not torch.equal(other.places[1].module.encoder, found.places[1].module.encoder)


def settings_of(one):
    return {name: value for name, value in one.to_dict().items() if name != "method"}


def test_several_configs_give_what_each_gives_alone(model, ids):
    configs = [*everything(), config("linear", layers=(0,), epochs=2), config(layers=(4, 2), epochs=3, seed=5)]
    together = hfc.fit(model, configs, ids, options=DATA)
    assert [found.config for found in together] == [one.to_dict() for one in configs]
    for one, found in zip(configs, together, strict=True):
        same(found, hfc.fit(model, one, ids, options=DATA))
    assert isinstance(hfc.fit(model, configs[:1], ids, options=DATA), list)


def test_several_configs_give_what_each_gives_alone_with_more_data_than_the_start_needs(model, ids, monkeypatch):
    monkeypatch.setattr("hf_compress.methods.adaptive_compress.fit._START_TOKENS", 6)
    configs = [config("pca", layers=(layer,), outliers=1.05) for layer in (0, 2, 4)]
    many = torch.cat([ids, ids.flip(0, 1), ids.roll(3, 1)])
    together = hfc.fit(model, configs, many, options=DATA)
    for one, found in zip(configs, together, strict=True):
        same(found, hfc.fit(model, one, many, options=DATA))


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


def test_a_shallow_model_has_fewer_places_by_default(make_llama, ids):
    assert hfc.fit(make_llama(layers=1), AdaptiveCompressConfig(variant="pca"), ids).layers == [0]
    assert hfc.fit(make_llama(layers=2), AdaptiveCompressConfig(variant="pca"), ids).layers == [0, 1]


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
    seen = []
    handle = model.layers[1].register_forward_hook(lambda block, args, out: seen.append(out))
    found = hfc.fit(model, AdaptiveCompressConfig(variant="pca", layers=[1]), pixels.repeat(4, 1, 1, 1))
    handle.remove()
    rows = torch.cat([out if isinstance(out, torch.Tensor) else out[0] for out in seen]).flatten(0, 1)
    torch.testing.assert_close(found.places[1].module.center, rows.mean(0), rtol=1e-4, atol=1e-4)


# --- fit: from where it was -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", [3, 12 * 7 - 1, 12 * 12 - 1])
def test_what_is_taken_up_again_ends_bit_for_bit_the_same(model, ids, tmp_path, monkeypatch, call):
    """Six learners of two layers and twelve batches; interrupted in the first, the seventh and the last."""
    options = DataOptions(batch_size=1)
    expected = hfc.fit(model, everything(), ids, options=options)
    with monkeypatch.context() as patched:
        interrupt(patched, "learner_run.LearnerRun.learn", call, KeyboardInterrupt)
        with pytest.raises(KeyboardInterrupt):
            hfc.fit(model, everything(), ids, options=options, checkpoint=tmp_path, save_every=2)
    calls = []
    handle = model.model.layers[0].register_forward_hook(lambda *_: calls.append(None))
    found = hfc.fit(model, everything(), ids, options=options, checkpoint=tmp_path, save_every=2)
    handle.remove()
    assert len(calls) == 12 + 12 - call // 12 // 2 * 2  # for the start all, to learn from what is not on disk
    for one, other in zip(found, expected, strict=True):
        same(one, other)


def test_what_had_come_to_its_end_is_given_again(model, ids, tmp_path):
    first = hfc.fit(model, everything(), ids, options=DATA, checkpoint=tmp_path / "deep" / "down", save_every=1)
    calls = []
    model.model.layers[0].register_forward_hook(lambda *_: calls.append(None))
    again = hfc.fit(model, everything(), ids, options=DATA, checkpoint=tmp_path / "deep" / "down", save_every=1)
    assert len(calls) == 4
    for one, other in zip(again, first, strict=True):
        same(one, other)


def test_what_had_diverged_stays_so(model, ids, tmp_path):
    wild = config("linear", learning_rate=1e6, layers=(1,))
    first = hfc.fit(model, wild, ids, options=DATA, checkpoint=tmp_path, save_every=1)
    assert first.places[1].stopped
    same(hfc.fit(model, wild, ids, options=DATA, checkpoint=tmp_path, save_every=1), first)


def test_what_diverges_once_it_is_taken_up_again_goes_as_far_back(model, ids, tmp_path, monkeypatch):
    monkeypatch.setattr("hf_compress.methods.adaptive_compress.learner_run._KEEP_EVERY", 4)
    options, one = DataOptions(batch_size=1), config("linear", layers=(1,), updates=1, learning_rate=0.01)
    step_of, last = LearnerRun._step, []

    def step_into_nothing(self, rows, step, steps):
        if last and step == last[0]:
            raise RuntimeError("in the middle")
        if step == 7:
            self.learner.module.encoder.data.fill_(float("nan"))
        step_of(self, rows, step, steps)

    monkeypatch.setattr(LearnerRun, "_step", step_into_nothing)
    expected = hfc.fit(model, one, ids, options=options)
    assert "it is as it was in step 4" in expected.places[1].stopped
    last.append(6)
    with pytest.raises(RuntimeError):
        hfc.fit(model, one, ids, options=options, checkpoint=tmp_path, save_every=6)
    last.clear()
    same(hfc.fit(model, one, ids, options=options, checkpoint=tmp_path, save_every=6), expected)


@pytest.mark.parametrize(
    "settings", [{"seed": 1}, {"l1": 0.5}, {"layers": (1, 2)}, {"epochs": 2}, {"variant": "paper"}, {"skip": 0.1}]
)
def test_a_checkpoint_of_other_settings_is_refused(model, ids, tmp_path, settings):
    hfc.fit(model, config(), ids, options=DATA, checkpoint=tmp_path, save_every=1)
    with pytest.raises(ValueError, match=r"other configs.*delete it"):
        hfc.fit(model, config(**settings), ids, options=DATA, checkpoint=tmp_path, save_every=1)
    with pytest.raises(ValueError, match="other configs"):
        hfc.fit(model, [config(), config()], ids, options=DATA, checkpoint=tmp_path, save_every=1)
    assert not leftovers(model)


def test_a_checkpoint_of_other_data_is_refused(model, ids, tmp_path):
    hfc.fit(model, config(), ids, options=DATA, checkpoint=tmp_path, save_every=1)
    with pytest.raises(ValueError, match="other data"):
        hfc.fit(model, config(), ids[:, :-1], options=DATA, checkpoint=tmp_path, save_every=1)


@pytest.mark.parametrize("other", ["data", "batches", "model"])
def test_a_checkpoint_of_another_run_is_refused(model, make_llama, ids, tmp_path, other):
    hfc.fit(model, config(), ids, options=DATA, checkpoint=tmp_path, save_every=1)
    given = {"data": ids.flip(1) if other == "data" else ids, "size": 4 if other == "batches" else 3}
    if other == "model":
        model = make_llama(layers=6)
    with pytest.raises(ValueError, match="other"):
        hfc.fit(model, config(), given["data"], options=DataOptions(given["size"]), checkpoint=tmp_path, save_every=1)


def test_a_checkpoint_is_written_every_so_many_batches_at_least_one(model, ids, tmp_path):
    with pytest.raises(ValueError, match="save_every"):
        hfc.fit(model, config(), ids, options=DATA, checkpoint=tmp_path, save_every=0)


def test_a_checkpoint_of_a_higher_save_every_is_taken_up_all_the_same(model, ids, tmp_path):
    expected = hfc.fit(model, config(), ids, options=DATA, checkpoint=tmp_path, save_every=3)
    same(hfc.fit(model, config(), ids, options=DATA, checkpoint=tmp_path, save_every=100), expected)


# --- fit: what cannot be ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", TRAINED)
def test_divergence_is_told_and_leaves_finite_weights(model, ids, caplog, variant):
    with caplog.at_level(logging.WARNING, "hf_compress"):
        found = hfc.fit(model, [config(variant, learning_rate=1e6), config("pca")], ids, options=DATA)[0]
    for layer, place in found.places.items():
        assert "diverged" in place.stopped
        assert all(tensor.isfinite().all() for tensor in place.module.state_dict().values())
        assert any(f"block {layer} diverged" in record.getMessage() for record in caplog.records)
    assert not leftovers(model)


def test_what_does_not_diverge_is_not_warned_of(model, ids, caplog):
    found = hfc.fit(model, everything(), ids, options=DATA)
    assert not any(place.stopped for one in found for place in one.places.values())
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize("start", [200, 1])
def test_activations_that_are_not_finite_name_their_block_and_leave_no_hook(lived_in, ids, monkeypatch, start):
    """Met at the start, or only when it trains."""
    monkeypatch.setattr("hf_compress.methods.adaptive_compress.fit._START_TOKENS", start)
    data = ids.clamp(max=62)
    data[11] = 63
    with torch.no_grad():
        lived_in.model.embed_tokens.weight[63] = float("nan")
    before = picture(lived_in)
    with pytest.raises(CalibrationError, match=r"model\.layers\.1 gives NaN"):
        hfc.fit(lived_in, config(), data, options=DATA)
    assert [module.training for module in lived_in.modules()] == before[1]
    assert before[0].hooks == Before.of(lived_in).hooks


def needed_tokens(error):
    return int(re.search(r"need about ([\d,]+) tokens", str(error.value))[1].replace(",", ""))


def ids_of(tokens, width=8):
    generator = torch.Generator().manual_seed(1)
    return torch.randint(4, 64, (math.ceil(tokens / width), width), generator=generator)


@pytest.mark.parametrize("tokens", [48, 32])
@pytest.mark.parametrize("updates", [1, 4])
@pytest.mark.parametrize(
    "settings",
    [
        {"warmup_steps": 10, "decay_steps": 20},
        {"warmup_steps": 0, "decay_steps": 37},
        {"warmup_steps": 37, "decay_steps": 0},
        {"decay_steps": 40},
        {"warmup_steps": 30},
    ],
)
def test_the_tokens_that_a_schedule_is_said_to_need_are_enough(model, settings, updates, tokens):
    small = ids_of(tokens)
    one = AdaptiveCompressConfig(layers=[0], updates=updates, **settings)
    with pytest.raises(CalibrationError, match=f"{tokens} make") as error:
        hfc.fit(model, one, small, options=DATA)
    hfc.fit(model, one, ids_of(needed_tokens(error)), options=DATA)
    with pytest.raises(CalibrationError, match="warm-up"):
        hfc.fit(model, one, ids_of(needed_tokens(error) * 0.7), options=DATA)


@pytest.mark.parametrize(
    "settings",
    [
        {"warmup_steps": 10, "decay_steps": 21},
        {"decay_steps": 39},
    ],
)
def test_the_epochs_that_a_schedule_is_said_to_need_are_enough(model, ids, settings):
    one = AdaptiveCompressConfig(layers=[0], updates=2, **settings)
    with pytest.raises(CalibrationError) as error:
        hfc.fit(model, one, ids, options=DATA)
    epochs = int(re.search(r"epochs=(\d+)", str(error.value))[1])
    hfc.fit(model, AdaptiveCompressConfig(layers=[0], updates=2, epochs=epochs, **settings), ids, options=DATA)
    with pytest.raises(CalibrationError):
        hfc.fit(model, AdaptiveCompressConfig(layers=[0], updates=2, epochs=epochs - 1, **settings), ids, options=DATA)


@pytest.mark.parametrize("variant", ["pca", "linear", "topk", "batchtopk"])
def test_peers_have_no_schedule_to_come_to_the_end_of(model, ids, variant):
    hfc.fit(model, config(variant, warmup_steps=1000, decay_steps=1000), ids, options=DATA)


@pytest.mark.parametrize("variant", VARIANTS)
def test_fewer_tokens_than_the_stream_is_wide_are_refused(model, variant):
    with pytest.raises(CalibrationError, match=r"15 tokens behind block \d are too few to tell 16 feat.*at least 16"):
        hfc.fit(model, config(variant), torch.arange(5, 20)[None])
    hfc.fit(model, config("pca"), torch.arange(5, 21)[None])
    assert not leftovers(model)


@pytest.mark.parametrize("layers", [[5], [0, 7]])
def test_blocks_that_there_are_not_are_refused(model, ids, layers):
    with pytest.raises(ValueError, match=rf"block {layers[-1]}.*0 to 4"):
        hfc.fit(model, config(layers=layers), ids)


def test_two_fractions_of_the_same_block_are_refused(model, ids):
    with pytest.raises(ValueError, match=r"twice.*\[1, 1, 4\]"):
        hfc.fit(model, AdaptiveCompressConfig(fractions=[0.25, 0.3, 1.0]), ids)


@pytest.mark.parametrize("wrong", [None, "default", [], ["default"], 3, {"variant": "paper"}, hfc.MKAConfig(ratio=0.5)])
def test_what_is_no_config_is_refused(model, ids, wrong):
    with pytest.raises(TypeError, match="AdaptiveCompressConfig"):
        hfc.fit(model, wrong, ids)
    with pytest.raises(TypeError, match="AdaptiveCompressConfig"):
        hfc.fit(model, [config(), wrong], ids)


@pytest.mark.parametrize("settings", [{"outliers": 5.0}, {"stack": "model.layers"}])
def test_configs_that_see_other_tokens_are_not_fitted_together(model, ids, settings):
    with pytest.raises(ValueError, match="same"):
        hfc.fit(model, [config(), config(**settings)], ids)


@pytest.mark.parametrize("data", [None, [], 5, torch.tensor([[1, 2, 0]])])
def test_data_without_a_token_is_refused(model, data):
    with pytest.raises(CalibrationError):
        hfc.fit(model, config(), data)


def test_observe_is_no_plan(model, ids):
    with pytest.raises(ValueError, match="observe"):
        hfc.compress(model, config(mode="observe"), ids)
    assert hfc.fit(model, config(mode="observe"), ids).layers == [1, 3]


# --- settings ---------------------------------------------------------------------------------------------------------


def test_what_depends_on_the_variant():
    rates = {name: AdaptiveCompressConfig(variant=name).rate for name in VARIANTS}
    assert rates == {"default": 3e-4, "paper": 1e-3, "pca": 1e-3, "linear": 1e-3, "topk": 1e-3, "batchtopk": 1e-3}
    passing = {name: AdaptiveCompressConfig(variant=name).passing for name in VARIANTS}
    assert passing == {"default": 0.1, "paper": 0.1, "pca": 0, "linear": 0, "topk": 0, "batchtopk": 0}
    assert AdaptiveCompressConfig(variant="pca", skip=0.3).passing == 0.3
    assert AdaptiveCompressConfig(skip=0).passing == 0
    tracked = [AdaptiveCompressConfig(variant=name).tracked for name in ("default", "paper")]
    assert tracked == ["energy", "sign"]
    assert AdaptiveCompressConfig(importance="sign").tracked == "sign"


# --- compress ---------------------------------------------------------------------------------------------------------


def test_to_compress_is_to_fit_and_splice(model, ids):
    found = hfc.fit(model, config(), ids)
    with torch.no_grad(), found.spliced(model):
        expected = model(input_ids=ids).logits
    compressed = hfc.compress(model, config(), ids)
    with torch.no_grad():
        torch.testing.assert_close(compressed(input_ids=ids).logits, expected)
