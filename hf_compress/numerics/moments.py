"""Mean and covariance of rows as they stream by, and their principal directions."""

from __future__ import annotations

import torch
from torch import Tensor


class Moments:
    """Weighted sums over rows x [T, p], in float64; memory does not grow with the rows.

    Attributes:
        inputs: p.
        device: where the sums live; rows are brought there. The CPU where the device has no float64.
        count: rows seen, or the sum of their weights.
        x_sum: sum of x, [p].
        gram: sum of x x^T, [p, p].
    """

    def __init__(self, inputs: int, device: torch.device | str = "cpu") -> None:
        device = torch.device(device)
        self.inputs, self.device = inputs, torch.device("cpu") if device.type == "mps" else device
        self.count: float = 0
        self.x_sum, self.gram = self._zeros(inputs), self._zeros(inputs, inputs)

    def add(self, rows: Tensor, weights: Tensor | None = None) -> Tensor:
        """Add rows [T, p] of any real dtype; `weights` [T] >= 0 count a row as so many. Gives the weighted rows."""
        rows = rows.to(self.gram)
        weighted = rows if weights is None else rows * weights.to(rows)[:, None]
        self.count += len(rows) if weights is None else float(weights.to(rows).sum())
        self.x_sum += weighted.sum(dim=0)
        self.gram += weighted.T @ rows
        return weighted

    @property
    def centred_gram(self) -> Tensor:
        """Sum of (x - mean)(x - mean)^T, [p, p]."""
        return self.gram - torch.outer(self.x_sum, self.x_sum) / self.count

    @property
    def mean(self) -> Tensor:
        """[p]"""
        return self.x_sum / self.count

    @property
    def covariance(self) -> Tensor:
        """Mean of (x - mean)(x - mean)^T, [p, p]."""
        return self.gram / self.count - torch.outer(self.mean, self.mean)

    def principal(self) -> tuple[Tensor, Tensor]:
        """Orthonormal directions [p, p], a column each, and their variances [p], the largest first."""
        variances, directions = torch.linalg.eigh(self.covariance)
        return directions.flip(1), variances.flip(0).clamp(min=0)

    def _zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.float64, device=self.device)
