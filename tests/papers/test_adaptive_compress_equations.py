"""AdaptiveCompress: equations (2) to (6) of the paper, and what its repaired form promises, number by number.

What is written here goes token by token and feature by feature, over lists, in float64. Where whole runs are compared,
autograd gives the gradient of the loss as it is written down here, and Adam is PyTorch's.
"""

import math

import numpy as np
import pytest
import torch

from hf_compress.methods.adaptive_compress import AdaptiveCompressConfig
from hf_compress.methods.adaptive_compress.adaptive import Adaptive, Paper
from hf_compress.methods.adaptive_compress.fit import ordinary
from hf_compress.methods.adaptive_compress.learner import StreamMoments, correlation, top_mask
from hf_compress.methods.adaptive_compress.learner_run import LearnerRun

HIDDEN, TOKENS = 5, 9
LEARNERS = {"paper": Paper, "default": Adaptive}


def stream(tokens=TOKENS, seed=0, hidden=HIDDEN):
    """Tokens of unequal size, with coordinates that belong together."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    sizes = 1 + 2 * torch.rand(tokens, 1, generator=generator, dtype=torch.float64)
    common = torch.randn(hidden, hidden, generator=torch.Generator().manual_seed(99), dtype=torch.float64)
    return sizes * (0.4 + draw(tokens, hidden) @ common + 0.3 * draw(tokens, hidden))


def start_of(rows):
    moments = StreamMoments(rows.shape[1], rows.device)
    moments.update(rows)
    return moments


def learner(variant, rows=None, seed=0, **settings):
    """A learner before its first step, in float64."""
    rows = stream() if rows is None else rows
    found = LEARNERS[variant](AdaptiveCompressConfig(variant=variant, **settings), start_of(rows), seed)
    found.module.double()
    found.importance = found.importance.double()
    return found


@torch.no_grad()
def randomised(variant, retention=0.6, **settings):
    """A learner as if it had been trained for a while."""
    found = learner(variant, **settings)
    generator = torch.Generator().manual_seed(7)
    for parameter in found.module.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator))
    found.importance.copy_(torch.tensor([0.5, 0.9, 0.2, 0.7, 0.4], dtype=torch.float64))
    if found.config.tie_weights:
        found.module.decoder.copy_((1 - found.module.form.skip) * found.module.encoder.T)
    found.retain(retention)
    return found


# --- the formulas, slowly ---------------------------------------------------------------------------------------------


def layer_norm(h):
    """n, μ, σ of one token."""
    mean = sum(h) / len(h)
    spread = math.sqrt(sum((x - mean) ** 2 for x in h) / len(h) + 1e-5)
    return [(x - mean) / spread for x in h], mean, spread


def times(row, matrix):
    return [sum(row[i] * matrix[i][j] for i in range(len(row))) for j in range(len(matrix[0]))]


def kept_of(importance, retention):
    """The ⌈r·d⌉ largest."""
    count = math.ceil(retention * len(importance) - 1e-9)
    return sorted(sorted(range(len(importance)), key=lambda i: -importance[i])[:count])


def mean_square_correlation(codes):
    """Over ordered pairs of different features; features that do not vary correlate with nothing."""
    columns = [list(column) for column in zip(*codes, strict=True)]
    pairs, total = 0, 0.0
    for i, a in enumerate(columns):
        for j, b in enumerate(columns):
            if i == j:
                continue
            pairs += 1
            mean_a, mean_b = sum(a) / len(a), sum(b) / len(b)
            both = sum((x - mean_a) * (y - mean_b) for x, y in zip(a, b, strict=True))
            alone = sum((x - mean_a) ** 2 for x in a) * sum((y - mean_b) ** 2 for y in b)
            total += both**2 / alone if alone > 1e-20 else 0.0
    return total / max(pairs, 1)


def papers_loss(rows, encoder, decoder, gates, config):
    """Equation (5) of (3) and (4)."""
    codes, missed = [], 0.0
    for h in rows:
        code = [u * g for u, g in zip(times(layer_norm(h)[0], encoder), gates, strict=True)]
        rebuilt = [z + 0.1 * x for z, x in zip(times(code, decoder), h, strict=True)]
        missed += sum((x - y) ** 2 for x, y in zip(h, rebuilt, strict=True)) / len(rows)
        codes.append(code)
    spent = sum(sum(abs(z) for z in code) for code in codes) / len(rows)
    return missed + config.l1 * spent + config.contrastive * mean_square_correlation(codes), codes, missed


def repaired_loss(rows, weights, kept, variance, config):
    """E‖h − ĥ‖² / V + λ·E mean_i |σ z_i|·‖W′_i‖ / √(V / d) + γ·L_cont, the last of open features only."""
    encoder, decoder, center, s = *weights, config.passing
    width, codes, missed, spent = len(decoder), [], 0.0, 0.0
    lengths = [math.sqrt(sum(x * x for x in row)) for row in decoder]
    for h in rows:
        n, mean, spread = layer_norm(h)
        u = times([x - b for x, b in zip(n, center, strict=True)], encoder)
        code = [u[i] if i in kept else 0.0 for i in range(width)]
        back = times(code, decoder)
        for i, x in enumerate(h):
            rebuilt = spread * (back[i] + (1 - s) * center[i]) + (1 - s) * mean + s * x
            missed += (x - rebuilt) ** 2 / len(rows)
        spent += sum(abs(spread * code[i]) * lengths[i] for i in range(width)) / width / len(rows)
        codes.append([code[i] for i in kept])
    loss = missed / variance + config.l1 * spent / math.sqrt(variance / len(center))
    return loss + config.contrastive * mean_square_correlation(codes), missed


def energy_by_hand(rows, weights, i):
    """E[(σ u_i)²]·‖W′_i‖²."""
    encoder, decoder, center = weights
    total = 0.0
    for h in rows:
        n, _, spread = layer_norm(h)
        total += (spread * sum((n[j] - center[j]) * encoder[j][i] for j in range(len(h)))) ** 2
    return total / len(rows) * sum(x * x for x in decoder[i])


def variance_of(rows):
    """E‖h − E h‖²."""
    mean = [sum(column) / len(rows) for column in zip(*rows, strict=True)]
    return sum(sum((x - m) ** 2 for x, m in zip(h, mean, strict=True)) for h in rows) / len(rows)


def lists(module):
    return [tensor.tolist() for _, tensor in sorted(module.named_parameters(), key=lambda one: one[0] == "center")]


# --- (2), (3): the importance and the gate ----------------------------------------------------------------------------


def test_the_papers_importance_is_a_running_share_of_positive_coordinates_from_1_on():
    found, expected = learner("paper"), [1.0] * HIDDEN
    assert found.importance.tolist() == expected
    for step in range(4):
        rows = stream(seed=step)
        found.after_step(found.terms(rows).energy)
        for i in range(HIDDEN):
            positive = sum(1.0 for h in rows.tolist() if h[i] > 0) / TOKENS
            expected[i] = 0.99 * expected[i] + (1 - 0.99) * positive
        assert found.importance.tolist() == pytest.approx(expected, abs=1e-7)
    assert len(set(expected)) > 1


def test_a_coordinate_of_zero_is_not_positive():
    rows = torch.tensor([[0.0, 1.0, -1.0, 2.0, 0.0], [-0.0, -1.0, 3.0, 1.0, 0.0]], dtype=torch.float64)
    assert learner("paper").terms(rows).energy.tolist() == [0.0, 0.5, 0.5, 1.0, 0.0]


@pytest.mark.parametrize(("ema", "expected"), [(0.0, 0.0), (0.5, 0.5**3), (0.9, 0.9**3)])
def test_alpha_is_the_share_of_the_old(ema, expected):
    found = learner("paper", ema=ema)
    for _ in range(3):
        found.after_step(torch.zeros(HIDDEN))
    assert found.importance.tolist() == pytest.approx([expected] * HIDDEN)


@pytest.mark.parametrize(
    ("retention", "kept"), [(1.0, 5), (0.81, 5), (0.8, 4), (0.6, 3), (0.41, 3), (0.4, 2), (0.01, 1)]
)
def test_the_papers_gate_is_the_importance_of_the_largest_and_0_for_others(retention, kept):
    importance = [0.5, 0.9, 0.2, 0.7, 0.4]
    found = randomised("paper", retention)
    stay = sorted(range(HIDDEN), key=lambda i: importance[i], reverse=True)[:kept]
    assert found.module.gate.tolist() == [importance[i] if i in stay else 0.0 for i in range(HIDDEN)]
    assert found.kept.tolist() == sorted(stay)


@pytest.mark.parametrize(("retention", "kept"), [(1.0, 5), (0.6, 3), (0.2, 1)])
def test_the_repaired_gate_is_open_or_shut(retention, kept):
    found = randomised("default", retention)
    stay = kept_of([0.5, 0.9, 0.2, 0.7, 0.4], retention)
    assert len(stay) == kept
    assert found.module.gate.tolist() == [float(i in stay) for i in range(HIDDEN)]


def test_of_equal_features_the_earlier_stay():
    assert top_mask(torch.tensor([1.0, 2.0, 1.0, 2.0, 1.0]), 3).tolist() == [1, 1, 0, 1, 0]


# --- (3), (4), (5): codes, reconstructions, the loss ------------------------------------------------------------------


@pytest.mark.parametrize("retention", [1.0, 0.6, 0.2])
def test_the_papers_code_and_reconstruction(retention):
    found, rows = randomised("paper", retention), stream()
    code, context = found.module.encode(rows)
    rebuilt = found.module.decode(code, context)
    encoder, decoder = lists(found.module)
    for t, h in enumerate(rows.tolist()):
        gates = [g if i in found.kept.tolist() else 0.0 for i, g in enumerate([0.5, 0.9, 0.2, 0.7, 0.4])]
        expected = [u * g for u, g in zip(times(layer_norm(h)[0], encoder), gates, strict=True)]
        assert code[t].tolist() == pytest.approx(expected, abs=1e-12)
        expected = [z + 0.1 * x for z, x in zip(times(expected, decoder), h, strict=True)]
        assert rebuilt[t].tolist() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(("l1", "contrastive"), [(0.0, 0.0), (0.7, 0.0), (0.0, 3.0), (0.04, 0.1)])
@pytest.mark.parametrize("retention", [1.0, 0.6, 0.2])
def test_the_papers_loss(retention, l1, contrastive):
    found, rows = randomised("paper", retention, l1=l1, contrastive=contrastive), stream(seed=1)
    terms = found.terms(rows)
    loss, codes, missed = papers_loss(rows.tolist(), *lists(found.module), found.module.gate.tolist(), found.config)
    assert terms.loss.item() == pytest.approx(loss, rel=1e-6)
    assert float(terms.error) == pytest.approx(missed / variance_of(stream().tolist()), rel=1e-9)
    assert float(terms.active) == sum(sum(z != 0 for z in code) for code in codes) / TOKENS == len(found.kept)


@pytest.mark.parametrize(("l1", "contrastive"), [(0.0, 0.0), (0.7, 0.0), (0.0, 3.0), (0.04, 0.1)])
@pytest.mark.parametrize("skip", [0.0, 0.1, 0.5])
def test_the_repaired_loss(skip, l1, contrastive):
    found, rows = randomised("default", l1=l1, contrastive=contrastive, skip=skip), stream(seed=1)
    terms = found.terms(rows)
    variance = variance_of(stream().tolist())  # of what it started from
    loss, missed = repaired_loss(rows.tolist(), lists(found.module), found.kept.tolist(), variance, found.config)
    assert terms.loss.item() == pytest.approx(loss, rel=1e-6)
    assert float(terms.error) == pytest.approx(missed / variance, rel=1e-9)


@pytest.mark.parametrize("variant", ["paper", "default"])
def test_the_gradient_of_the_loss_is_that_of_finite_differences(variant):
    found, rows = randomised(variant), stream(seed=1)
    found.terms(rows).loss.backward()
    for parameter in found.module.parameters():
        with torch.no_grad():
            place = (0,) * parameter.ndim
            before, shift = parameter[place].item(), 1e-6
            parameter[place] = before + shift
            above = found.terms(rows).loss.item()
            parameter[place] = before - shift
            below = found.terms(rows).loss.item()
            parameter[place] = before
        assert parameter.grad[place].item() == pytest.approx((above - below) / (2 * shift), rel=1e-4, abs=1e-7)


def test_correlations_by_hand():
    codes = stream(seed=2)
    assert float(correlation(codes)) == pytest.approx(mean_square_correlation(codes.tolist()), rel=1e-6)


@pytest.mark.parametrize(
    ("codes", "expected"),
    [
        ([[1.0, -2.0], [2.0, -4.0], [4.0, -8.0]], 1.0),  # opposite: the square counts
        ([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]], 0.0),
        ([[1.0, 1.0, 0.0], [2.0, 2.0, 0.0], [3.0, 3.0, 0.0]], 1 / 3),  # two of six ordered pairs
        ([[1.0, 5.0], [2.0, 5.0]], 0.0),
        ([[1.0], [2.0]], 0.0),
        ([[1.0, 2.0, 3.0]], 0.0),  # one token
    ],
)
def test_correlations_of_simple_features(codes, expected):
    assert float(correlation(torch.tensor(codes, dtype=torch.float64))) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("value", [0.1, 7.3])
def test_features_that_do_not_vary_correlate_with_nothing_in_float32_either(value):
    assert float(correlation(torch.full((37, 3), value))) == pytest.approx(0, abs=1e-6)


def test_the_direction_that_no_normed_stream_has_gets_no_larger_gradient_than_others():
    """Coordinates of a normed token sum to 0. Clipped by its norm, such a gradient would take all others' place."""
    rows = stream(200, hidden=32).float()
    found = Adaptive(AdaptiveCompressConfig(), start_of(rows), 0)
    found.retain(0.999)
    found.terms(rows).loss.backward()
    sizes = found.module.encoder.grad.norm(dim=0)
    assert sizes[-1] < 10 * sizes[:-1].max()


