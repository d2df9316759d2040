"""Least squares where each output may use some of the inputs alone."""

from __future__ import annotations

import math
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from hf_compress.numerics.factor import damped
from hf_compress.numerics.halves import multiplies_bfloat16
from hf_compress.numerics.preconditioner import Preconditioner, RowPreconditioner

_STEPS = 64
_CLOSE = 1e-3  # of the error that is left, what further steps may take off it
_SLOWEST = 0.9  # of a step's gain, the next one's: more would be no series that comes to an end
_TINY = torch.finfo(torch.float32).tiny
_ROWS = 16  # of those solved for at once, evenly spread, that are held against what the steps say
_CHUNK = 2**20  # weights solved for at once: so many stay in the cache,
_LEAST = 448  # but no fewer rows: then products with a wide system, which does not stay there, are as fast as can be


@torch.no_grad()
def solve_masked(weight: Tensor, gram: Tensor, kept: Tensor) -> Tensor:
    """What the weights kept have to become to make up for the others, row by row.

    min over V, 0 where not kept, of  tr (V − W) G (V − W)ᵀ + λ |V − W|²,  λ being 1% of the mean of G's diagonal, by
    conjugate gradients on many rows at once, until the error is within 1% of the least.

    Args:
        weight: W, (outputs, inputs).
        gram: G = Σ x xᵀ of the inputs, (inputs, inputs).
        kept: bool, (outputs, inputs).

    Returns:
        V, (outputs, inputs) float32.

    Raises:
        ValueError: shapes that do not fit, or a gram that is not finite.

    Source of the method: M. R. Hestenes and E. Stiefel, 1952; see `Preconditioner` for what steps go by.
    """
    inputs = weight.shape[1]
    if gram.shape != (inputs, inputs) or kept.shape != weight.shape:
        raise ValueError(
            f"a weight {tuple(weight.shape)} needs a gram ({inputs}, {inputs}) and kept of its shape; got "
            f"{tuple(gram.shape)} and {tuple(kept.shape)}"
        )
    system = damped(gram)
    half = system.bfloat16() if system.device.type == "cpu" and multiplies_bfloat16() else None
    if half is None:
        near = Preconditioner.of(system.diagonal(), lambda rows: rows @ system, torch.float32)
    else:
        near = Preconditioner.of(system.diagonal(), partial(_rounded_product, half=half), torch.bfloat16)
    found = torch.empty(weight.shape, dtype=torch.float32, device=weight.device)
    rows = max(_LEAST, _CHUNK // inputs)
    for start in range(0, len(weight), rows):
        part = slice(start, start + rows)
        mask = kept[part].float()
        found[part] = _solved(weight[part].detach().float(), system, half, near.of_rows(mask))
    return found


def _solved(target: Tensor, system: Tensor, half: Tensor | None, near: RowPreconditioner) -> Tensor:
    """Rows V of `solve_masked`, all float32.

    With the system in bfloat16 beside, steps are taken by that: what they solve is a system near the true one. Where
    the error of some rows is not what they say, the residual is taken anew in float32, and they go on from there.
    """
    solution = target * near.mask
    if half is not None:
        start, told = _descend(solution, target, system, near, half)
        some = slice(None, None, max(1, len(target) // _ROWS))
        if _error(target[some] - solution[some], system) <= (1 + _CLOSE) * float(told.error[some].sum()):
            return solution
        left = _descend(solution, target, system, near, half, told)[0]
        if left <= start:
            return solution
        solution = target * near.mask  # rounded, inputs that are nearly alike may make up for each other without end
    _descend(solution, target, system, near)
    return solution


class _Told(NamedTuple):
    """What the steps to a solution say of it.

    Attributes:
        error: of each row, float64.
        gain: by how much the last step made the error of all of them less.
    """

    error: Tensor
    gain: float


def _descend(
    solution: Tensor,
    target: Tensor,
    system: Tensor,
    near: RowPreconditioner,
    half: Tensor | None = None,
    told: _Told | None = None,
) -> tuple[float, _Told]:
    """Conjugate gradients from a solution, in its memory, until the steps to come would take off too little.

    Every step is told by how much it has made the error less, and the next ones make it less by ever smaller amounts,
    about a geometric series: so it is known what those to come will take off. That is believed when it is found twice,
    for where a few inputs stand out, a small gain comes before large ones.

    Args:
        near: what knows of the mask, and of the system enough for steps to be few.
        half: the system in bfloat16, to take the steps by; and to find the error at first, where nothing is told.
        told: by steps that led to the solution. If that is about the error, such steps can be trusted, and to find
            once more that they may end is enough.

    Returns:
        The error at first; and at the end, by the steps.
    """
    gap = target - solution
    image = gap @ system if half is None or told else _rounded_product(gap, half).float()
    errors = torch.linalg.vecdot(gap, image).double()
    start = float(errors.sum())
    residual, direction = image.mul_(near.mask), gap
    near.apply(residual, out=direction)
    size = torch.linalg.vecdot(residual, direction)
    image, trusted = torch.empty_like(residual), told is None or start <= (1 + _CLOSE) * float(told.error.sum())
    before = gain = told.gain if told and trusted else 0.0
    last = before > 0
    for _ in range(_STEPS):
        if half is not None and trusted:
            image.copy_(_rounded_product(direction, half))
        else:
            torch.mm(direction, system, out=image)
        image.mul_(near.mask)
        step = size / torch.linalg.vecdot(direction, image).clamp(min=_TINY)
        solution.addcmul_(direction, step[:, None])
        residual.addcmul_(image, step[:, None], value=-1)
        gains = (step * size).double()
        errors -= gains
        gain = float(gains.sum())
        error = float(errors.sum())
        if not math.isfinite(gain):
            break
        rate = min(gain / before, _SLOWEST) if before else _SLOWEST
        little = gain * rate <= _CLOSE * error * (1 - rate)
        if little and last:
            break
        before, last = gain, little
        near.apply(residual, out=image)
        new = torch.linalg.vecdot(residual, image)
        direction.mul_((new / size.clamp(min=_TINY))[:, None]).add_(image)
        size = new
    return start, _Told(errors, gain)


def _error(gap: Tensor, system: Tensor) -> float:
    """Of rows that lie so far from the target, summed up."""
    return float(torch.linalg.vecdot(gap, gap @ system).sum(dtype=torch.float64))


def _rounded_product(left: Tensor, half: Tensor) -> Tensor:
    """Of bfloat16, in factors and result: processors that have it give it at twice the speed of one summed up.

    The system being symmetric, it may as well be read row by row, as the weights of a layer are: faster by a tenth.
    """
    return functional.linear(left.bfloat16(), half)
