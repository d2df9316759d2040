"""Symmetric matrices of the width of a layer: summed up once, factorised and inverted in their own memory."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

_COLUMNS = 512  # of a block: enough for full speed, and few enough that nearly half of the products are spared
_RIGHT = 256  # right sides that are solved for at once, for what lies between their two halves
_UNITS = 8
_ENTRIES = 2**20  # of a matrix that is turned round, at a time


def add_products(total: Tensor, left: Tensor, right: Tensor, times: float = 1.0) -> None:
    """Add `times` left^T right, symmetric, to the upper triangle of `total`; `mirror` makes up the lower one.

    Args:
        total: [p, p]; of the lower triangle some entries change too, to no purpose.
        left, right: [T, p], of its dtype.
    """
    for start in range(0, len(total), _COLUMNS):
        stop = min(start + _COLUMNS, len(total))
        total[:stop, start:stop].addmm_(left[:, :stop].T, right[:, start:stop], alpha=times)


def upper_parts(total: Tensor) -> list[Tensor]:
    """Views of a matrix that have its upper triangle, and little else."""
    return [total[: start + _COLUMNS, start : start + _COLUMNS] for start in range(0, len(total), _COLUMNS)]


def mirror(total: Tensor) -> None:
    """Copy the upper triangle to the lower one."""
    for start in range(0, len(total), _COLUMNS):
        stop = min(start + _COLUMNS, len(total))
        own = total[start:stop, start:stop]
        own.copy_(own.triu() + own.triu(1).T)
        total[start:stop, :start] = total[:start, start:stop].T


def turn_round(matrix: Tensor) -> None:
    """Have the rows and the columns of a contiguous matrix in the opposite order, in its own memory."""
    entries = matrix.view(-1)
    for start in range(0, len(entries) // 2, _ENTRIES):
        stop = min(start + _ENTRIES, len(entries) // 2)
        first, last = entries[start:stop], entries[len(entries) - stop : len(entries) - start]
        kept = first.flip(0)
        first.copy_(last.flip(0))
        last.copy_(kept)


def cholesky(matrix: Tensor) -> Tensor | None:
    """Its lower Cholesky factor, or None where it is not positive definite to working precision.

    A feature that those before it explain but for a `share` has the square of its pivot at that share of its diagonal
    entry, whatever its scale. Float64 asks for a share beyond all that rounding could have left, p times its unit.
    Float32 asks for a few units: an error of c units in the entries of a system costs its solution c² units² / share
    of the energy that it explains, hence no more than c² of such units, and c grows with no more than the root of p.

    Args:
        matrix: [p, p], symmetric; overwritten.
    """
    eps, size = torch.finfo(matrix.dtype).eps, len(matrix)
    tolerance = (size if matrix.dtype == torch.float64 else _UNITS) * eps
    diagonal = matrix.diagonal().clone()
    columns = matrix.mT  # the same, laid out as LAPACK wants it: no copy is made
    info = torch.empty((), dtype=torch.int32, device=matrix.device)
    factor, failed = torch.linalg.cholesky_ex(columns, out=(columns, info))
    # The negation is for NaN.
    return factor if not failed and bool((factor.diagonal().square() > tolerance * diagonal).all()) else None


def regular_cholesky(system: Callable[[], Tensor]) -> Tensor:
    """The lower Cholesky factor of a positive semidefinite matrix, regularised as far as its dtype needs it.

    Where it is not definite to working precision, each diagonal entry is raised by a share of its own, at first one
    beyond what random rounding errors add up to: features stay what they are but for that share of their energy.

    Args:
        system: makes the matrix, [p, p], as often as it is tried; it is overwritten.

    Raises:
        ValueError: NaN or infinite entries.
    """
    matrix = system()
    own = matrix.diagonal().clone()
    mean = float(own.mean())
    if not math.isfinite(mean):
        raise ValueError("a Gram matrix has NaN or infinite entries: give rows of finite and smaller entries")
    own[own <= 0] = mean if mean > 0 else 1.0
    share = 8 * len(matrix) ** 0.5 * torch.finfo(matrix.dtype).eps
    while (factor := cholesky(matrix)) is None:
        matrix = system()
        matrix.diagonal().add_(own, alpha=share)
        share *= 8
    return factor


def turned(directions: Tensor) -> Tensor:
    """Eigenvectors [p, n], a column each, turned so that each one's largest entry is above 0.

    Both signs are right, and which of them comes out hangs on the last bits of the matrix.
    """
    largest = directions.abs().argmax(dim=0, keepdim=True)
    return directions * directions.gather(0, largest).sign()


def solve(factor: Tensor, right: Tensor) -> Tensor:
    """(L L^T)^-1 right, [p, q]. Unlike `torch.cholesky_solve`, without a copy of the factor."""
    found = torch.empty_like(right)
    for part, out in zip(right.split(_RIGHT, dim=1), found.split(_RIGHT, dim=1), strict=True):
        half = torch.linalg.solve_triangular(factor, part, upper=False)
        out.copy_(torch.linalg.solve_triangular(factor.mT, half, upper=True))
    return found


def lower_columns(size: int) -> list[slice]:
    """Columns of a matrix in parts, for `inverse_columns`."""
    return [slice(start, min(start + _COLUMNS, size)) for start in range(0, size, _COLUMNS)]


def inverse_columns(factor: Tensor, columns: slice) -> Tensor:
    """Some columns of (L L^T)^-1 from their first diagonal entry down; all of them take what `inverse` takes."""
    own = factor[columns.start :, columns.start :]
    ones = torch.eye(len(own), columns.stop - columns.start, dtype=factor.dtype, device=factor.device)
    return solve(own, ones)


def put_columns(total: Tensor, found: list[Tensor]) -> Tensor:
    """The symmetric matrix whose lower columns are known, in the memory of `total`."""
    for columns, part in zip(lower_columns(len(total)), found, strict=True):
        total[columns.start :, columns] = part
        total[columns, columns.start :] = part.T
    return total


def inverse(factor: Tensor) -> Tensor:
    """(L L^T)^-1, [p, p], in the memory of the factor."""
    return torch.cholesky_inverse(factor, out=factor)
