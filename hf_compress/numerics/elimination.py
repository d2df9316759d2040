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
_ROUNDS = 128  # at most: where more features go, several go at once,
_CANDIDATES = 4  # chosen from so many times as many


def eliminate(sums: LeastSquares, count: int, affine: bool = True, size: int = 1) -> Tensor:
    """The features of x that are left when all but `count` have been left out of the regression of y on x.

    With a `size`, features go by the block: the first `size` of them, the next, and so on, and it is blocks that are
    counted; leaving out block b raises the squared error by tr B_b^T ((G^-1)_bb)^-1 B_b. Features that never vary are
    the first to go (in an affine fit; else those that are always 0).

    Args:
        sums: of x [T, p], y [T, q].
        count: features (or blocks) to keep, 1 to p (or p / size).
        affine: whether the regression has a bias.
        size: features of a block, a divisor of p.

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
    if sums.count == 0:
        raise ValueError("no rows were seen; expected at least one: call update(x, y) with calibration activations")
    gram, cross = sums.gram, sums.cross
    if affine:
        gram, cross = sums.centred_gram, cross - torch.outer(sums.x_sum, sums.y_sum) / sums.count
    ridge = _PENALTY * gram.diagonal().mean().clamp(min=torch.finfo(gram.dtype).tiny)
    inverse = torch.linalg.inv(gram + ridge * torch.eye(len(gram), dtype=gram.dtype, device=gram.device))
    solution = inverse @ cross
    left = torch.arange(blocks, device=gram.device)
    at_once = -(-(blocks - count) // _ROUNDS)
    while len(left) > count:
        gone = _cheapest(inverse, solution, size, min(at_once, len(left) - count))
        inverse, solution, stay = _without(inverse, solution, size, gone)
        left = left[stay]
    return left.cpu()


def _cheapest(inverse: Tensor, solution: Tensor, size: int, count: int) -> Tensor:
    """Blocks to leave out: one after another, the costs updated each time, from those that are cheapest now.

    What becomes of the costs of some blocks without others of them hangs on the entries of these blocks alone.
    """
    candidates = _costs(inverse, solution, size)
    candidates = candidates.topk(min(_CANDIDATES * count, len(candidates)), largest=False).indices
    features = entries(candidates, size)
    inverse, solution = inverse[features][:, features], solution[features]
    gone = []
    for left_to_go in range(count, 0, -1):
        place = _costs(inverse, solution, size).argmin()
        gone.append(candidates[place])
        if left_to_go > 1:
            inverse, solution, stay = _without(inverse, solution, size, place[None])
            candidates = candidates[stay]
    return torch.stack(gone)


def _without(inverse: Tensor, solution: Tensor, size: int, gone: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The inverse of what is left of the covariance without some blocks, the fit without them, and the blocks left."""
    stay = torch.ones(len(inverse) // size, dtype=torch.bool, device=gone.device)
    stay[gone] = False
    stay = stay.nonzero()[:, 0]
    out, kept = entries(gone, size), entries(stay, size)
    taken = torch.linalg.solve(inverse[out][:, out], inverse[out][:, kept])
    return inverse[kept][:, kept] - inverse[kept][:, out] @ taken, solution[kept] - taken.T @ solution[out], stay


def entries(blocks: Tensor, size: int) -> Tensor:
    """The features of some blocks of `size` features each."""
    return (blocks[:, None] * size + torch.arange(size, device=blocks.device)).flatten()


def _costs(inverse: Tensor, solution: Tensor, size: int) -> Tensor:
    """By how much the squared error rises without each block."""
    if size == 1:
        return solution.square().sum(dim=1) / inverse.diagonal()
    count = len(inverse) // size
    own = torch.arange(count, device=inverse.device)
    diagonal = inverse.view(count, size, count, size)[own, :, own]
    parts = solution.view(count, size, -1)
    return (parts * torch.linalg.solve(diagonal, parts)).sum(dim=(1, 2))
