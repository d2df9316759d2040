"""The kernel's products against slow oracles: every weight by its formula, every sum in float64."""

import pytest
import torch
from torch.nn import functional

from hf_compress.numerics import four_bit
from hf_compress.numerics.four_bit import can_write_out, digit_product, digits_of, fits_kernel, written_out

SIZES = (32, 64, 96, 128, 192, 256, 512)


def generator(seed):
    return torch.Generator().manual_seed(seed)


def random(*shape, seed=9):
    return torch.randn(shape, generator=generator(seed))


def ranges(bits, shape, zero):
    """The least and the most multiple of every group of so many bits, where `zero` of them are below 0."""
    bits = torch.as_tensor(bits).expand(shape)
    zeros = 2 ** (bits - 1) if zero == "middle" else (2**bits - 1) * zero // 4
    return -zeros, 2**bits - 1 - zeros


def example(bits, size=32, groups=2, outputs=5, zero="middle", seed=0, powers=False):
    """(multiples, steps): every group has its least and its most; `powers` for steps that are powers of two."""
    least, most = ranges(bits, (outputs, groups), zero)
    spread = torch.rand(outputs, groups, size, generator=generator(seed), dtype=torch.double)
    multiples = (least[..., None] + (spread * (most - least + 1)[..., None]).floor()).int()
    multiples[..., 0], multiples[..., 1] = least, most
    steps = 0.01 + torch.rand(outputs, groups, generator=generator(seed + 1))
    steps = 2.0 ** steps.log2().round() if powers else steps
    return multiples.view(outputs, groups * size), steps.bfloat16()


def rounded(weight, bits):
    """(multiples, steps) of a weight (outputs, groups, size), symmetric and to nearest, as reaching as it is."""
    middle = 2 ** (bits - 1)
    steps = (1.01 * weight.abs().amax(-1) / max(middle - 1, 1)).bfloat16()
    multiples = (weight / steps[..., None].float()).round().int().clamp(-middle, middle - 1)
    return multiples.flatten(1), steps


