"""Symmetric matrices of the width of a layer, summed up once, in their own memory."""

from collections.abc import Sequence

from torch import Tensor

_ROWS = 512  # of a block: enough for full speed, and few enough that nearly half of the products are spared
_ENTRIES = 2**20  # of a matrix that is turned round, at a time


def add_products(
    total: Tensor, left: Tensor, right: Tensor, times: float = 1.0, rows: Sequence[slice] | None = None
) -> None:
    """Add `times` left^T right, symmetric, to the upper triangle of `total`; `mirror` makes up the lower one.

    Args:
        total: [p, p]; of the lower triangle some entries change too, to no purpose.
        left, right: [T, p], of its dtype.
        rows: of the total, that it is added to; all when None.
    """
    for own in in_blocks(len(total), _ROWS) if rows is None else rows:
        total[own, own.start :].addmm_(left[:, own].T, right[:, own.start :], alpha=times)


def in_blocks(size: int, count: int) -> list[slice]:
    """The rows of a matrix, or its columns, so many at a time."""
    return [slice(start, min(start + count, size)) for start in range(0, size, count)]


def upper_parts(total: Tensor) -> list[Tensor]:
    """Views of a matrix that have its upper triangle, and little else."""
    return [total[own, own.start :] for own in in_blocks(len(total), _ROWS)]


def mirror(total: Tensor) -> None:
    """Copy the upper triangle to the lower one."""
    for own in in_blocks(len(total), _ROWS):
        square = total[own, own]
        square.copy_(square.triu() + square.triu(1).T)
        total[own, : own.start] = total[: own.start, own].T


def turn_round(matrix: Tensor) -> None:
    """Have the rows and the columns of a contiguous matrix in the opposite order, in its own memory."""
    entries = matrix.view(-1)
    for start in range(0, len(entries) // 2, _ENTRIES):
        stop = min(start + _ENTRIES, len(entries) // 2)
        first, last = entries[start:stop], entries[len(entries) - stop : len(entries) - start]
        kept = first.flip(0)
        first.copy_(last.flip(0))
        last.copy_(kept)


def turned(directions: Tensor) -> Tensor:
    """Eigenvectors [p, n], a column each, turned so that each one's largest entry is above 0.

    Both signs are right, and which of them comes out hangs on the last bits of the matrix.
    """
    largest = directions.abs().argmax(dim=0, keepdim=True)
    return directions * directions.gather(0, largest).sign()
