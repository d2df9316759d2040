"""Ridge regression on few rows of many features, by the rows' Gram matrix where that is the smaller one.

For T rows and p features, B = Xᵀ (X Xᵀ + λ)⁻¹ Y is what (Xᵀ X + λ)⁻¹ Xᵀ Y is, and takes T² p products in the place of
T p².

Source: C. Saunders, A. Gammerman and V. Vovk, "Ridge regression learning algorithm in dual variables", 1998.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from hf_compress.numerics.cholesky import factorise, own_rows, solve
from hf_compress.numerics.halves import bfloat16_factors
from hf_compress.numerics.symmetric import add_products, mirror
from hf_compress.numerics.team import ALONE, Team

_AT_ONCE = 1024  # rows or features, that are brought to float32
_ROUNDING = 0.01  # of the penalty, what rounding in float32 may be as much as


@torch.no_grad()
def solve_rows(x: Tensor, y: Tensor, penalty: float, parts: Sequence[int], together: Team = ALONE) -> Tensor:
    """B that minimises ‖X B − Y‖² + penalty · T · ‖S B‖², where S are the root mean squares of parts of the features.

    The smaller of the two systems is solved.

    Args:
        x: [T, p], any real dtype.
        y: [T, q].
        penalty: > 0, relative to the mean square of the features once they are divided by S.
        parts: widths that make up p; the features of a part are divided by one number, so that a penalty is as much for
            all parts.
        together: how processes do it together, which all have the same x and y.

    Returns:
        B [p, q] float32.

    Raises:
        ValueError: NaN or infinite entries, or those of x so large that their squares overflow.
    """
    if not bool(torch.isfinite(y).all()):
        raise ValueError("y has NaN or infinite entries; expected finite ones: load the model in float32 or bfloat16")
    outputs = together.part(y.shape[1])
    found = _solution(x, y[:, outputs].float(), penalty, parts, together)
    if together.world == 1:
        return found
    whole = found.new_zeros(x.shape[1], y.shape[1])
    whole[:, outputs] = found
    together.sum_up([whole])
    return whole


def _solution(x: Tensor, y: Tensor, penalty: float, parts: Sequence[int], together: Team) -> Tensor:
    """B for a process's own part of y."""
    rows, features = x.shape
    scales = scales_of(x, parts)
    squares = torch.cat(
        [x.new_full((width,), s**2, dtype=torch.float32) for width, s in zip(parts, scales, strict=True)]
    )
    if rows < features:
        dual = solve_dual(inner_products(x, parts, scales, together), y, penalty, together)
        return torch.cat([part.float().T @ dual for part in x.split(_AT_ONCE, 1)]).div_(squares[:, None])
    system = x.new_zeros(features, features, dtype=torch.float32)
    _add_gram(system, x, 1.0, together)
    roots = squares.sqrt()
    system.div_(roots).div_(roots[:, None]).diagonal().add_(penalty * rows)
    right = torch.cat([part.float().T @ y for part in x.split(_AT_ONCE, 1)]).div_(roots[:, None])
    return solve(_factor(system, together), right).div_(roots[:, None])


def scales_of(x: Tensor, parts: Sequence[int]) -> list[float]:
    """S: the root mean square of each part of x [T, p]. ValueError where that is not finite."""

    def mean_square(part: Tensor) -> float:
        return sum(float(rows.float().square().sum()) for rows in part.split(_AT_ONCE)) / max(1, part.numel())

    squares = [mean_square(part) for part in x.split([*parts], 1)]
    if not all(map(math.isfinite, squares)):
        raise ValueError(
            f"the mean squares of parts of x are {squares}; expected finite ones: load the model in float32 or bfloat16"
        )
    return [max(square**0.5, 1e-6) for square in squares]


def inner_products(x: Tensor, parts: Sequence[int], scales: Sequence[float], together: Team = ALONE) -> Tensor:
    """X Xᵀ, [T, T] float32, of rows x [T, p] whose parts are divided by their scales.

    Of several processes each has the rows of the upper triangle that are its own.
    """
    total = x.new_zeros(len(x), len(x), dtype=torch.float32)
    for part, scale in zip(x.split([*parts], 1), scales, strict=True):
        _add_gram(total, part.T, scale**-2, together)
    if together.world == 1:
        mirror(total)
    return total


def products_between(left: Tensor, right: Tensor, parts: Sequence[int], scales: Sequence[float]) -> Tensor:
    """The same between rows left [n, p] and right [T, p], [n, T] float32."""
    total = left.new_zeros(len(left), len(right), dtype=torch.float32)
    split = (rows.split([*parts], 1) for rows in (left, right))
    for one, other, scale in zip(*split, scales, strict=True):
        with bfloat16_factors(one.dtype == other.dtype == torch.bfloat16):
            total.addmm_(one.float(), other.float().T, alpha=scale**-2)
    return total


def solve_dual(inner: Tensor, y: Tensor, penalty: float, together: Team = ALONE) -> Tensor:
    """(X Xᵀ + penalty · T)⁻¹ Y, [T, q] float32, by X Xᵀ [T, T] as `inner_products` gives it.

    In float32 where its rounding is little next to the penalty, however unlike the rows' sizes are; in float64 else.
    """
    ridge = penalty * len(inner)
    trace = inner.new_zeros(())
    for rows in own_rows(len(inner), together):
        trace += inner.diagonal()[rows].sum()
    together.sum_up([trace])
    rounding = torch.finfo(torch.float32).eps * float(trace)
    system = inner.to(torch.float32 if rounding <= _ROUNDING * ridge else torch.float64, copy=True)
    system.diagonal().add_(ridge)
    return solve(_factor(system, together), y.to(system)).float()


def _factor(system: Tensor, together: Team) -> Tensor:
    """The lower Cholesky factor of a definite matrix by its upper triangle, in its memory."""
    if not factorise(system, together):
        raise ValueError("a Gram matrix is not positive definite with its penalty: give a larger one")
    return system.mT


def _add_gram(total: Tensor, x: Tensor, times: float, together: Team) -> None:
    """Add the upper triangle of Xᵀ X, or a process's own rows of it, to `total` [p, p] float32; of x [T, p]."""
    own = None if together.world == 1 else own_rows(len(total), together)
    with bfloat16_factors(x.dtype == torch.bfloat16):
        for part in x.split(_AT_ONCE):
            rows = part.float()
            add_products(total, rows, rows, times, own)
