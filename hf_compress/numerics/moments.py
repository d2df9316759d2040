"""Mean and covariance of rows as they stream by, and their principal directions."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(eq=False)
class Moments:
    """Weighted sums over rows x [T, p], in float64; memory does not grow with the rows.

    Attributes:
        count: sum of the weights, [].
        total: sum of x, [p].
        gram: sum of x x^T, [p, p].
    """

    width: int
    device: torch.device | str = "cpu"
    count: Tensor = field(init=False, repr=False)
    total: Tensor = field(init=False, repr=False)
    gram: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        made = {"dtype": torch.float64, "device": self.device}
        self.count = torch.zeros((), **made)  # type: ignore[call-overload]
        self.total = torch.zeros(self.width, **made)  # type: ignore[call-overload]
        self.gram = torch.zeros(self.width, self.width, **made)  # type: ignore[call-overload]

    def update(self, rows: Tensor, weights: Tensor | None = None) -> None:
        """Add rows [T, p] of any real dtype; `weights` [T] >= 0 count a row as so many."""
        rows = rows.to(self.gram)
        weighted = rows if weights is None else rows * weights.to(rows)[:, None]
        self.count += len(rows) if weights is None else weights.to(rows).sum()
        self.total += weighted.sum(0)
        self.gram += weighted.T @ rows

    @property
    def mean(self) -> Tensor:
        """[p]"""
        return self.total / self.count

    @property
    def covariance(self) -> Tensor:
        """Mean of (x - mean)(x - mean)^T, [p, p]."""
        return self.gram / self.count - torch.outer(self.mean, self.mean)

    def principal(self) -> tuple[Tensor, Tensor]:
        """Orthonormal directions [p, p], a column each, and their variances [p], the largest first."""
        variances, directions = torch.linalg.eigh(self.covariance)
        return directions.flip(1), variances.flip(0).clamp(min=0)
