"""Ridge regression on few rows of many features, by the rows' Gram matrix where that is the smaller one.

For T rows and p features, B = Xᵀ (X Xᵀ + λ)⁻¹ Y is what (Xᵀ X + λ)⁻¹ Xᵀ Y is, and takes T² p products in the place of
T p².

Source: C. Saunders, A. Gammerman and V. Vovk, "Ridge regression learning algorithm in dual variables", 1998.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hf_compress.numerics.symmetric import add_products, mirror


@torch.no_grad()
def solve_rows(x: Tensor, y: Tensor, penalty: float, parts: Sequence[int]) -> Tensor:
    """B that minimises ‖X B − Y‖² + penalty · T · ‖S B‖², where S are the root mean squares of parts of the features.

    The smaller of the two systems is solved. Products are float32, and the system of the rows is solved in float64.

    Args:
        x: [T, p], any real dtype.
        y: [T, q].
        penalty: > 0, relative to the mean square of the features once they are divided by S.
        parts: widths that make up p; the features of a part are divided by one number, so that a penalty is as much for
            all parts.

    Returns:
        B [p, q] float32.
    """
    rows, features = x.shape
    scales = scales_of(x, parts)
    x, y = x.float() / scales, y.float()
    if rows < features:
        solved = x.T @ solve_dual(gram_of(x.T), y, penalty)
    else:
        system = gram_of(x)
        system.diagonal().add_(penalty * rows)
        solved = torch.cholesky_solve(x.T @ y, torch.linalg.cholesky(system))
    return solved / scales[:, None]


def scales_of(x: Tensor, parts: Sequence[int]) -> Tensor:
    """S, [p] float32: for each feature of x [T, p], the root mean square of its part."""
    means = (part.float().square().mean() for part in x.split([*parts], 1))
    return torch.cat([mean.sqrt().clamp(min=1e-6).expand(width) for mean, width in zip(means, parts, strict=True)])


def gram_of(x: Tensor) -> Tensor:
    """Xᵀ X, [p, p], of x [T, p]: one half is computed."""
    gram = x.new_zeros(x.shape[1], x.shape[1])
    add_products(gram, x, x)
    mirror(gram)
    return gram


def solve_dual(inner: Tensor, y: Tensor, penalty: float) -> Tensor:
    """(X Xᵀ + penalty · T)⁻¹ Y, [T, q] float32, by X Xᵀ [T, T]; in float64, for that may be near singular."""
    system = inner.double()
    system.diagonal().add_(penalty * len(inner))
    return torch.cholesky_solve(y.double(), torch.linalg.cholesky(system)).float()
