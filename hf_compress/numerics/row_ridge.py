"""Ridge regression on few rows of many features, by the rows' Gram matrix where that is the smaller one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


@torch.no_grad()
def solve_rows(x: Tensor, y: Tensor, penalty: float, parts: Sequence[int]) -> Tensor:
    """B that minimises ‖X B − Y‖² + penalty · T · ‖S B‖², where S are the root mean squares of parts of the features.

    For T rows and p features, B = Xᵀ (X Xᵀ + λ)⁻¹ Y takes T² p products in the place of T p²; the smaller is taken.
    Products are float32, and the system is solved in float64 where it has the size of the rows.

    Args:
        x: [T, p], any real dtype.
        y: [T, q].
        penalty: > 0, relative to the mean square of the features once they are divided by S.
        parts: widths that make up p; the features of a part are divided by one number, so that a penalty is as much for
            all parts.

    Returns:
        B [p, q] float32.

    Source: C. Saunders, A. Gammerman and V. Vovk, "Ridge regression learning algorithm in dual variables", 1998.
    """
    rows, features = x.shape
    x, y = x.float(), y.float()
    scales = torch.cat(
        [part.square().mean().sqrt().clamp(min=1e-6).expand(part.shape[1]) for part in x.split([*parts], 1)]
    )
    x = x / scales
    ridge = penalty * rows
    if rows < features:
        system = (x @ x.T).double()
        system.diagonal().add_(ridge)
        solved = x.T @ torch.cholesky_solve(y.double(), torch.linalg.cholesky(system)).float()
    else:
        system = x.T @ x
        system.diagonal().add_(ridge)
        solved = torch.cholesky_solve(x.T @ y, torch.linalg.cholesky(system))
    return solved / scales[:, None]