def test_correlations_of_closed_features_have_a_finite_gradient():
    codes = torch.zeros(4, 3, requires_grad=True)
    (correlation(codes) + codes.sum()).backward()
    assert codes.grad.isfinite().all()


@pytest.mark.parametrize("variant", ["paper", "default"])
def test_one_token_is_enough_for_a_finite_loss_and_gradient(variant):
    found = randomised(variant)
    terms = found.terms(stream(1))
    terms.loss.backward()
    assert terms.loss.isfinite()
    assert all(parameter.grad.isfinite().all() for parameter in found.module.parameters())


# --- (6): the schedule ------------------------------------------------------------------------------------------------


def schedule(**settings):
    settings = {"retention_init": 0.9, "retention_final": 0.5} | settings
    return AdaptiveCompressConfig(**settings)


def test_retention_waits_falls_on_a_line_and_stays():
    config = schedule(warmup_steps=2, decay_steps=4)
    expected = [0.9, 0.9, 0.9, 0.8, 0.7, 0.6, 0.5, 0.5, 0.5, 0.5]
    assert [config.retention(step, 10) for step in range(10)] == pytest.approx(expected)


def test_retention_never_leaves_its_two_ends():
    config = schedule(warmup_steps=100, decay_steps=7)
    values = [config.retention(step, 400) for step in range(-50, 400)]
    assert max(values) == 0.9
    assert min(values) == 0.5
    assert values == sorted(values, reverse=True)


