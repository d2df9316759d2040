"""Rounding against slow oracles: every number of a grid tried, every inverse of a Hessian written out, every allocation
of bits counted."""

import math
import struct
from bisect import bisect_left

import numpy as np
import pytest
import torch

from hf_compress.numerics import factor
from hf_compress.numerics.factor import Factor, _upper
from hf_compress.numerics.rounding import Grids, compensated
from tests.helpers.allocated import most_allocated

BFLOATS = [struct.unpack("<f", struct.pack("<I", upper << 16))[0] for upper in range(0x7F80)]  # 0 and up, finite
KINDS = [(bits, symmetric) for symmetric in (True, False) for bits in range(2 if symmetric else 1, 17)]


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def correlated(inputs, tokens=200, seed=1):
    """Σ x xᵀ of inputs that can make up for one another."""
    mixing = normal(inputs, max(2, inputs // 3), seed=seed).double()
    rows = normal(tokens, mixing.shape[1], seed=seed + 1).double() @ mixing.T + 0.3 * normal(tokens, inputs, seed=seed)
    return rows.T @ rows


def error(old, new, gram):
    """tr (W − W′) G (W − W′)ᵀ."""
    gap = (old - new).double()
    return float((gap @ gram * gap).sum())


# --- grids ------------------------------------------------------------------------------------------------------------


def slow_grid(group, bits, symmetric):
    """Step, zero and top of one group of floats."""
    top = 2**bits - 1
    if symmetric:
        zero = 2 ** (bits - 1)
        reach = np.float32(max(abs(w) for w in group)) / np.float32(max(1, zero - 1))
        return BFLOATS[bisect_left(BFLOATS, reach)], zero, top
    low, high = np.float32(min(*group, 0.0)), np.float32(max(*group, 0.0))
    step = BFLOATS[bisect_left(BFLOATS, (high - low) / np.float32(top))]
    zero = min(top, max(0, round(float(-low / np.float32(step or 1.0)))))
    return step, zero, top


@pytest.mark.parametrize("scale", [1e-5, 0.02, 300.0])
@pytest.mark.parametrize("side", [0, 1, -1])
def test_grids_are_those_of_a_slow_loop(side, scale):
    """Of groups of both signs, of one sign, and of one number; the step a bfloat16, never below the reach."""
    for bits, symmetric in KINDS:
        groups = scale * normal(6, 16, seed=bits)
        groups = side * groups.abs() if side else groups
        groups[4], groups[5, 1:] = 0, groups[5, 0]
        grids = Grids.of(groups, torch.full((6,), bits, dtype=torch.int32), symmetric)
        expected = [slow_grid(row, bits, symmetric) for row in groups.tolist()]
        assert grids.steps.dtype == torch.int16
        assert grids.step.tolist() == [step for step, _, _ in expected], f"{bits} bits"
        assert grids.zeros.tolist() == [zero for _, zero, _ in expected], f"{bits} bits"
        assert grids.top.tolist() == [top for _, _, top in expected]


def test_groups_of_one_call_have_bits_of_their_own():
    groups, bits = normal(15, 8), torch.arange(2, 17, dtype=torch.int32)
    for symmetric in (True, False):
        together = Grids.of(groups, bits, symmetric)
        for index in range(15):
            alone = Grids.of(groups[index : index + 1], bits[index : index + 1], symmetric)
            for name in ("steps", "zeros", "top"):
                assert torch.equal(getattr(together, name)[index : index + 1], getattr(alone, name))
            assert torch.equal(together.round(groups)[index], alone.round(groups[index : index + 1])[0])


@pytest.mark.parametrize(("bits", "symmetric"), [kind for kind in KINDS if kind[0] <= 8])
def test_a_number_becomes_the_nearest_of_all_on_its_grid(bits, symmetric):
    """Also one beyond the grid, as it comes up when weights make up for others."""
    grids = Grids.of(normal(4, 16, seed=bits), torch.full((4,), bits, dtype=torch.int32), symmetric)
    values = 3 * normal(4, 50, seed=99)
    found = grids.value(grids.round(values))
    for row in range(4):
        levels = grids.step[row].item() * (np.arange(2**bits) - grids.zeros[row].item())
        for value, got in zip(values[row].tolist(), found[row].tolist(), strict=True):
            assert np.abs(levels - got).min() < 1e-6
            assert abs(got - value) <= np.abs(levels - value).min() + 1e-6


@pytest.mark.parametrize(("bits", "symmetric"), [kind for kind in KINDS if kind[0] > 1])
def test_nothing_that_the_grid_was_made_for_is_cut_off(bits, symmetric):
    groups = normal(200, 16, seed=bits)
    grids = Grids.of(groups, torch.full((200,), bits, dtype=torch.int32), symmetric)
    gaps = (grids.value(grids.round(groups)) - groups).abs().amax(1)
    assert bool((gaps <= grids.step * 0.5 + 1e-6 * groups.abs().amax(1)).all())


def test_zero_is_a_number_of_every_grid():
    for bits, symmetric in KINDS:
        for shift in (-5.0, 0.0, 5.0):
            grids = Grids.of(normal(3, 8) + shift, torch.full((3,), bits, dtype=torch.int32), symmetric)
            assert torch.equal(grids.value(grids.round(torch.zeros(3, 1))), torch.zeros(3, 1))


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_weight_without_a_step_is_refused(symmetric):
    groups = torch.full((1, 8), torch.finfo(torch.float32).max)
    with pytest.raises(ValueError, match=r"the weight reaches 3\.4e\+38, for which no step can be stored"):
        Grids.of(groups, torch.tensor([2 if symmetric else 1], dtype=torch.int32), symmetric)


# --- weights that make up for others ----------------------------------------------------------------------------------


def textbook(weight, gram, kept=None, bits=None, group_size=0, symmetric=True):
    """GPTQ and SparseGPT with the inverse Hessian of the columns still to come, one taken out of it at a time."""
    outputs, inputs = weight.shape
    hessian = gram.double().clone()
    damping = 0.01 * float(hessian.diagonal().mean())
    for i in range(inputs):
        hessian[i, i] += damping + (1.0 if float(gram[i, i]) == 0 else 0.0)
    inverse = torch.linalg.inv(hessian)
    work = weight.double().clone()
    for i in range(inputs):
        if bits is not None and i % group_size == 0:
            part = work[:, i : i + group_size].clone()
            if kept is not None:
                part[~kept[:, i : i + group_size]] = 0
            grids = Grids.of(part.float(), bits[:, i // group_size].int(), symmetric)
        new = work[:, i].clone()
        if bits is not None:
            new = grids.value(grids.round(new.float()[:, None]))[:, 0].double()
        if kept is not None:
            new = new * kept[:, i]
        lost = (work[:, i] - new) / inverse[i, i]
        for row in range(outputs):
            for j in range(i + 1, inputs):
                work[row, j] -= lost[row] * inverse[i, j]
        work[:, i] = new
        inverse = inverse - torch.outer(inverse[:, i], inverse[i]) / inverse[i, i]
    return work


def masked(outputs, inputs, seed=4):
    return torch.rand(outputs, inputs, generator=torch.Generator().manual_seed(seed)) < 0.6


def some_bits(outputs, inputs, group_size, seed=5):
    shape = (outputs, -(-inputs // group_size))
    return torch.randint(2, 7, shape, generator=torch.Generator().manual_seed(seed))


GRAMS = {
    "correlated": correlated(24),
    "few rows": correlated(24, tokens=3),
    "an input that is 0": correlated(24) * (torch.arange(24) != 7) * (torch.arange(24) != 7)[:, None],
    "alike": torch.eye(24).double() * 5,
}


@pytest.mark.parametrize("name", GRAMS)
@pytest.mark.parametrize(
    ("pruned", "group_size"), [(True, 0), *((pruned, size) for pruned in (True, False) for size in (8, 16, 24))]
)
def test_compensated_is_the_textbooks(pruned, group_size, name):
    """`group_size` 0 rounds nothing; 16 leaves a last group of 8."""
    weight, gram = normal(5, 24), GRAMS[name]
    settings = {"kept": masked(5, 24)} if pruned else {}
    for symmetric in (True, False) if group_size else (True,):
        if group_size:
            bits = some_bits(5, 24, group_size)
            settings |= {"bits": bits, "group_size": group_size, "symmetric": symmetric}
        new, _, _ = compensated(weight, gram, **settings)
        torch.testing.assert_close(new.double(), textbook(weight, gram, **settings), rtol=1e-3, atol=1e-3)
        if pruned:
            assert torch.equal(new[~settings["kept"]], torch.zeros(int((~settings["kept"]).sum())))


def test_columns_beyond_one_block_of_the_fast_way():
    """Updates are put off from block to block of 128 columns; the result is that of none put off."""
    weight, gram, kept = normal(2, 150), correlated(150, tokens=300), masked(2, 150)
    new, _, _ = compensated(weight, gram, kept)
    torch.testing.assert_close(new.double(), textbook(weight, gram, kept), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("symmetric", [True, False])
def test_q_and_grids_say_what_the_weight_is(symmetric):
    bits = some_bits(5, 24, 8)
    new, q, grids = compensated(normal(5, 24), GRAMS["correlated"], bits=bits, group_size=8, symmetric=symmetric)
    assert torch.equal(grids.value(q.view(15, 8)).view(5, 24), new)
    assert torch.equal(grids.top, ((1 << bits) - 1).flatten().int())
    assert int(q.min()) >= 0
    assert bool((q.view(15, 8) <= grids.top[:, None]).all())


@pytest.mark.parametrize("symmetric", [True, False])
def test_it_beats_rounding_to_nearest(symmetric):
    for seed in range(5):
        weight, gram = normal(6, 32, seed=seed), correlated(32, seed=seed + 10)
        bits = torch.full((6, 4), 3)
        new, _, _ = compensated(weight, gram, bits=bits, group_size=8, symmetric=symmetric)
        groups = weight.view(24, 8)
        grids = Grids.of(groups, bits.flatten().int(), symmetric)
        nearest = grids.value(grids.round(groups)).view(6, 32)
        assert error(weight, new, gram) < 0.7 * error(weight, nearest, gram)


def test_it_beats_leaving_out_alone():
    for seed in range(5):
        weight, gram, kept = normal(6, 32, seed=seed), correlated(32, seed=seed + 10), masked(6, 32, seed=seed)
        new, *quantized = compensated(weight, gram, kept)
        assert error(weight, new, gram) < 0.7 * error(weight, weight * kept, gram)
        assert quantized == [None, None]


def test_nothing_to_do_changes_nothing():
    """All kept and nothing rounded, or numbers that are on the grid already."""
    weight, gram = normal(5, 24), GRAMS["correlated"]
    for kept in (None, torch.ones(5, 24, dtype=torch.bool)):
        assert torch.equal(compensated(weight, gram, kept)[0], weight)
    whole = torch.randint(-7, 8, (5, 24), generator=torch.Generator().manual_seed(0)).float()
    whole[:, ::8] = 7
    assert torch.equal(compensated(whole, gram, bits=torch.full((5, 3), 4), group_size=8)[0], whole)


def test_the_weight_given_is_left_alone():
    weight, gram = normal(5, 24), GRAMS["correlated"].clone()
    for dtype in (torch.float32, torch.bfloat16):
        given = weight.to(dtype)
        before = given.clone()
        new, _, _ = compensated(given, gram, masked(5, 24))
        assert new.dtype == torch.float32
        assert torch.equal(given, before)
    assert torch.equal(gram, GRAMS["correlated"])


@pytest.mark.parametrize("gram", [torch.diag(torch.arange(1.0, 25)), torch.zeros(24, 24)], ids=["diagonal", "nothing"])
def test_inputs_that_are_unlike_make_up_for_nothing_nor_do_those_that_never_came(gram):
    """What stays is as it was; no token may come by where an expert is sent none."""
    weight, kept = normal(5, 24), masked(5, 24)
    assert torch.equal(compensated(weight, gram, kept)[0], weight * kept)


@pytest.mark.parametrize(
    ("weight", "gram", "kept", "message"),
    [
        (normal(5, 24), torch.eye(23), None, r"a weight \(5, 24\) needs a gram \(24, 24\) .*; got \(23, 23\), None"),
        (normal(5, 24), torch.eye(24), masked(24, 5), r"kept of its shape; got \(24, 24\), \(24, 5\)"),
        (normal(5, 24), torch.eye(24) * float("nan"), None, "gram matrix holds NaN or infinity: run the calibration"),
        (normal(5, 24), torch.eye(24) * float("inf"), None, "gram matrix holds NaN or infinity"),
    ],
)
def test_what_does_not_fit_is_refused(weight, gram, kept, message):
    with pytest.raises(ValueError, match=message):
        compensated(weight, gram, kept)


# --- what later columns cannot make up for ----------------------------------------------------------------------------


def damped(gram):
    """As `compensated` takes it: 1% of the mean diagonal more, and 1 more for an input that is always 0."""
    diagonal = gram.diagonal()
    return gram.double() + torch.diag(0.01 * diagonal.mean() + (diagonal == 0).double())


def unexplained(gram):
    return Factor.of(gram).unexplained


def correction(hessian, column):
    """What each unit of error in a column changes in the later ones, by the normal equations of least squares."""
    later = slice(column + 1, len(hessian))
    return torch.linalg.solve(hessian[later, later], hessian[later, column])


@pytest.mark.parametrize("tokens", [3, 40, 200])
def test_unexplained_is_what_least_squares_leave(tokens):
    """Of each column of x, with rows √λ under it for the damping, on all later ones."""
    rows = normal(tokens, 8, seed=3).double() @ normal(8, 24, seed=4).double() + 0.3 * normal(tokens, 24, seed=5)
    gram = rows.T @ rows
    ridge = 0.01 * float(gram.diagonal().mean())
    tall = torch.cat([rows, math.sqrt(ridge) * torch.eye(24)])
    expected = []
    for j in range(24):
        gap = tall[:, j]
        if j < 23:
            gap = gap - tall[:, j + 1 :] @ torch.linalg.lstsq(tall[:, j + 1 :], tall[:, j : j + 1]).solution[:, 0]
        expected.append(float(gap.square().sum()))
    found = unexplained(gram)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), torch.tensor(expected).double(), rtol=1e-4, atol=0)  # of float32
    assert float(found[-1]) == pytest.approx(float(gram[-1, -1]) + ridge), "nothing comes after the last"
    assert bool((found <= (gram.diagonal() + ridge) * (1 + 1e-6)).all())


@pytest.mark.parametrize("group_size", [8, 16])
@pytest.mark.parametrize("name", GRAMS)
def test_errors_cost_what_is_unexplained(name, group_size):
    """tr E (G + damping) Eᵀ of all that `compensated` did is the sum of e² · unexplained, e taken when it was made."""
    weight, gram = normal(5, 24), GRAMS[name]
    new, _, _ = compensated(weight, gram, bits=some_bits(5, 24, group_size), group_size=group_size)
    hessian, work = damped(gram), weight.double().clone()
    cost = torch.zeros(5).double()
    for j in range(24):
        e = work[:, j] - new[:, j].double()
        work[:, j] = new[:, j].double()
        work[:, j + 1 :] += torch.outer(e, correction(hessian, j))
        cost += e.square() * float(unexplained(gram)[j])
    gap = weight.double() - new.double()
    gap[:, gram.diagonal() == 0] = 0  # these cost nothing
    torch.testing.assert_close(cost, ((gap @ hessian) * gap).sum(dim=1), rtol=1e-3, atol=0)


def test_unexplained_of_inputs_that_are_unlike_is_their_energy():
    gram = torch.diag(torch.arange(1.0, 25))
    torch.testing.assert_close(unexplained(gram), torch.arange(1.0, 25) + 0.125)


def test_inputs_that_are_0_cost_nothing():
    found = unexplained(GRAMS["an input that is 0"])
    assert float(found[7]) == 0
    assert int((found > 0).sum()) == 23
    assert torch.equal(unexplained(torch.zeros(24, 24)), torch.zeros(24))


def test_an_input_that_a_later_one_repeats_costs_the_damping_at_most():
    """The earlier of two alike is made up for; the later is not."""
    gram = correlated(24)
    order = torch.tensor([*range(24), 5])
    twice = gram[order][:, order]
    ridge = 0.01 * float(twice.diagonal().mean())
    found = unexplained(twice)
    assert float(found[5]) <= 2 * ridge * (1 + 1e-6)
    assert float(found[24]) == pytest.approx(float(gram[5, 5]) + ridge, rel=1e-6)


def written_out(gram):
    """What `unexplained` is, by the inverses of all trailing parts, in float64."""
    hessian = damped(gram.double())
    left = [1 / torch.linalg.inv(hessian[j:, j:])[0, 0] for j in range(len(hessian))]
    return torch.stack(left) * (gram.diagonal() > 0)


SCALES = {"small": 1e-20, "large": 1e20}


@pytest.mark.parametrize("name", SCALES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_unit_of_the_inputs_does_not_matter(dtype, name):
    gram, weight, bits = correlated(24).to(dtype), normal(5, 24), some_bits(5, 24, 8)
    scaled = (gram.double() * SCALES[name]).to(dtype)
    torch.testing.assert_close(
        unexplained(scaled).double() / SCALES[name], unexplained(gram).double(), rtol=1e-4, atol=0
    )
    new, again = (compensated(weight, one, bits=bits, group_size=8)[0] for one in (gram, scaled))
    torch.testing.assert_close(new, again)


def test_float32_is_enough_where_inputs_are_far_apart():
    """One input a thousand times the others, as in language models; twins; ones that are always 0."""
    scales = torch.linspace(-2, 2, 64).exp().double()
    scales[5], scales[9] = 1000, 0
    gram = correlated(64, tokens=300) * scales * scales[:, None]
    order = torch.tensor([*range(64), 5, 7])
    gram = gram[order][:, order]
    assert _upper(gram, gram.diagonal() == 0, torch.float32)[1]
    torch.testing.assert_close(unexplained(gram).double(), written_out(gram), rtol=1e-3, atol=0)


def test_float64_where_float32_is_not_enough(monkeypatch):
    """With so little damping, what is left of inputs that others make up for is less than float32 rounds them to."""
    monkeypatch.setattr(factor, "DAMPING", 1e-9)
    rows = normal(3, 24).double()
    gram = rows.T @ rows
    silent = torch.zeros(24, dtype=torch.bool)
    assert not _upper(gram, silent, torch.float32)[1]
    hessian = gram + 1e-9 * gram.diagonal().mean() * torch.eye(24)
    expected = torch.stack([1 / torch.linalg.inv(hessian[j:, j:])[0, 0] for j in range(24)])
    torch.testing.assert_close(unexplained(gram).double(), expected, rtol=1e-4, atol=0)


def test_what_is_no_sum_of_squares_is_refused():
    with pytest.raises(ValueError, match="the gram matrix is no sum of x xᵀ: it has an eigenvalue below 0"):
        Factor.of(torch.tensor([[1.0, 2.0], [2.0, 1.0]]))


@pytest.mark.parametrize("group_size", [8, 16])
def test_a_factor_stands_for_its_gram(group_size):
    weight, gram, bits = normal(5, 24), GRAMS["correlated"], some_bits(5, 24, group_size)
    one, two = (compensated(weight, g, bits=bits, group_size=group_size) for g in (gram, Factor.of(gram)))
    assert torch.equal(one[0], two[0])
    assert torch.equal(one[1], two[1])
    with pytest.raises(ValueError, match=r"needs a gram \(23, 23\) .*; got \(24, 24\)"):
        compensated(weight[:, :23], Factor.of(gram))


def test_unexplained_needs_numbers():
    with pytest.raises(ValueError, match="gram matrix holds NaN or infinity"):
        unexplained(torch.full((3, 3), float("nan")))


def test_a_factor_is_made_in_the_memory_of_one_matrix() -> None:
    """Beside it: a part of it that is turned round, and single columns."""
    rows = normal(3000, 2048)
    gram = rows.T @ rows
    assert most_allocated(lambda: Factor.of(gram)) < 1.7 * gram.nbytes
