"""Cholesky factors of symmetric matrices of the width of a layer, and their inverses, in the matrices' own memory.

Several processes can share the work: each sees to some of the rows, and is told the others' as they come to be.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .symmetric import add_products, in_blocks, mirror, upper_parts
from .team import ALONE, Team

NARROW = 1024  # rows: what a factorisation costs up to there is nothing to speak of
_ROWS = 256  # that are seen to at once: enough for full speed, and few enough to share well
_UNITS = 8


def own_rows(size: int, together: Team) -> list[slice]:
    """The rows of a matrix of this size that one of several processes sees to, a few at a time: dealt out in turns."""
    return in_blocks(size, _ROWS)[together.rank :: together.world]


def factorise(matrix: Tensor, together: Team = ALONE) -> bool:
    """Put U, upper triangular with U^T U = A, in the place of a matrix A; whether that could be done to the end.

    Several processes do it by blocks of rows, as LAPACK does: U_kk^T U_kk is the k-th block on the diagonal of what is
    left, and the rest of its rows of U is U_kk^-T A_k. All are told those, and take U_k^T U_k from their own behind.

    Args:
        matrix: [p, p]; its upper triangle is read, of several processes in each the rows that are its own.
    """
    if together.world == 1:
        laid_out = matrix.mT  # as LAPACK wants it: no copy is made
        info = torch.empty((), dtype=torch.int32, device=matrix.device)
        return not torch.linalg.cholesky_ex(laid_out, out=(laid_out, info)).info
    own = own_rows(len(matrix), together)
    for number, rows in enumerate(in_blocks(len(matrix), _ROWS)):
        left = matrix[rows, rows.start :]
        found = _rows_of_factor(left) if rows in own else left.new_empty(left.shape)
        together.give(found, number % together.world)
        if not bool(torch.isfinite(found.diagonal()).all()):
            return False
        left.copy_(found)
        for behind in (one for one in own if one.start >= rows.stop):
            right = found[:, behind.start - rows.start :]
            matrix[behind, behind.start :].addmm_(right[:, : behind.stop - behind.start].T, right, alpha=-1)
    matrix.triu_()
    return True


def _rows_of_factor(left: Tensor) -> Tensor:
    """U_kk and what is to the right of it, by what is left of these rows of A; NaN where U_kk has no factor."""
    size = len(left)
    pivot, failed = torch.linalg.cholesky_ex(left[:, :size].mT)
    if failed:
        return torch.full_like(left, torch.nan)
    right = torch.linalg.solve_triangular(pivot.mT, left[:, size:].mT, upper=True, left=False)
    return torch.cat([pivot.mT, right.mT], dim=1)


def cholesky(matrix: Tensor, together: Team = ALONE) -> Tensor | None:
    """Its lower Cholesky factor, or None where it is not positive definite to working precision.

    A feature that those before it explain but for a `share` has the square of its pivot at that share of its diagonal
    entry, whatever its scale. Float64 asks for a share beyond all that rounding could have left, p times its unit.
    Float32 asks for a few units: an error of c units in the entries of a system costs its solution c² units² / share
    of the energy that it explains, hence no more than c² of such units, and c grows with no more than the root of p.

    Args:
        matrix: [p, p], symmetric; overwritten. Of several processes each needs the rows that are its own, of the
            upper triangle, and the whole diagonal.
    """
    eps, size = torch.finfo(matrix.dtype).eps, len(matrix)
    tolerance = (size if matrix.dtype == torch.float64 else _UNITS) * eps
    diagonal = matrix.diagonal().clone()
    regular = factorise(matrix, together) and bool((matrix.diagonal().square() > tolerance * diagonal).all())
    return matrix.mT if regular else None


def regular_cholesky(system: Callable[[], Tensor], together: Team = ALONE) -> Tensor:
    """The lower Cholesky factor of a positive semidefinite matrix, regularised as far as its dtype needs it.

    Where it is not definite to working precision, each diagonal entry is raised by a share of its own, at first one
    beyond what random rounding errors add up to: features stay what they are but for that share of their energy.

    Args:
        system: makes the matrix, [p, p], as often as it is tried; it is overwritten. Of several processes each makes
            as much of it as `cholesky` needs.

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
    while (factor := cholesky(matrix, together)) is None:
        matrix = system()
        matrix.diagonal().add_(own, alpha=share)
        share *= 8
    return factor


def solve(factor: Tensor, right: Tensor) -> Tensor:
    """(L L^T)^-1 right, [p, q]. Unlike `torch.cholesky_solve`, without a copy of the factor."""
    found = right.clone(memory_format=torch.contiguous_format)
    # Laid out as LAPACK wants it: both steps are taken in its memory, but where PyTorch takes no heed of the layout.
    columns = found.mT
    out = {} if columns.device.type == "mps" else {"out": columns}
    half = torch.linalg.solve_triangular(factor.mT, columns, upper=True, left=False, **out)
    return torch.linalg.solve_triangular(factor, half, upper=False, left=False, **out).mT


def inverse(factor: Tensor, together: Team = ALONE) -> Tensor:
    """(L L^T)^-1, [p, p], in the memory of the factor.

    Args:
        factor: L, [p, p], of several processes in each the whole of it.
    """
    if together.world == 1:
        return torch.cholesky_inverse(factor, out=factor)
    upper, parts = factor.mT, in_blocks(len(factor), _ROWS)
    pivots = [_inverse_of_square(upper[part, part]) for part in parts]
    for part in parts:
        upper[part, : part.stop] = 0
    # With V = U^-1 it is V V^T, the sum of V_j V_j^T over its blocks of columns: in the triangle that U leaves free.
    for number in own_columns(len(parts), together):
        before = parts[: number + 1]
        found = _inverse_columns(upper, before, pivots).mT
        add_products(factor[: before[-1].stop, : before[-1].stop], found, found, rows=before)
    together.sum_up(upper_parts(factor))
    mirror(factor)  # over what is left of U
    return factor


def own_columns(blocks: int, together: Team) -> list[int]:
    """Which blocks of columns of V one of several processes sees to; each takes the square of its place."""
    work, own = [0] * together.world, list[int]()
    for number in reversed(range(blocks)):
        least = min(range(together.world), key=work.__getitem__)
        work[least] += (number + 1) ** 2
        own += [number] if least == together.rank else []
    return own


def _inverse_of_square(upper: Tensor) -> Tensor:
    return torch.linalg.solve_triangular(upper, torch.eye(len(upper)).to(upper), upper=True)


def _inverse_columns(upper: Tensor, parts: list[slice], pivots: list[Tensor]) -> Tensor:
    """The last of some first blocks of columns of U^-1, down to its diagonal, by the inverses of U's own squares."""
    last = parts[-1]
    found = upper.new_zeros(last.stop, last.stop - last.start)
    found[last] = pivots[len(parts) - 1]
    for number in reversed(range(len(parts) - 1)):
        part, below = parts[number], parts[number + 1]
        found[: below.start].addmm_(upper[: below.start, below], found[below])
        found[part] = pivots[number].neg() @ found[part]
    return found
