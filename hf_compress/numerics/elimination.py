"""Which features of a regression can be done without: backward elimination, from sums alone.

Leaving feature j out of a least squares fit with the solution B and the covariance G raises the squared error by
|B_j|^2 / (G^-1)_jj, and the fit that is best without it follows in closed form. Again and again, the feature that costs
least is left out.

What becomes of H = G^-1 when features R go is H - H_R^T (H_RR)^-1 H_R = H - U^T U. Only H as it was and the rows of U,
one for each feature that went, are kept: costs hang on the diagonal of the difference, what goes next on a few rows.

Source: B. Hassibi and D. G. Stork, "Second order derivatives for network pruning: Optimal Brain Surgeon", 1992,
equation (5), for a whole row of weights in the place of one.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from .cholesky import inverse, own_rows, regular_cholesky
from .team import ALONE, Team

_PENALTY = 1e-3  # relative to the mean diagonal: keeps the inverse of a covariance of few rows in bounds
_ROUNDS = 16  # at least: where more features go, several go at once,
_AT_ONCE = 64  # but no more than this,
_CANDIDATES = 4  # chosen one by one from so many times as many


class Sums(Protocol):
    """Sums of a regression of y [T, q] on x [T, p], such as `LeastSquares`."""

    @property
    def inputs(self) -> int:
        """p"""

    def normal_gram(self, affine: bool, rows: Sequence[slice] | None = None) -> Tensor:
        """X^T X [p, p], about the mean if `affine`, as a new tensor. ValueError if no rows were seen.

        Where `rows` are given, no more than these of its upper triangle have to be right.
        """

    def normal_cross(self, affine: bool) -> Tensor:
        """X^T Y [p, q], about the means if `affine`. ValueError if no rows were seen."""


def eliminate(sums: Sums, count: int, affine: bool = True, size: int = 1, together: Team = ALONE) -> Tensor:
    """The features of x that are left when all but `count` have been left out of the regression of y on x.

    With a `size`, features go by the block: the first `size` of them, the next, and so on, and it is blocks that are
    counted; leaving out block b raises the squared error by tr B_b^T ((G^-1)_bb)^-1 B_b. Features that never vary are
    the first to go (in an affine fit; else those that are always 0).

    Args:
        sums: of x [T, p], y [T, q]; their dtype is what is worked in.
        count: features (or blocks) to keep, 1 to p (or p / size).
        affine: whether the regression has a bias.
        size: features of a block, a divisor of p.
        together: how processes do it together, each of which has the sums for some of y, and all of x.

    Returns:
        [count] int64, in rising order: features, or blocks where those go by the block.

    Raises:
        ValueError: a count or a size that does not fit; no rows were seen.
    """
    if size < 1 or sums.inputs % size:
        raise ValueError(f"size is {size}; expected a divisor of the number of features, {sums.inputs}")
    blocks = sums.inputs // size
    if not 1 <= count <= blocks:
        raise ValueError(
            f"count is {count}; expected 1 to the number of {'features' if size == 1 else 'blocks'}, {blocks}"
        )
    state = _Elimination(sums, affine, size, blocks - count, together)
    at_once = min(_AT_ONCE, -(-(blocks - count) // _ROUNDS))
    while (excess := len(state.left) - count) > 0:
        state.leave_out(state.cheapest(min(at_once, excess)))
    return state.left.cpu()


class _Elimination:
    """The fit as it is without the blocks that have gone so far.

    Attributes:
        left: blocks that have not, [blocks left].
    """

    def __init__(self, sums: Sums, affine: bool, size: int, to_go: int, together: Team) -> None:
        def system() -> Tensor:
            gram = _shared_gram(sums, affine, together)
            mean = float(gram.diagonal().mean())
            gram.diagonal().add_(_PENALTY * mean if mean > 0 else 1.0)
            return gram

        self.size, self.together = size, together
        self.inverse = inverse(regular_cholesky(system, together), together).mT  # of the whole covariance, row by row
        cross = sums.normal_cross(affine)
        self.solution = self.inverse @ cross
        self.rows = cross.new_empty(to_go * size, sums.inputs)  # U
        self.gone = 0  # rows of it
        self.left = torch.arange(sums.inputs // size, device=cross.device)
        own = self.left
        self.diagonal = self.inverse.view(len(own), size, len(own), size)[own, :, own].clone()  # [blocks, size, size]

    def cheapest(self, count: int) -> Tensor:
        """Blocks to leave out: one after another, the costs updated each time, from those that are cheapest now.

        What becomes of the costs of some blocks without others of them hangs on the entries of these blocks alone: of
        the inverse, and of the products of the solution's rows.
        """
        costs = _costs(self.diagonal[self.left], self._own_products())
        candidates = self.left[costs.topk(min(_CANDIDATES * count, len(self.left)), largest=False).indices]
        if count == 1:
            return self._same(candidates[:1])
        features = entries(candidates, self.size)
        past, rows = self.rows[: self.gone, features], self.solution[features]
        inverse = (self.inverse[features[:, None], features] - past.T @ past).double()
        products = (rows @ rows.T).double()
        self.together.sum_up([products])
        return self._same(candidates[_one_by_one(inverse, products, self.size, count)])

    def _same(self, chosen: Tensor) -> Tensor:
        """What the first of several processes has chosen, in all: by rounding alone another might choose otherwise."""
        self.together.give(chosen, 0)
        return chosen

    def leave_out(self, blocks: Tensor) -> None:
        """Make the best of it without some blocks."""
        out = entries(blocks, self.size)
        past = self.rows[: self.gone]
        change = self.inverse[out].addmm_(past[:, out].T, past, alpha=-1)
        factor = regular_cholesky(change[:, out].clone)
        new = self.rows[self.gone : self.gone + len(out)]
        new.copy_(torch.linalg.solve_triangular(factor, change, upper=False))
        self.solution.addmm_(new.T, torch.linalg.solve_triangular(factor, self.solution[out], upper=False), alpha=-1)
        parts = new.view(len(out), -1, self.size)
        self.diagonal -= torch.einsum("obi,obj->bij", parts, parts)
        self.gone += len(out)
        stay = torch.ones(len(self.diagonal), dtype=torch.bool, device=blocks.device)
        stay[blocks] = False
        self.left = self.left[stay[self.left]]

    def _own_products(self) -> Tensor:
        """B_b B_b^T of each block left, [blocks left, size, size]."""
        if self.size == 1:
            products = self.solution.square().sum(dim=1)[self.left, None, None]
        else:
            parts = self.solution.view(len(self.diagonal), self.size, -1)[self.left]
            products = parts @ parts.mT
        self.together.sum_up([products])
        return products


def _shared_gram(sums: Sums, affine: bool, together: Team) -> Tensor:
    """The Gram matrix of x; of several processes each has its own rows of the upper triangle, and all the diagonal."""
    own = own_rows(sums.inputs, together)
    gram = sums.normal_gram(affine, own)
    diagonal = torch.zeros_like(gram.diagonal())
    for rows in own:
        diagonal[rows] = gram.diagonal()[rows]
    together.sum_up([diagonal])
    gram.diagonal().copy_(diagonal)
    return gram


def _one_by_one(inverse: Tensor, products: Tensor, size: int, count: int) -> Tensor:
    """Of a few blocks, those to leave out one after another, [count]: by their part of G^-1 and of B B^T.

    Both are overwritten.
    """
    own = torch.arange(len(inverse) // size, device=inverse.device)
    one = torch.eye(size, dtype=inverse.dtype, device=inverse.device)
    gone = torch.zeros_like(own, dtype=torch.bool)
    order = []
    for _ in range(count):
        blocks = (part.view(len(own), size, len(own), size)[own, :, own] for part in (inverse, products))
        place = _costs(*blocks).masked_fill(gone, torch.inf).argmin()
        order.append(place)
        gone[place] = True
        out = entries(place[None], size)
        row, shared = inverse[out], products[out]
        taken = row / row[:, out] if size == 1 else torch.linalg.solve(row[:, out], row)
        inverse.addmm_(row.T, taken, alpha=-1)
        inverse[out[:, None], out] = one  # of what is gone, to be passed by
        shared.addmm_(shared[:, out], taken, alpha=-0.5)
        products.addmm_(taken.T, shared, alpha=-1).addmm_(shared.T, taken, alpha=-1)
    return torch.stack(order)


def entries(blocks: Tensor, size: int) -> Tensor:
    """The features of some blocks of `size` features each."""
    return (blocks[:, None] * size + torch.arange(size, device=blocks.device)).flatten()


def _costs(inverse: Tensor, products: Tensor) -> Tensor:
    """By how much the error rises without each block b, tr ((G^-1)_bb)^-1 B_b B_b^T; both are [blocks, size, size]."""
    if inverse.shape[-1] == 1:
        return (products / inverse)[:, 0, 0]
    return torch.linalg.solve(inverse, products).diagonal(dim1=1, dim2=2).sum(dim=1)