def test_a_fifth_warms_up_and_three_fifths_decay_unless_said():
    assert schedule().phases(100) == (20, 60)
    assert schedule().phases(9) == (1, 5)
    assert schedule(warmup_steps=3).phases(100) == (3, 60)
    assert schedule(decay_steps=3).phases(100) == (20, 3)
    assert schedule(warmup_steps=0, decay_steps=0).phases(100) == (0, 0)
    values = [schedule().retention(step, 10) for step in range(10)]
    assert values == pytest.approx([0.9, 0.9, 0.9] + [0.9 - 0.4 * k / 6 for k in range(1, 6)] + [0.5, 0.5])


def test_a_decay_of_no_steps_is_a_jump():
    config = schedule(warmup_steps=3, decay_steps=0)
    assert [config.retention(step, 10) for step in range(6)] == [0.9, 0.9, 0.9, 0.5, 0.5, 0.5]


def test_the_same_retention_at_both_ends_is_constant():
    config = schedule(retention_init=0.7, retention_final=0.7)
    assert {config.retention(step, 10) for step in range(10)} == {0.7}


@pytest.mark.parametrize(
    ("hidden", "retention", "expected"),
    [(20, 0.95, 19), (768, 0.95, 730), (768, 0.999, 768), (768, 1.0, 768), (5, 0.5, 3), (3, 1 / 3, 1), (100, 0.07, 7)],
)
def test_features_are_rounded_up_but_not_by_floating_point(hidden, retention, expected):
    assert schedule().features(hidden, retention) == expected


