"""Packing against slow oracles: every bit read by itself, every weight held against every value it could have had."""

import struct
from bisect import bisect_left

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from hf_compress.modules.packed import MAX_BITS, MixedPrecisionLinear, Packing, pack

OUTPUTS, INPUTS, GROUP = 3, 32, 16
# One symmetric bit has no positive value; asymmetric zeros are stored in 8 bits, so wider groups must be symmetric.
FEWEST = {True: 2, False: 1}
MOST = {True: MAX_BITS, False: 8}
KINDS = [(bits, symmetric) for symmetric in (True, False) for bits in range(FEWEST[symmetric], MOST[symmetric] + 1)]
EVERY_WIDTH = pytest.mark.parametrize(("bits", "symmetric"), KINDS)
SIDES = st.sampled_from([0, 1, -1])
BFLOATS = [struct.unpack("<f", struct.pack("<I", upper << 16))[0] for upper in range(0x7F80)]  # 0 and up, finite


def weight(seed=0, outputs=OUTPUTS, inputs=INPUTS, scale=4.0):
    return scale * torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(seed))


def mixture(seed, outputs, groups, symmetric=True):
    """Bits of every group: a few of all that there are."""
    shape, generator = (outputs, groups), torch.Generator().manual_seed(seed)
    return torch.randint(FEWEST[symmetric], MOST[symmetric] + 1, shape, generator=generator)


