"""Weights of few bits in the form that PyTorch's kernel for four bits on a CPU multiplies with.

The kernel computes x Wᵀ where W = step · (n − 8) + shift, n from 0 to 15, with a step and a shift for each group of a
row. Weights of up to eight bits are the sum of two such: of their digits in base 16.

It is made for few rows. For many it is faster to write the matrix out and to multiply with that, and a few hundred
columns of it at a time stay in the processor's cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional

_WIDTHS = (256, 128, 64, 32)  # of groups that the kernel knows
_OUTPUTS = 16  # they have to be a multiple of this
_BASE, _LEAST, _MOST = 16, -8, 7  # of digits
_BLOCKS = (64, 32)  # rows that the kernel lays together, by processor
_CACHED = 2**21  # entries of a matrix that are written out at a time
_PROBED = 32  # inputs of the matrices by which it is found out how the kernel lays digits
_SIGNS = 0x88  # flips in a byte what makes two digits from 0 to 15 two from −8 to 7 as signed numbers

Form = tuple[Tensor, Tensor]  # digits as the kernel has them, and scales; see `digits_of`


def fits_kernel(multiples: Tensor, group_size: int) -> bool:
    """Whether the kernel can do with such groups of whole numbers: their size, and that two digits are enough."""
    groups = multiples.view(-1, group_size)
    return group_size % _WIDTHS[-1] == 0 and int((groups.amax(1) - groups.amin(1)).max()) < _BASE**2


def digits_of(multiples: Tensor, steps: Tensor) -> list[Form]:
    """The forms, one or two, whose products with inputs add up to a weight's.

    Args:
        multiples: the weight over its groups' steps, (outputs, inputs) int32, such as `fits_kernel`.
        steps: (outputs, inputs / group_size) bfloat16.

    Returns:
        Of the low digit, and of the high one if some group needs it: the digits in an order of the kernel's own, which
        hangs on the processor, (outputs filled up to 16, inputs / 2) uint8; steps and shifts, (groups, outputs filled
        up, 2) bfloat16.
    """
    low, high, low_shift, high_shift = _split(multiples.view(*steps.shape, -1))
    exact = high_shift * steps.float()
    stored = exact.to(torch.bfloat16)  # what that loses goes to the other shift, which is small
    forms = [_form(low, steps, low_shift * steps.float() + exact - stored.float())]
    if bool(high.any()) or bool(high_shift.any()):
        forms.append(_form(high, steps * _BASE, stored))
    return forms


def digit_product(rows: Tensor, digits: Tensor, scales: Tensor, outputs: int) -> Tensor:
    """x Wᵀ of rows (any number, inputs) with one form of a weight, (any number, outputs)."""
    width = rows.shape[1] // scales.shape[0]
    found = torch.ops.aten._weight_int4pack_mm_for_cpu(rows.contiguous(), digits, width, scales.to(rows.dtype))
    return found[:, :outputs]


def can_write_out(outputs: int) -> bool:
    """Whether it is known how the kernel lays the digits of so many outputs, a multiple of 16, on this processor."""
    block = _block()
    return block is not None and (outputs % block == 0 or _lays_pairs(outputs % block))


def written_out(forms: Sequence[Form], dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """The transposed matrix (inputs, outputs filled up) that forms add up to: some columns after others, and which.

    Args:
        forms: of `digits_of`, such as `can_write_out`.
    """
    (outputs, half), block = forms[0][0].shape, _block()
    assert block is not None
    whole = outputs - outputs % block
    step = max(1, _CACHED // (2 * half * block)) * block
    for start, stop in pairwise(dict.fromkeys([*range(0, whole, step), whole, outputs])):
        columns = slice(start, stop)
        first, *others = (_columns(*form, columns, block, dtype) for form in forms)
        yield columns, sum(others, first)


def _columns(digits: Tensor, scales: Tensor, columns: slice, block: int, dtype: torch.dtype) -> Tensor:
    """Some columns (inputs, columns) of the transposed matrix of one form."""
    part, inputs = digits[columns], 2 * digits.shape[1]
    signed = (part ^ _SIGNS).view(torch.int8)
    pairs = len(part) % block != 0  # of neighbours, in what is no whole block
    laid = signed.view(inputs, -1, 1) if pairs else signed.view(-1, inputs, block // 2).transpose(0, 1)
    matrix = torch.empty(inputs, len(part), dtype=dtype, device=digits.device)
    halves = matrix.view(inputs, laid.shape[1], 2, laid.shape[2])
    halves[:, :, 0].copy_((laid << 4) >> 4)
    halves[:, :, 1].copy_(laid >> 4)
    steps, shifts = (one.contiguous() for one in scales[:, None, columns].to(dtype).unbind(-1))
    groups = matrix.view(len(scales), -1, len(part))
    if bool(shifts.any()):
        torch.addcmul(shifts, groups, steps, out=groups)
    else:
        groups.mul_(steps)
    return matrix


@lru_cache(maxsize=1)
def _block() -> int | None:
    """How many rows the kernel lays together: in each byte one of the first half, and the one as far in the second."""
    numbers, laid = _probe(max(_BLOCKS))
    for block in _BLOCKS:
        halves = numbers.view(-1, 2, block // 2, _PROBED).transpose(2, 3)  # (blocks, halves, inputs, rows)
        if torch.equal(laid.view(-1, _PROBED, block // 2), halves[:, 0] + _BASE * halves[:, 1]):
            return block
    return None


@lru_cache
def _lays_pairs(rows: int) -> bool:
    """Whether the kernel lays so many rows, fewer than a block, by twos."""
    numbers, laid = _probe(rows)
    pairs = numbers.view(-1, 2, _PROBED)
    return torch.equal(laid.view(_PROBED, -1), (pairs[:, 0] + _BASE * pairs[:, 1]).T)


def _probe(rows: int) -> Form:
    """Numbers from 0 to 15, (rows, inputs), and the kernel's bytes of them, both int32."""
    numbers = torch.randint(_BASE, (rows, _PROBED), dtype=torch.int32, generator=torch.Generator().manual_seed(0))
    return numbers, torch.ops.aten._convert_weight_to_int4pack_for_cpu(numbers, 1).flatten().int()