def test_the_defaults_are_the_papers():
    config = AdaptiveCompressConfig(variant="paper")
    assert (config.retention_init, config.kept, config.ema) == (0.999, 0.95, 0.99)
    assert (config.l1, config.contrastive, config.passing, config.tracked) == (0.04, 0.1, 0.1, "sign")


# --- whole runs -------------------------------------------------------------------------------------------------------


def torch_loss(variant, config, h, weights, kept, gates, variance):
    """The losses above once more, for autograd."""
    encoder, decoder, center = weights
    s = config.passing
    mean = h.mean(1, keepdim=True)
    spread = ((h - mean).pow(2).mean(1, keepdim=True) + 1e-5).sqrt()
    mask = torch.zeros(len(decoder), dtype=h.dtype)
    mask[kept] = 1
    u = ((h - mean) / spread - center) @ encoder
    if variant == "paper":
        code = u * (mask * gates)
        loss = (h - code @ decoder - s * h).pow(2).sum(1).mean() + config.l1 * code.abs().sum(1).mean()
        opened = code
    else:
        code = u * mask
        rebuilt = spread * (code @ decoder + (1 - s) * center) + (1 - s) * mean + s * h
        spent = ((spread * code).abs() * decoder.pow(2).sum(1).sqrt()).mean()
        loss = (h - rebuilt).pow(2).sum(1).mean() / variance + config.l1 * spent / math.sqrt(variance / h.shape[1])
        opened = code[:, kept]
    centred = opened - opened.mean(0)
    squares, pairs = centred.pow(2).sum(0), max(1, opened.shape[1] * (opened.shape[1] - 1))
    for i in range(opened.shape[1]):
        for j in range(opened.shape[1]):
            if i != j and squares[i] > 0 and squares[j] > 0:
                both = (centred[:, i] * centred[:, j]).sum()
                loss = loss + config.contrastive * both.pow(2) / (squares[i] * squares[j]) / pairs
    energy = (
        (h > 0).double().mean(0) if config.tracked == "sign" else (spread * u).pow(2).mean(0) * decoder.pow(2).sum(1)
    )
    return loss, energy.detach()