def packed(values, bits, group_size=GROUP, symmetric=True, bias=None):
    """The layer that `pack` makes of a weight; `bits` of every group, or one number for all."""
    if isinstance(bits, int):
        bits = torch.full((values.shape[0], values.shape[1] // group_size), bits)
    packing, tensors = pack(values, bits, group_size, symmetric)
    layer = MixedPrecisionLinear(packing, bias is not None)
    layer.load_state_dict(tensors | ({} if bias is None else {"bias": bias}))
    return layer


# --- oracles ----------------------------------------------------------------------------------------------------------


def read_bits(layer):
    """The integers of every group, bit by bit: the lowest bit of each group, the next of each that has more, ..."""
    stored, bits = bytes(layer.weight.view(torch.uint8).tolist()), layer.bits.tolist()
    size = layer.packing.group_size
    integers = [[0] * size for _ in bits]
    place = 0
    for plane in range(MAX_BITS):
        for group, width in enumerate(bits):
            if width <= plane:
                continue
            for k in range(size):
                integers[group][k] += ((stored[place // 8] >> (place % 8)) & 1) << plane
                place += 1
    assert place == 8 * len(stored), "bits are left over"
    return integers


def read_steps(layer):
    """A bfloat16 is the upper half of a float32."""
    return [struct.unpack("<f", struct.pack("<hh", 0, step))[0] for step in layer.steps.tolist()]


def read_zeros(layer):
    """The integer that stands for 0 in every group."""
    if layer.packing.symmetric:
        return [2 ** (width - 1) for width in layer.bits.tolist()]
    return layer.zeros.tolist()


def read_weight(layer):
    """The weight (outputs, inputs) by the formula w = step * (q - zero)."""
    packing = layer.packing
    groups = zip(read_bits(layer), read_steps(layer), read_zeros(layer), strict=True)
    flat = [step * (q - zero) for integers, step, zero in groups for q in integers]
    return torch.tensor(flat, dtype=torch.double).view(packing.outputs, packing.inputs)


def groups_of(values, group_size=GROUP):
    """Rows cut into groups, in the order of the packing."""
    return [
        row[start : start + group_size] for row in values.tolist() for start in range(0, values.shape[1], group_size)
    ]


def covering_step(group, bits, symmetric):
    """The smallest bfloat16 by which `bits` reach the whole group."""
    if symmetric:
        reach = max(abs(w) for w in group) / (2 ** (bits - 1) - 1)
    else:
        reach = np.float32(max(*group, 0.0) - min(*group, 0.0)) / (2**bits - 1)
    return BFLOATS[bisect_left(BFLOATS, np.float32(reach))]


@EVERY_WIDTH
def test_what_is_unpacked_is_what_the_bits_say(bits, symmetric):
    layer = packed(weight(bits), bits, symmetric=symmetric)
    assert layer.unpacked().dtype == torch.float32
    assert torch.equal(layer.unpacked(), read_weight(layer).float())


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_mixture_is_read_group_by_group(symmetric):
    for seed in range(5):
        layer = packed(weight(seed, 4, 40), bits := mixture(seed, 4, 5, symmetric), 8, symmetric)
        assert layer.bits.tolist() == bits.flatten().tolist()
        assert torch.equal(layer.unpacked(), read_weight(layer).float())


def test_a_group_is_packed_alike_in_any_company():
    values = weight(outputs=1)
    wide, narrow = packed(values, torch.tensor([[7, 7]])), packed(values, torch.tensor([[2, 7]]))
    assert torch.equal(narrow.unpacked()[:, GROUP:], wide.unpacked()[:, GROUP:])
    assert not torch.equal(narrow.unpacked()[:, :GROUP], wide.unpacked()[:, :GROUP])


# --- rounding ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1e-4, 0.02, 4.0])
@EVERY_WIDTH
def test_every_weight_becomes_the_nearest_value_that_its_group_has(bits, symmetric, scale):
    values = weight(10 + bits, scale=scale)
    layer = packed(values, bits, symmetric=symmetric)
    stored, steps, zeros = groups_of(read_weight(layer)), read_steps(layer), read_zeros(layer)
    for group, kept, step, zero in zip(groups_of(values), stored, steps, zeros, strict=True):
        levels = step * (np.arange(2**bits) - zero)
        for w, got in zip(group, kept, strict=True):
            assert abs(got - w) <= np.abs(levels - w).min() + 1e-6 * abs(w)


@pytest.mark.parametrize("scale", [1e-6, 1e-4, 0.02, 4.0, 1e4])
@EVERY_WIDTH
def test_the_step_is_the_smallest_bfloat16_that_covers_the_group(bits, symmetric, scale):
    values = weight(20 + bits, scale=scale)
    expected = [covering_step(group, bits, symmetric) for group in groups_of(values)]
    assert read_steps(packed(values, bits, symmetric=symmetric)) == expected


@pytest.mark.parametrize("low", [-1.0, 0.0, 2.0, -9.0])
@EVERY_WIDTH
def test_a_weight_of_zero_stays_exactly_zero(bits, symmetric, low):
    """Also where a group has weights of one sign, and 0 is at the end of its range or beyond, or is all there is."""
    values = low + 4 * torch.rand(OUTPUTS, INPUTS, generator=torch.Generator().manual_seed(bits))
    pruned = torch.rand(OUTPUTS, INPUTS, generator=torch.Generator().manual_seed(1)) < 0.4
    pruned[1] = True
    values = values.masked_fill(pruned, 0)
    values[1, GROUP:] *= -1  # to -0.0
    layer = packed(values, bits, symmetric=symmetric)
    assert read_bits(layer)[2:4] == [[zero] * GROUP for zero in read_zeros(layer)[2:4]]
    got = layer.unpacked()
    assert torch.equal(got[pruned], torch.zeros(int(pruned.sum())))
    assert got[~pruned].abs().max() > 0


# --- what it takes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_payload_is_every_groups_bits_and_nothing_more(symmetric):
    bits = mixture(3, 4, 5, symmetric)
    layer = packed(weight(3, 4, 40), bits, 8, symmetric)
    widths = bits.flatten().tolist()
    assert layer.packing.payload == layer.weight.numel() == sum(widths)  # bytes, since a group is 8 weights
    assert layer.packing.planes == tuple(sum(width > plane for width in widths) for plane in range(max(widths)))


@pytest.mark.parametrize(("bits", "symmetric"), [(2, True), (1, False), (4, False), (16, True)])
def test_the_memory_is_the_payload_and_a_few_bytes_a_group(bits, symmetric):
    layer = packed(weight(), bits, symmetric=symmetric, bias=torch.zeros(OUTPUTS))
    groups = OUTPUTS * INPUTS // GROUP
    stored = sum(buffer.numel() * buffer.element_size() for buffer in layer.buffers())
    assert stored == OUTPUTS * INPUTS * bits // 8 + groups * (1 + 2 + (0 if symmetric else 1))
    assert sum(p.numel() for p in layer.parameters()) == OUTPUTS


def test_its_text_tells_the_bits_a_weight():
    assert "bits a weight=3.00" in repr(packed(weight(), torch.tensor([[2, 4]] * OUTPUTS)))


# --- as a layer -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("offset", [weight(5, 1, OUTPUTS)[0], None], ids=["bias", "no bias"])
def test_forward_is_the_linear_map_of_the_unpacked_weight(dtype, offset):
    layer = packed(weight(), mixture(1, OUTPUTS, 2), bias=offset).to(dtype)
    x = torch.randn(2, 4, INPUTS, dtype=dtype, generator=torch.Generator().manual_seed(2))
    got = layer(x)
    assert got.dtype == dtype
    assert (layer.bias is None) == (offset is None)
    assert torch.equal(got, functional.linear(x, layer.unpacked().to(dtype), layer.bias))


@pytest.mark.parametrize("symmetric", [True, False])
def test_casting_the_model_leaves_the_weight_alone(symmetric):
    layer = packed(weight(), mixture(1, OUTPUTS, 2, symmetric), symmetric=symmetric, bias=torch.ones(OUTPUTS))
    before = layer.unpacked()
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        layer.to(dtype)
        assert torch.equal(layer.unpacked(), before)
        assert layer.bias.dtype == dtype


def test_the_gradient_reaches_the_inputs_and_the_bias():
    layer = packed(weight(), 4, bias=torch.ones(OUTPUTS))
    x = torch.randn(5, INPUTS, requires_grad=True)
    upstream = torch.randn(5, OUTPUTS)
    (layer(x) * upstream).sum().backward()
    torch.testing.assert_close(x.grad, upstream @ layer.unpacked())
    torch.testing.assert_close(layer.bias.grad, upstream.sum(0))


def test_what_is_packed_is_not_trained():
    layer = packed(weight(), 4, symmetric=False, bias=torch.ones(OUTPUTS))
    assert [name for name, _ in layer.named_parameters()] == ["bias"]
    assert set(layer.state_dict()) == {"weight", "bits", "steps", "zeros", "bias"}
    assert layer.weight.ndim == 1, "stock Transformers must stop at the weight's shape"


@pytest.mark.parametrize("symmetric", [True, False])
def test_on_meta_it_takes_its_tensors_from_a_state_dict(symmetric):
    layer = packed(weight(), mixture(1, OUTPUTS, 2, symmetric), symmetric=symmetric, bias=torch.ones(OUTPUTS))
    empty = MixedPrecisionLinear(layer.packing, True, device="meta")
    assert all(tensor.is_meta for tensor in empty.state_dict().values())
    empty.load_state_dict(layer.state_dict(), assign=True)
    assert torch.equal(empty.unpacked(), layer.unpacked())


def test_a_trained_transposed_half_weight_is_packed_like_its_copy():
    half = torch.nn.Parameter(weight(outputs=INPUTS, inputs=OUTPUTS).bfloat16())
    plain = half.detach().T.contiguous().float()
    assert torch.equal(packed(half.T, 4).unpacked(), packed(plain, 4).unpacked())


def test_packing_changes_neither_the_weight_nor_the_bits():
    values, bits = weight(), mixture(1, OUTPUTS, 2)
    packed(values, bits)
    assert torch.equal(values, weight())
    assert torch.equal(bits, mixture(1, OUTPUTS, 2))


# --- bad input --------------------------------------------------------------------------------------------------------


def bad(value):
    """A weight with one entry that is no number to be rounded."""
    values = weight()
    values[1, 3] = value
    return values


FOUR = torch.full((OUTPUTS, INPUTS // GROUP), 4)


@pytest.mark.parametrize(
    ("values", "bits", "group_size", "symmetric", "message"),
    [
        (bad(float("nan")), FOUR, GROUP, True, "NaN or infinity"),
        (bad(float("inf")), FOUR, GROUP, True, "NaN or infinity"),
        (bad(float("-inf")), FOUR, GROUP, False, "NaN or infinity"),
        (weight(), FOUR - 4, GROUP, True, "between 1 and 16; got 0 to 0"),
        (weight(), FOUR - 5, GROUP, True, "between 1 and 16; got -1 to -1"),
        (weight(), FOUR + 13, GROUP, True, "between 1 and 16; got 17 to 17"),
        (weight(), FOUR * 100, GROUP, True, "between 1 and 16; got 400 to 400"),
        (weight(), FOUR - 3, GROUP, True, "1 bit would have no positive value: give it 2, or symmetric=False"),
        (weight(), FOUR + 5, GROUP, False, "9-bit groups must be symmetric"),
        (weight(), FOUR + 0.5, GROUP, True, "bits are no whole numbers"),
        (weight(), FOUR.repeat(1, 4), 4, True, "a multiple of 8 that divides the 32 inputs; got 4"),
        *((weight(), FOUR, size, True, f"in groups of {size} needs bits") for size in (-8, 4, 12, 64)),
        (weight(), FOUR[:, :1], GROUP, True, r"needs bits \(outputs, inputs / 16, rounded up\); got \(3, 1\)"),
        (weight(), torch.cat([FOUR, FOUR]), GROUP, True, r"got \(6, 2\)"),
        (weight(), FOUR.T, GROUP, True, r"got \(2, 3\)"),
        (weight(), FOUR[:0], GROUP, True, r"got \(0, 2\)"),
        (weight()[0], FOUR[0], GROUP, True, r"a weight \(32,\)"),
        (weight()[..., None], FOUR, GROUP, True, r"a weight \(3, 32, 1\)"),
    ],
)
def test_what_cannot_be_packed_is_refused(values, bits, group_size, symmetric, message):
    with pytest.raises(ValueError, match=message):
        pack(values, bits, group_size, symmetric)


@pytest.mark.parametrize(
    ("planes", "symmetric", "message"),
    [
        ((), True, "planes must be 1 to 16"),
        ((6,) * 17, True, "planes must be 1 to 16"),
        ((5,), True, "the first all 6"),
        ((7,), True, "the first all 6"),
        ((6, 0), True, "planes must be 1 to 16 positive"),
        ((6, -1), True, "planes must be 1 to 16 positive"),
        ((6, 2, 3), True, "planes must fall"),
        ((6,) * 9, False, "must be symmetric"),
        ((6,), True, "would have no positive value"),
        ((6, 5), True, "would have no positive value"),
    ],
)
def test_planes_that_no_mixture_has(planes, symmetric, message):
    with pytest.raises(ValueError, match=message):
        Packing(OUTPUTS, INPUTS, GROUP, planes, symmetric)


@pytest.mark.parametrize("group_size", [-8, 0, 4, 12, 24, 64])
def test_groups_that_do_not_divide_a_row_into_whole_bytes(group_size):
    with pytest.raises(ValueError, match=f"a multiple of 8 that divides the 32 inputs; got {group_size}"):
        Packing(OUTPUTS, INPUTS, group_size, (6, 6))


# --- properties -------------------------------------------------------------------------------------------------------


@st.composite
def grids(draw):
    """Whole numbers that fill the range of their bits, so that every step is 1: (integers, bits, symmetric)."""
    symmetric = draw(st.booleans())
    groups = draw(st.integers(1, 5))
    bits = draw(st.lists(st.integers(FEWEST[symmetric], MOST[symmetric]), min_size=groups, max_size=groups))
    rows = []
    for width in bits:
        if symmetric:
            top = 2 ** (width - 1) - 1
            low, high, ends = -top, top, [-top]
        else:
            zero = draw(st.integers(0, 2**width - 1))
            low, high = -zero, 2**width - 1 - zero
            ends = [low, high]
        rest = draw(st.lists(st.integers(low, high), min_size=8 - len(ends), max_size=8 - len(ends)))
        rows.append(draw(st.permutations(ends + rest)))
    return rows, bits, symmetric


@given(grids())
def test_whole_numbers_come_back_bit_for_bit(grid):
    rows, bits, symmetric = grid
    values = torch.tensor(rows, dtype=torch.float32)
    layer = packed(values, torch.tensor(bits)[:, None], 8, symmetric)
    assert read_steps(layer) == [1.0] * len(bits)
    assert torch.equal(layer.unpacked(), values)
    zeros = read_zeros(layer)
    assert read_bits(layer) == [[w + zero for w in row] for row, zero in zip(rows, zeros, strict=True)]


@given(st.lists(st.floats(-1000, 1000, width=32), min_size=8, max_size=8), st.sampled_from(KINDS), SIDES)
def test_any_group_is_kept_to_half_a_step(group, kind, side):
    """Of groups with both signs, and of those with one, where 0 is at the end of the range or beyond."""
    group = [side * abs(w) for w in group] if side else group
    layer = packed(torch.tensor([group]), kind[0], 8, kind[1])
    errors = [abs(w - kept) for w, kept in zip(group, read_weight(layer)[0].tolist(), strict=True)]
    # Beside rounding in float32, and weights so small that it has no step for them.
    assert max(errors) <= covering_step(group, *kind) / 2 + 1e-6 * max(map(abs, group)) + 2.0**-126