def _split(groups: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Whole numbers (…, group_size) as low + 16 · high + shift: digits from −8 to 7, and a shift (…) for each group.

    Shifts are as small as they can be, for they are rounded, and belong to the low digit where there is no high one:
    with digits around 0 no large sums cancel when each product is rounded to a bfloat16.
    """
    one, two = _shift(groups, 1), _shift(groups, _BASE + 1)
    is_one = (groups.amax(-1) - groups.amin(-1) < _BASE) & (one.abs() <= -_LEAST)
    rest = groups - torch.where(is_one, one, two)[..., None]
    high = torch.where(is_one[..., None], 0, (rest - _LEAST).div(_BASE, rounding_mode="floor"))
    return rest - _BASE * high, high, torch.where(is_one, one, 0), torch.where(is_one, 0, two)


def _shift(groups: Tensor, ones: int) -> Tensor:
    """The number nearest to 0 that brings whole groups to between −8 and 7 times the value of a digit `ones`."""
    return (groups.amax(-1) - _MOST * ones).clamp(min=0) + (groups.amin(-1) - _LEAST * ones).clamp(max=0)


def _form(digits: Tensor, steps: Tensor, shifts: Tensor) -> Form:
    """What the kernel reads for digits (outputs, groups, group_size), steps and shifts (outputs, groups)."""
    outputs, _, size = digits.shape
    missing = -outputs % _OUTPUTS
    numbers = functional.pad(digits.reshape(outputs, -1).int() - _LEAST, (0, 0, 0, missing))
    width = next(width for width in _WIDTHS if size % width == 0)
    scales = torch.stack([steps, shifts.to(steps)], dim=-1).repeat_interleave(size // width, dim=1).transpose(0, 1)
    filled = functional.pad(scales, (0, 0, 0, missing)).contiguous()
    return torch.ops.aten._convert_weight_to_int4pack_for_cpu(numbers.contiguous(), 1), filled