def slow_run(variant, config, start, batches, variance):
    """Weights and importance after a step with each of the batches, from those of the start."""
    weights, importance = [tensor.clone() for tensor in start[:3]], start[3].clone()
    trained = [weights[0]] if config.tie_weights else [weights[0], weights[1]]
    if variant == "default":
        trained.append(weights[2])
    for tensor in trained:
        tensor.requires_grad_()
    adam = torch.optim.Adam(trained, lr=config.rate)
    for step, h in enumerate(batches):
        if config.tie_weights:
            weights[1] = (1 - config.passing) * weights[0].T
        kept = kept_of(importance.tolist(), config.retention(step, len(batches)))
        loss, energy = torch_loss(variant, config, h, weights, kept, importance, variance)
        adam.zero_grad()
        loss.backward()
        adam.param_groups[0]["lr"] = config.rate * min(1.0, 3 * (1 - step / len(batches)))  # of which it says nothing
        adam.step()
        importance = 0.99 * importance + 0.01 * energy
    if config.tie_weights:
        weights[1] = (1 - config.passing) * weights[0].T
    return [tensor.detach() for tensor in weights], importance


RUN = {"updates": 1, "retention_init": 0.8, "retention_final": 0.4, "warmup_steps": 2, "decay_steps": 4}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("importance", ["sign", "energy"])
@pytest.mark.parametrize("variant", ["paper", "default"])
def test_a_whole_run_is_the_slow_one(variant, importance, tied):
    batches = [stream(seed=seed) for seed in range(8)]
    # By signs, the direction that no normed stream has stays open; what it correlates with is rounding.
    contrastive = 0.0 if (variant, importance) == ("default", "sign") else 0.1
    settings = {"importance": importance, "tie_weights": tied, "contrastive": contrastive, "learning_rate": 0.01}
    found = learner(variant, torch.cat(batches), **settings, **RUN)
    module = found.module
    center = module.center if variant == "default" else torch.zeros(HIDDEN, dtype=torch.float64)
    start = [tensor.detach().clone() for tensor in (module.encoder, module.decoder, center, found.importance)]
    expected, trace = slow_run(variant, found.config, start, batches, variance_of(torch.cat(batches).tolist()))
    run = LearnerRun(found)
    for step, rows in enumerate(batches):
        run.learn(rows, step, len(batches))
    assert not run.stopped
    torch.testing.assert_close(found.importance, trace, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(module.encoder.detach(), expected[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(module.decoder.detach(), expected[1], rtol=0, atol=1e-5)
    assert not torch.allclose(module.encoder.detach(), start[0], atol=1e-2), "nothing was learnt"
    if variant == "default":
        torch.testing.assert_close(module.center.detach(), expected[2], rtol=0, atol=1e-5)
    assert run.curve["retention"] == pytest.approx([0.8, 0.8, 0.8, 0.7, 0.6, 0.5, 0.4, 0.4])
    assert run.curve["step"] == list(range(8))
    assert run.curve["active"] == [4, 4, 4, 4, 3, 3, 2, 2]


def test_the_papers_weights_start_as_a_linear_layers():
    rows = torch.randn(200, 64, generator=torch.Generator().manual_seed(0))
    found = Paper(AdaptiveCompressConfig(variant="paper"), start_of(rows), 3)
    again = Paper(AdaptiveCompressConfig(variant="paper"), start_of(rows), 3)
    other = Paper(AdaptiveCompressConfig(variant="paper"), start_of(rows), 4)
    for name in ("encoder", "decoder"):
        table = getattr(found.module, name).detach()
        assert table.abs().max() <= 64**-0.5
        assert table.mean().abs() < 0.01
        assert table.abs().mean() == pytest.approx(64**-0.5 / 2, rel=0.05)
        assert torch.equal(table, getattr(again.module, name))
        assert not torch.equal(table, getattr(other.module, name))


def test_what_the_paper_ends_with_is_the_gated_bottleneck_without_its_closed_features():
    found, rows = randomised("paper"), stream(seed=3)
    whole = found.module(rows)
    module, kept = found.finished()
    assert kept.tolist() == [0, 1, 3]
    assert tuple(module.encoder.shape) == (HIDDEN, 3)
    assert not module.form.gated
    torch.testing.assert_close(module.double()(rows), whole, rtol=1e-5, atol=1e-5)


# --- repaired: the start ----------------------------------------------------------------------------------------------


def weighted_principal(rows):
    """Mean, directions and variances of LN(h), every token as often as its σ² says."""
    normed, squares = [], []
    for h in rows.tolist():
        mean = sum(h) / len(h)
        square = sum((x - mean) ** 2 for x in h) / len(h)
        normed.append([(x - mean) / math.sqrt(square) for x in h])
        squares.append(square)
    n, w = np.array(normed), np.array(squares)
    mean = (w[:, None] * n).sum(0) / w.sum()
    covariance = sum(weight * np.outer(row - mean, row - mean) for weight, row in zip(w, n, strict=True)) / w.sum()
    values, vectors = np.linalg.eigh(covariance)
    return mean, vectors[:, ::-1], np.maximum(values[::-1], 0), w.mean()


@pytest.mark.parametrize("skip", [0.0, 0.1, 0.4])
def test_the_start_is_the_principal_directions_of_the_weighted_normed_stream(skip):
    rows = stream(40)
    module = learner("default", rows, skip=skip).module
    mean, directions, _, _ = weighted_principal(rows)
    np.testing.assert_allclose(module.center.detach().numpy(), mean, atol=1e-6)
    along = np.abs(np.sum(module.encoder.detach().numpy() * directions, axis=0))
    np.testing.assert_allclose(along, 1, atol=1e-5)
    torch.testing.assert_close(module.decoder.detach(), (1 - skip) * module.encoder.detach().T)


@pytest.mark.parametrize("skip", [0.0, 0.1])
def test_the_first_importance_is_the_energy_of_the_start(skip):
    rows = 3 * stream(40)
    found = learner("default", rows, skip=skip)
    weights = lists(found.module)
    expected = [energy_by_hand(rows.tolist(), weights, i) for i in range(HIDDEN)]
    assert found.importance.tolist() == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert found.terms(rows).energy.tolist() == pytest.approx(expected, rel=1e-6, abs=1e-9)
    assert expected[0] > 1.3 * expected[1]


def test_energy_is_measured_before_the_mask():
    found, rows = randomised("default", 0.2), stream(seed=1)
    energy = found.terms(rows).energy.tolist()
    assert energy == pytest.approx([energy_by_hand(rows.tolist(), lists(found.module), i) for i in range(HIDDEN)])
    found.retain(1.0)
    assert found.terms(rows).energy.tolist() == energy


def test_a_closed_feature_that_grows_opens_again():
    """Of two directions, the first is large to begin with, and the second from then on."""
    big = stream(60, seed=4)
    found = learner("default", big, ema=0.5)
    found.retain(0.2)
    assert found.kept.tolist() == [0]
    second = found.module.encoder.detach()[:, 1]
    for step in range(8):
        amounts = torch.randn(50, 1, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        rows = 100 * amounts * second + 0.01 * stream(50, seed=50 + step)
        found.after_step(found.terms(rows).energy)
        found.retain(0.2)
    assert found.kept.tolist() == [1]


# --- repaired: free of scale ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", [{}, {"contrastive": 0.0}, {"l1": 0.0, "contrastive": 0.0}, {"l1": 5.0}])
def test_a_longer_stream_has_the_same_loss(part):
    """All but the epsilon of the norm."""
    rows, c = 100 * stream(40), 37.0
    plain, scaled = (learner("default", factor * rows, **part) for factor in (1.0, c))
    with torch.no_grad():
        noise = 0.3 * torch.randn(HIDDEN, HIDDEN, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        for found in (plain, scaled):
            found.module.encoder.copy_(torch.eye(HIDDEN) + noise)
            found.module.decoder.copy_(torch.eye(HIDDEN) - noise)
            found.module.gate.copy_(torch.tensor([1, 0, 1, 1, 0]))
    test = 100 * stream(seed=5)
    here, there = plain.terms(test), scaled.terms(c * test)
    assert there.loss.item() == pytest.approx(here.loss.item(), rel=1e-6)
    assert float(there.error) == pytest.approx(float(here.error), rel=1e-6)
    assert there.energy.tolist() == pytest.approx((c**2 * here.energy).tolist(), rel=1e-6)
    assert scaled.importance.tolist() == pytest.approx((c**2 * plain.importance).tolist(), rel=1e-4, abs=1e-3)


@pytest.mark.parametrize("part", [{"l1": 5.0, "contrastive": 0.0}, {}])
def test_a_features_size_is_free_to_move_between_encoder_and_decoder(part):
    found, rows = randomised("default", 1.0, **part), stream(seed=1)
    loss, energy = found.terms(rows).loss.item(), found.terms(rows).energy.tolist()
    sizes = torch.tensor([0.01, 3.0, 1.0, 200.0, -2.0], dtype=torch.float64)
    with torch.no_grad():
        found.module.encoder *= sizes
        found.module.decoder /= sizes[:, None]
    assert found.terms(rows).loss.item() == pytest.approx(loss, rel=1e-6)
    assert found.terms(rows).energy.tolist() == pytest.approx(energy, rel=1e-9)


def test_the_l1_term_draws_codes_together():
    """It would be met by a test above also if it were nothing."""
    found, rows = randomised("default", 1.0), stream(seed=1)
    large = randomised("default", 1.0)
    with torch.no_grad():
        large.module.encoder *= 2
    for one in (found, large):
        object.__setattr__(one, "config", AdaptiveCompressConfig(l1=1.0, contrastive=0.0))
    plain = [(one.terms(rows).loss - one.terms(rows).error).item() for one in (found, large)]
    assert plain[1] == pytest.approx(2 * plain[0])
    assert plain[0] > 0.1


# --- repaired: the end ------------------------------------------------------------------------------------------------


def reconstruction_error(module, rows):
    return float((rows - module.double()(rows)).detach().square().sum(1).mean())


@pytest.mark.parametrize("skip", [0.0, 0.1, 0.5])
def test_with_all_features_and_no_training_nothing_is_lost(skip):
    rows = stream(40)
    found = learner("default", rows, skip=skip)
    found.retain(1.0)
    module, kept = found.finished()
    assert kept.tolist() == list(range(HIDDEN))
    assert reconstruction_error(module, rows) < 1e-6 * variance_of(rows.tolist())
    assert reconstruction_error(module, stream(20, seed=9)) < 1e-6 * variance_of(rows.tolist())


@pytest.mark.parametrize("kept", [1, 2, 3, 4])
@pytest.mark.parametrize("skip", [0.0, 0.1, 0.5])
def test_without_training_what_is_lost_is_what_principal_components_lose(skip, kept):
    rows = 10 * stream(40)
    found = learner("default", rows, skip=skip)
    found.retain(kept / HIDDEN)
    _, _, values, mean_square = weighted_principal(rows)
    expected = (1 - skip) ** 2 * mean_square * values[kept:].sum()
    whole = reconstruction_error(found.module, rows)
    module, features = found.finished()
    assert len(features) == kept
    assert reconstruction_error(module, rows) == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert whole == pytest.approx(expected, rel=1e-4, abs=1e-5)


def trained(variant="default", **settings):
    """A learner after some steps with codes that are drawn small, and the rows it learnt from."""
    rows = 10 * stream(60)
    settings = {"l1": 2.0, "learning_rate": 0.02, "updates": 1, "retention_final": 0.6} | settings
    found = learner(variant, rows, **settings)
    run = LearnerRun(found)
    for step in range(20):
        run.learn(rows, step, 20)
    found.retain(0.6)
    return found, rows


def test_the_solved_decoder_is_the_weighted_least_squares_of_the_normed_stream():
    found, rows = trained(skip=0.3)
    encoder = found.module.encoder.detach().clone()
    module, kept = found.finished()
    mean, _, _, _ = weighted_principal(rows)
    normed, roots = [], []
    for h in rows.tolist():
        n, _, spread = layer_norm(h)
        normed.append([x - m for x, m in zip(n, mean, strict=True)])
        roots.append(spread)
    n, root = np.array(normed), np.array(roots)[:, None]
    codes = n @ encoder[:, kept].numpy()
    solved = np.linalg.lstsq(root * codes, root * n, rcond=None)[0]
    np.testing.assert_allclose(module.decoder.detach().numpy(), (1 - 0.3) * solved, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(module.center.detach().numpy(), mean, atol=1e-6)
    np.testing.assert_allclose(module.encoder.detach().numpy(), encoder[:, kept].numpy(), atol=1e-6)


def test_no_other_decoder_is_better_and_training_had_left_a_worse_one():
    found, rows = trained()
    before = reconstruction_error(found.module, rows)
    module, _ = found.finished()
    best = reconstruction_error(module, rows)
    assert best < 0.9 * before
    generator = torch.Generator().manual_seed(2)
    decoder = module.decoder.detach().clone()
    for size in (1e-3, 1e-2, 0.1, 1.0):
        for _ in range(20):
            with torch.no_grad():
                module.decoder.copy_(decoder + size * torch.randn(decoder.shape, generator=generator))
            assert reconstruction_error(module, rows) > best


@pytest.mark.parametrize("variant", ["paper", "default"])
def test_importance_that_falls_in_training_decides_what_is_kept(variant):
    found, _ = trained(variant)
    assert found.finished()[1].tolist() == kept_of(found.importance.tolist(), 0.6)


# --- tied weights -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("skip", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("variant", ["paper", "default"])
def test_a_tied_encoder_has_the_gradient_of_both_its_roles(variant, skip):
    found, rows = randomised(variant, tie_weights=True, skip=skip), stream(seed=1)
    found.terms(rows).loss.backward()
    found.constrain_gradients()
    encoder = found.module.encoder.detach().clone().requires_grad_()
    center = found.module.center.detach() if variant == "default" else torch.zeros(HIDDEN, dtype=torch.float64)
    loss, _ = torch_loss(
        variant,
        found.config,
        rows,
        (encoder, (1 - skip) * encoder.T, center),
        found.kept.tolist(),
        found.importance,
        found.variance,
    )
    loss.backward()
    torch.testing.assert_close(found.module.encoder.grad, encoder.grad, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("variant", ["paper", "default"])
def test_weights_are_tied_after_every_step_and_in_the_end(variant):
    rows = stream(30)
    found = learner(variant, rows, tie_weights=True, learning_rate=0.01, updates=1, retention_final=0.6)
    run = LearnerRun(found)
    for step in range(6):
        run.learn(stream(seed=step), step, 6)
        encoder, decoder = found.module.encoder.detach(), found.module.decoder.detach()
        assert torch.equal(decoder, (1 - found.module.form.skip) * encoder.T)
    module, kept = run.finished()
    gates = found.module.gate[kept]
    assert len(kept) == 3
    torch.testing.assert_close(module.decoder, (0.9 * encoder.T)[kept].float())
    torch.testing.assert_close(module.encoder, (encoder[:, kept] * gates).float())


def test_untied_weights_drift_apart():
    found, _ = trained()
    assert not torch.allclose(found.module.decoder, 0.9 * found.module.encoder.T, atol=1e-2)


# --- outliers ---------------------------------------------------------------------------------------------------------


def test_tokens_of_more_than_ten_times_the_median_norm_are_left_out():
    lengths = [1.0, 2.0, 3.0, 30.0, 30.1, 4.0, 1000.0, 0.0, 2.5]  # the median is 3
    rows = torch.zeros(9, 4, dtype=torch.float64)
    for t, length in enumerate(lengths):
        rows[t, t % 4] = -length
    assert ordinary(rows, 10).equal(rows[[0, 1, 2, 3, 5, 7, 8]])
    assert ordinary(rows, 1.2).equal(rows[[0, 1, 2, 7, 8]])
    assert len(ordinary(rows, 1e6)) == 9
    assert ordinary(rows[:0], 10).shape == (0, 4)


def test_the_norms_are_of_whole_tokens():
    rows = torch.ones(3, 100)
    rows[0, 0] = 20.0  # a large coordinate in a token of 2.2 times the median norm
    assert len(ordinary(rows, 10)) == 3
    assert len(ordinary(rows, 2.2)) == 2
