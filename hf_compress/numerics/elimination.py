"""Which features of a regression can be done without: backward elimination, from sums alone.

Leaving feature j out of a least squares fit with the solution B and the covariance G raises the squared error by
|B_j|^2 / (G^-1)_jj, and the fit that is best without it follows in closed form. Again and again, the feature that costs
least is left out.

Source: B. Hassibi and D. G. Stork, "Second order derivatives for network pruning: Optimal Brain Surgeon", 1992,
equation (5), for a whole row of weights in the place of one.
"""

import torch
from torch import Tensor

from .ridge import LeastSquares

_PENALTY = 1e-3  # relative to the mean diagonal: keeps the inverse of a covariance of few rows in bounds
_ROUNDS = 128  # at most: where more features go, several go at once


def eliminate(sums: LeastSquares, count: int, affine: bool = True) -> Tensor:
    """The features of x that are left when all but `count` have been left out of the regression of y on x.

    Features that never vary are the first to go (in an affine fit; else those that are always 0).

    Args:
        sums: of x [T, p], y [T, q].
        count: features to keep, 1 to p.
        affine: whether the regression has a bias.

    Returns:
        [count] int64, in rising order.

    Raises:
        ValueError: a count that does not fit; no rows were seen.
    """
    if not 1 <= count <= sums.inputs:
        raise ValueError(f"count is {count}; expected 1 to the number of features, {sums.inputs}")
    if sums.count == 0:
        raise ValueError("no rows were seen; expected at least one: call update(x, y) with calibration activations")
    gram, cross = sums.gram.clone(), sums.cross.clone()
    if affine:
        gram -= torch.outer(sums.x_sum, sums.x_sum) / sums.count
        cross -= torch.outer(sums.x_sum, sums.y_sum) / sums.count
    ridge = _PENALTY * gram.diagonal().mean().clamp(min=torch.finfo(gram.dtype).tiny)
    inverse = torch.linalg.inv(gram + ridge * torch.eye(len(gram), dtype=gram.dtype, device=gram.device))
    solution = inverse @ cross
    left = torch.arange(sums.inputs, device=gram.device)
    at_once = -(-(sums.inputs - count) // _ROUNDS)
    while len(left) > count:
        costs = solution.square().sum(dim=1) / inverse.diagonal()
        gone = costs.topk(min(at_once, len(left) - count), largest=False).indices
        stay = torch.ones(len(left), dtype=torch.bool, device=left.device)
        stay[gone] = False
        # The fit without them, and the inverse of what is left of the covariance: both by block elimination.
        taken = torch.linalg.solve(inverse[gone][:, gone], inverse[gone][:, stay])
        solution = solution[stay] - taken.T @ solution[gone]
        inverse = inverse[stay][:, stay] - inverse[stay][:, gone] @ taken
        left = left[stay]
    return left.cpu()
