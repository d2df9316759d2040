"""AdaptiveCompress: what its peers learn, number by number."""

import math

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA

from hf_compress.methods.adaptive_compress.learner_run import LearnerRun
from tests.helpers.fitting import DICTIONARIES, TOKENS, learner, learnt, missed, stream


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
    return sorted(range(len(values)), key=lambda i: -values[i])[:count]


def top_two(u):
    """The code of a token: its two largest features, rectified."""
    stay = largest(u, 2)
    return [max(value, 0.0) if j in stay else 0.0 for j, value in enumerate(u)]


def squared_gap(first, second):
    return sum((x - y) ** 2 for x, y in zip(first, second, strict=True))


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
    start = missed(found.module(rows), rows)
    learnt(found, 300, rows)
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
        assert code[t] == pytest.approx(top_two(u), abs=1e-9)
        seen.add(sum(value != 0 for value in code[t]))
    assert seen <= {0, 1, 2}
    assert len(seen) > 1, "all of the largest are above 0: the test cannot tell"


@pytest.mark.parametrize("skip", [0.0, 0.3])
def test_the_loss_of_topk_is_its_share_of_the_variance(skip):
    found, rows = randomised("topk", skip=skip), stream(seed=1)
    total, energy = 0.0, [0.0] * 20
    for h, (u, mean, spread) in zip(rows.tolist(), features_by_hand(found.module, rows), strict=True):
        code = top_two(u)
        total += squared_gap(h, decoded_by_hand(found.module, code, h, mean, spread)) / TOKENS
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
    for own, before, direction in zip(found.module.decoder.grad, gradient, decoder, strict=True):
        torch.testing.assert_close(own, before - (before @ direction) * direction, rtol=0, atol=1e-12)
        assert float(own @ direction) == pytest.approx(0, abs=1e-12)
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
        error = [x - y for x, y in zip(h, decoded_by_hand(module, top_two(u), h, mean, spread), strict=True)]
        best = [dead[i] for i in largest([u[j] for j in dead], 2)]
        made = [spread * sum(max(u[j], 0.0) * decoder[j][i] for j in best) for i in range(5)]
        left += squared_gap(error, made)
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


def smallest_kept(found, rows):
    """The smallest of the features that stay, which are two a token in the mean."""
    flat = sorted((value for u, _, _ in features_by_hand(found.module, rows) for value in u), reverse=True)
    return flat[2 * TOKENS - 1]


def test_batchtopk_takes_the_largest_of_the_whole_step():
    found, rows = randomised("batchtopk"), stream(seed=1)
    last = smallest_kept(found, rows)
    total, counts = 0.0, []
    for h, (u, mean, spread) in zip(rows.tolist(), features_by_hand(found.module, rows), strict=True):
        code = [value if value >= last else 0.0 for value in u]
        counts.append(sum(z != 0 for z in code))
        total += squared_gap(h, decoded_by_hand(found.module, code, h, mean, spread)) / TOKENS
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
        smallest = smallest_kept(found, rows)
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