def entries(multiples, steps):
    """The weight (outputs, inputs) float64, one by one: step * multiple."""
    size, steps = multiples.shape[1] // steps.shape[1], steps.tolist()
    rows = [[steps[i][k // size] * number for k, number in enumerate(row)] for i, row in enumerate(multiples.tolist())]
    return torch.tensor(rows, dtype=torch.double)


def product(parts, x):
    """The sum of the products with all forms."""
    return sum(digit_product(x, *form, len(parts[0])) for form in digits_of(*parts))


def assert_product(parts, x, name=None):
    """In float32 nothing but shifts is rounded, each to 8 bits, and no shift is more than the group's range."""
    weight, got = entries(*parts), product(parts, x)
    assert got.dtype == torch.float32
    assert got.shape == (len(x), len(weight)), name
    groups = parts[0].view(*parts[1].shape, -1)
    spans = (groups.amax(-1) - groups.amin(-1)) * parts[1].double()
    sums = x.double().view(len(x), parts[1].shape[1], -1).sum(-1).abs()
    assert bool(((got.double() - x.double() @ weight.T).abs() <= sums @ spans.T / 2**9 + 1e-3).all()), name


@pytest.mark.parametrize("zero", ["middle", 0, 1, 2, 3, 4])
@pytest.mark.parametrize("bits", range(1, 9))
def test_every_number_of_bits(bits, zero):
    """Exactly the weight, read off by unit vectors, where steps are powers of two."""
    for size in (32, 96):
        parts = example(bits, size, zero=zero, powers=True)
        columns = product(parts, torch.eye(2 * size))
        assert torch.equal(columns.T.double(), entries(*parts)), f"groups of {size}"
    assert_product(example(bits, zero=zero), random(3, 64))


@pytest.mark.parametrize("zero", ["middle", 0, 3])
def test_mixtures_of_bits(zero):
    for seed, most in enumerate((4, 8)):
        bits = torch.randint(1, most + 1, (6, 3), generator=generator(seed))
        for powers in (False, True):
            parts = example(bits, groups=3, outputs=6, zero=zero, powers=powers)
            assert_product(parts, random(4, 96), f"up to {most} bits")


@pytest.mark.parametrize(
    ("size", "groups", "outputs"),
    [*((size, groups, 3) for size in SIZES for groups in (1, 3)), *((32, 2, n) for n in (1, 2, 15, 16, 17, 33, 48))],
)
@pytest.mark.parametrize("bits", [4, 7, 8])
def test_every_size_of_groups_and_any_number_of_outputs(size, groups, outputs, bits):
    assert_product(example(bits, size, groups, outputs), random(3, groups * size))


@pytest.mark.parametrize("bits", [4, 8])
def test_groups_without_a_step_give_nothing(bits):
    multiples, steps = example(bits, zero=1)
    steps[:, 1] = 0
    assert_product((multiples, steps), random(3, 64))
    assert torch.equal(product((multiples, 0 * steps), random(3, 64)), torch.zeros(3, 5))


@pytest.mark.parametrize("bits", [4, 8])
def test_rows_in_any_order_of_memory_and_none(bits):
    parts, x = example(bits), random(6, 64)
    for other in (x.T.contiguous().T, functional.pad(x, (3, 5))[:, 3:67], x.repeat_interleave(2, 0)[::2]):
        assert not other.is_contiguous()
        assert torch.equal(product(parts, other), product(parts, x))
    assert torch.equal(product(parts, x[:1].expand(6, 64))[5], product(parts, x)[0])
    assert product(parts, x[:0]).shape == (0, 5)


def test_nothing_given_is_changed():
    given = [*example(8, zero=1), random(3, 64)]
    product(given[:2], given[2])
    for tensor, fresh in zip(given, [*example(8, zero=1), random(3, 64)], strict=True):
        assert torch.equal(tensor, fresh)


def errors(parts, x):
    """Of the kernel, and of an unpacked weight in the same dtype."""
    weight, x = entries(*parts), x.bfloat16()
    exact = x.double() @ weight.T
    found = product(parts, x), functional.linear(x, weight.bfloat16())
    assert all(got.dtype == torch.bfloat16 for got in found)
    return [float((got.double() - exact).norm() / exact.norm()) for got in found]


@pytest.mark.parametrize("mean", [0, 2])
@pytest.mark.parametrize("bits", range(2, 9))
def test_errors_are_about_those_of_an_unpacked_weight(bits, mean):
    """Also of inputs that are not around 0, as behind a ReLU: there a large part would be left where sums cancel."""
    for size in (32, 128):
        kernel, unpacked = errors(rounded(random(48, 512 // size, size), bits), mean + random(40, 512, seed=1))
        assert kernel <= 2.5 * unpacked, f"groups of {size}"


@pytest.mark.parametrize("mean", [0, 2])
@pytest.mark.parametrize("bits", [3, 4, 6, 8])
def test_errors_where_each_group_has_an_outlier(bits, mean):
    weight = random(48, 8, 64)
    weight[..., 3] = random(48, 8, seed=2).sign() * (8 + 8 * torch.rand(48, 8, generator=generator(3)))
    kernel, unpacked = errors(rounded(weight, bits), mean + random(40, 512, seed=1))
    assert kernel <= 2.5 * unpacked


@pytest.mark.parametrize("zero", [0, 1, 3, 4])
@pytest.mark.parametrize("bits", [2, 4, 6, 8])
def test_errors_where_zeros_are_anywhere(bits, zero):
    kernel, unpacked = errors(example(bits, 64, 8, 48, zero), random(40, 512))
    assert kernel <= 2.5 * unpacked


@pytest.mark.parametrize("zero", ["middle", 0, 1, 2, 3, 4])
def test_groups_of_at_most_four_bits_take_one_form(zero):
    bits = torch.full((5, 2), 4)
    for fewer in range(1, 5):
        assert len(digits_of(*example(fewer, zero=zero))) == 1, f"{fewer} bits"
    bits[3, 1] = 5
    forms = digits_of(*example(bits, zero=zero))
    assert len(forms) == 2
    for digits, _ in forms:
        assert digits.numel() * digits.element_size() == 16 * 64 // 2  # of outputs filled up


def test_which_groups_fit():
    for size in SIZES:
        assert fits_kernel(example(8, size)[0], size)
    for size in (8, 16, 24, 40, 48, 80, 100):
        assert not fits_kernel(example(2, size)[0], size)
    for least in (-300, -128, 0, 45):
        multiples = torch.full((3, 64), least, dtype=torch.int32)
        multiples[1, 40] = least + 255
        assert fits_kernel(multiples, 32)
        multiples[1, 40] += 1
        assert not fits_kernel(multiples, 32)
        assert fits_kernel(multiples[:, :32], 32)


def whole(parts, dtype=torch.float32):
    """The matrix (outputs, inputs) that is written out, and which columns came together."""
    found = list(written_out(digits_of(*parts), dtype))
    return torch.cat([columns for _, columns in found], dim=1).T[: len(parts[0])], [place for place, _ in found]


@pytest.mark.parametrize("zero", ["middle", 0, 3])
@pytest.mark.parametrize("outputs", [5, 16, 48, 64, 70, 112, 128, 200])
def test_the_matrix_is_written_out(outputs, zero):
    """The digits of all rows are found, whole blocks of them and what is left over."""
    for bits in (3, 4, 8):
        parts = example(bits, outputs=outputs, zero=zero, powers=True)
        assert can_write_out(outputs + -outputs % 16)
        assert torch.equal(whole(parts)[0].double(), entries(*parts)), f"{bits} bits"


def test_some_columns_at_a_time(monkeypatch):
    parts = example(8, outputs=200, powers=True)
    monkeypatch.setattr(four_bit, "_CACHED", 64 * 64)  # entries of one block
    matrix, places = whole(parts)
    assert torch.equal(matrix.double(), entries(*parts))
    assert [place.start for place in places] == [0, *(place.stop for place in places[:-1])]
    assert len(places) > 3


@pytest.mark.parametrize("zero", ["middle", 1])
def test_the_matrix_in_half_precision(zero):
    """Each entry is rounded but for a few times, as are the kernel's."""
    parts = example(8, outputs=70, zero=zero)
    error = whole(parts, torch.bfloat16)[0].double() - entries(*parts)
    assert error.norm() < 2**-7 * entries(*parts).norm()


def test_another_order_of_digits_is_noticed(monkeypatch):
    """A processor of which nothing is known."""

    def other(numbers, _):
        return (numbers[:, 0::2] + 16 * numbers[:, 1::2]).flip(0).to(torch.uint8)

    class Operators:
        _convert_weight_to_int4pack_for_cpu = staticmethod(other)

    for function in (four_bit._block, four_bit._lays_pairs):
        function.cache_clear()
    monkeypatch.setattr(torch.ops, "aten", Operators)
    assert not can_write_out(64)
    for function in (four_bit._block, four_bit._lays_pairs):
        function.cache_clear()
