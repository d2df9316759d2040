"""Weights of few bits in the form that PyTorch's kernel for four bits on a CPU multiplies with.

The kernel computes x Wᵀ where W = step · (n − 8) + shift, n from 0 to 15, with a step and a shift for each group of a
row. Weights of up to eight bits are the sum of two such: of their digits in base 16.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

_WIDTHS = (256, 128, 64, 32)  # of groups that the kernel knows
_OUTPUTS = 16  # they have to be a multiple of this
_BASE, _LEAST, _MOST = 16, -8, 7  # of digits


def fits_kernel(multiples: Tensor, group_size: int) -> bool:
    """Whether the kernel can do with such groups of whole numbers: their size, and that two digits are enough."""
    groups = multiples.view(-1, group_size)
    return group_size % _WIDTHS[-1] == 0 and int((groups.amax(1) - groups.amin(1)).max()) < _BASE**2


def digits_of(multiples: Tensor, steps: Tensor) -> list[tuple[Tensor, Tensor]]:
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


def _form(digits: Tensor, steps: Tensor, shifts: Tensor) -> tuple[Tensor, Tensor]:
    """What the kernel reads for digits (outputs, groups, group_size), steps and shifts (outputs, groups)."""
    outputs, _, size = digits.shape
    missing = -outputs % _OUTPUTS
    numbers = functional.pad(digits.reshape(outputs, -1).int() - _LEAST, (0, 0, 0, missing))
    width = next(width for width in _WIDTHS if size % width == 0)
    scales = torch.stack([steps, shifts.to(steps)], dim=-1).repeat_interleave(size // width, dim=1).transpose(0, 1)
    filled = functional.pad(scales, (0, 0, 0, missing)).contiguous()
    return torch.ops.aten._convert_weight_to_int4pack_for_cpu(numbers.contiguous(), 1), filled
