"""What makes conjugate gradients short, where each row of unknowns has some of the entries of one system alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

_MOST = 64  # directions
_BESIDE = 8  # more of them, that the iteration goes by
_ROUNDS = 2  # of it: directions need not be exact
_LARGE = 2.0  # times the mean of the other eigenvalues: what is less is not worth a direction


@dataclass(frozen=True)
class Preconditioner:
    """The diagonal of a system G, and the directions in which G scaled by it, D^-1/2 G D^-1/2, is largest.

    It stands for G in D^1/2 (c + U (L - c) U^T) D^1/2, c being the mean of the eigenvalues besides L. Of the entries M
    that a row keeps, that is inverted in closed form (Woodbury), in directions and not in entries. They are about the
    root of the inputs in number, so that U^T M U takes half of the time of a product with G.

    Attributes:
        inverse: 1 / D, (inputs).
        directions: D^-1/2 U, (inputs, directions).
        ratios: c / (L - c), (directions).
        pairs: the products U_i U_j of each pair of directions, i <= j, (inputs, pairs).
    """

    inverse: Tensor
    directions: Tensor
    ratios: Tensor
    pairs: Tensor

    @staticmethod
    def of(diagonal: Tensor, product: Callable[[Tensor], Tensor], dtype: torch.dtype) -> Preconditioner:
        """That of a system by its diagonal, (inputs) float32, and what makes rows X (any number, inputs) into X G.

        Args:
            dtype: that pairs are kept in, and multiplied with masks.
        """
        scale = diagonal.rsqrt()[:, None]
        values, vectors, rest = _largest(lambda x: scale * product((scale * x).T).to(x.dtype).T, len(diagonal), scale)
        # By the first of each pair, so that no more than the pairs themselves is there at once.
        pairs = [(vectors[:, :1] * vectors[:, :0]).to(dtype)]
        pairs += [(vectors[:, i : i + 1] * vectors[:, i:]).to(dtype) for i in range(len(values))]
        # Smaller ratios would be lost in the rounding of U^T M U, and what is made of rows no longer be positive.
        ratios = (rest / (values - rest)).clamp(min=4 * torch.finfo(dtype).eps)
        return Preconditioner(1 / diagonal, scale * vectors, ratios, torch.cat(pairs, dim=1))

    def of_rows(self, mask: Tensor) -> RowPreconditioner:
        """That of rows which keep the entries where a mask (rows, inputs) float32 is 1."""
        count = len(self.ratios)
        place = torch.empty(count, count, dtype=torch.int64, device=mask.device)
        first, second = torch.triu_indices(count, count, device=mask.device)
        place[first, second] = place[second, first] = torch.arange(len(first), device=mask.device)
        kept = (mask.to(self.pairs.dtype) @ self.pairs).float()[:, place]  # U^T M U
        kept.diagonal(dim1=1, dim2=2).add_(self.ratios)
        factor, failed = torch.linalg.cholesky_ex(kept)
        inner = torch.cholesky_inverse(factor).masked_fill_(failed[:, None, None] > 0, 0.0)
        return RowPreconditioner(self.inverse, self.directions, mask, inner)


@dataclass(frozen=True)
class RowPreconditioner:
    """The preconditioner of some rows, by what they keep; see `Preconditioner`.

    Attributes:
        mask: (rows, inputs) float32.
        inner: (c / (L - c) + U^T M U)^-1, (rows, directions, directions); 0 where that did not come out.
    """

    inverse: Tensor
    directions: Tensor
    mask: Tensor
    inner: Tensor

    def apply(self, rows: Tensor, out: Tensor) -> None:
        """Put what it makes of rows (rows, inputs), which are 0 where the mask is, into `out`; but for a factor c."""
        torch.mul(rows, self.inverse, out=out)
        if self.inner.shape[1]:
            along = torch.bmm(self.inner, (rows @ self.directions)[:, :, None])[:, :, 0]
            out.sub_((along @ self.directions.T).mul_(self.mask))


def _largest(product: Callable[[Tensor], Tensor], size: int, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Large eigenvalues of a symmetric matrix whose diagonal is 1, their vectors, and the mean of the others.

    By subspace iteration from random vectors, always the same (Rayleigh and Ritz).

    Args:
        product: what makes columns X (size, any number) into C X.
        like: a tensor of the dtype and on the device of what is worked with.
    """
    count = min(_MOST, int(size**0.5), size - _BESIDE)
    if count < 1:
        return like.new_empty(0), like.new_empty(size, 0), like.new_ones(())
    basis = torch.randn(size, count + _BESIDE, generator=torch.Generator().manual_seed(0)).to(like)
    for _ in range(_ROUNDS):
        basis = torch.linalg.qr(product(basis))[0]
    found = basis.T @ product(basis)
    values, turn = torch.linalg.eigh((found + found.T) / 2)
    values, vectors = values[_BESIDE:], (basis @ turn)[:, _BESIDE:]
    rest = (size - values.sum()) / (size - count)
    large = values > _LARGE * rest.clamp(min=0)
    return values[large], vectors[:, large], rest
