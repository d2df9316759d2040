"""Mean and covariance of rows as they stream by, and their principal directions."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from .halves import bfloat16_factors
from .symmetric import add_products, mirror, upper_parts

SumUp = Callable[[Iterable[Tensor]], None]
"""Puts the sums over several processes of some tensors, of which all have as many, in their places."""

_ROWS = 2048  # at a time: what they are converted to is small next to the sums of a wide layer
_SUMMED = 128  # of those, in float64


class Moments:
    """Weighted sums over rows x [T, p]; memory does not grow with the rows.

    They are kept about an origin. In float32 that matters where the rows are far from 0 as against how they spread: a
    covariance is then no difference of large sums. Sums of single features are float64 always.

    Args:
        inputs: p.
        device: where the sums live; rows are brought there. The CPU where the device has no float64.
        dtype: float64, or float32: products of float32 then, in half the memory and less than half the time. Of plain
            bfloat16 rows about 0 the products are of bfloat16 where that is faster: it is the same.
        origin: a point near the mean of the rows, [p]; 0 when None.

    Attributes, besides these:
        count: rows seen, or the sum of their weights.
    """

    def __init__(
        self,
        inputs: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float64,
        origin: Tensor | None = None,
    ) -> None:
        device = torch.device(device)
        self.inputs, self.device = inputs, torch.device("cpu") if device.type == "mps" else device
        self.dtype = dtype
        self.count: float = 0
        self.origin = self._vector(inputs, origin)
        self._x = self._vector(inputs)  # sum of x - origin
        self._gram = torch.zeros(inputs, inputs, dtype=dtype, device=self.device)  # about the origin; upper triangle
        self._mirrored = True

    def add(self, rows: Tensor, weights: Tensor | None = None) -> None:
        """Add rows [T, p] of any real dtype; `weights` [T] >= 0 count a row as so many."""
        for part in pieces(len(rows)):
            self._add(rows[part], None if weights is None else weights[part])

    def _add(self, rows: Tensor, weights: Tensor | None) -> Tensor:
        """Add a few rows; gives them about the origin, weighted."""
        halves = rows.dtype == torch.bfloat16 and self.dtype == torch.float32 and weights is None
        rows = about(rows, self.origin, self.dtype)
        weighted = rows if weights is None else rows * weights.to(rows)[:, None]
        self.count += len(rows) if weights is None else float(weights.double().sum())
        self._x += column_sums(weighted)
        with bfloat16_factors(halves and not bool(self.origin.any())):
            add_products(self._gram, weighted, rows)
        self._mirrored = False
        return weighted

    def reduce(self, sum_up: SumUp) -> None:
        """Make these the sums over the rows of several processes, which have them about one origin."""
        numbers = torch.tensor(self._numbers(), dtype=torch.float64)
        sum_up([*upper_parts(self._gram), *self._sums(), numbers])
        self._mirrored = False
        self._set_numbers(numbers.tolist())

    def _sums(self) -> list[Tensor]:
        """Those that are tensors, without the Gram matrix."""
        return [self._x]

    def _numbers(self) -> list[float]:
        """Those that are numbers."""
        return [self.count]

    def _set_numbers(self, numbers: list[float]) -> None:
        (self.count,) = numbers

    @property
    def x_sum(self) -> Tensor:
        """Sum of x, [p] float64."""
        return self._x + self.count * self.origin

    @property
    def mean(self) -> Tensor:
        """[p] float64"""
        return self.origin + self._x / self.count

    @property
    def gram(self) -> Tensor:
        """Sum of x x^T, [p, p]: the sums' own memory where their origin is 0."""
        return self.gram_about(torch.zeros_like(self.origin)) if self.origin.any() else self.own_gram()

    @property
    def centred_gram(self) -> Tensor:
        """Sum of (x - mean)(x - mean)^T, [p, p]."""
        return self.gram_about(self.mean)

    @property
    def covariance(self) -> Tensor:
        """Mean of (x - mean)(x - mean)^T, [p, p]."""
        return self.centred_gram.div_(self.count)

    @property
    def variances(self) -> Tensor:
        """The diagonal of the covariance, [p] float64."""
        return self.squares_about(self.mean) / self.count

    def gram_about(self, point: Tensor, onto: Tensor | None = None) -> Tensor:
        """Sum of (x - point)(x - point)^T, [p, p]: added to `onto`, or as a new tensor."""
        gram = self.own_gram().clone() if onto is None else onto.add_(self.own_gram().to(onto))
        return self.shift(gram, point)

    def squares_about(self, point: Tensor) -> Tensor:
        """The diagonal of `gram_about`, [p] float64."""
        step = self.origin - point.to(self.origin)
        return self._gram.diagonal().double() + step * (2 * self._x + self.count * step)

    def principal(self) -> tuple[Tensor, Tensor]:
        """Orthonormal directions [p, p], a column each, and their variances [p], the largest first."""
        variances, directions = torch.linalg.eigh(self.covariance)
        return directions.flip(1), variances.flip(0).clamp(min=0)

    def shift(self, total: Tensor, point: Tensor, times: Tensor | None = None, sign: int = 1) -> Tensor:
        """Add to `total`, in its memory, what the Gram matrix about another point is more than that about the origin.

        With s the sum of x - origin and d = origin - point that is  s d^T + d (s + n d)^T.

        Args:
            times: [p, q] that it is multiplied by from the right first.
            sign: 1, or -1 to take it away.
        """
        step = self.origin - point.to(self.origin)
        if not bool(step.any()):
            return total
        left = torch.stack([self._x, step], dim=1).to(total)
        right = torch.stack([step, self._x + self.count * step]).to(total)
        return total.addmm_(left, right if times is None else right @ times, alpha=sign)

    def own_gram(self) -> Tensor:
        """Sum of (x - origin)(x - origin)^T, [p, p]: the sums' own memory."""
        if not self._mirrored:
            mirror(self._gram)
            self._mirrored = True
        return self._gram

    def _vector(self, size: int, values: Tensor | None = None) -> Tensor:
        zeros = torch.zeros(size, dtype=torch.float64, device=self.device)
        return zeros if values is None else zeros.copy_(values.to(self.dtype))  # what rows of that dtype can be about


def pieces(count: int) -> list[slice]:
    """So many rows, a few at a time."""
    return [slice(start, start + _ROWS) for start in range(0, count, _ROWS)]


def column_sums(rows: Tensor) -> Tensor:
    """Of rows [T, n], [n] float64. torch makes a copy in float64 of what it sums up so."""
    parts = (part.sum(dim=0, dtype=torch.float64) for part in rows.split(_SUMMED))
    return sum(parts, rows.new_zeros(rows.shape[1], dtype=torch.float64))


def about(rows: Tensor, origin: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows [T, n] less an origin [n], on its device."""
    rows = rows.detach()
    rows = (rows.cpu() if rows.device.type == "mps" else rows).to(origin.device, dtype)
    return rows - origin.to(dtype) if bool(origin.any()) else rows
