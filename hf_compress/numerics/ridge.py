"""Ridge regression from streaming sums: least squares towards a prior, without keeping the data."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .moments import Moments

# A feature whose variance is below this share of its mean square counts as constant: sums of n rows carry a relative
# error of about sqrt(n) times 1e-16.
_CONSTANT = 1e-12


def solve_ridge(gram: Tensor, cross: Tensor, penalty: float, prior: Tensor | None = None) -> Tensor:
    """The B that minimises ||X B - Y||^2 + penalty * mean(diag(gram)) * ||B - prior||^2, from gram and cross alone.

    Solved by Cholesky for the step away from the prior. Where the system is singular to working precision (penalty 0
    with collinear or dead features), by its eigenvalues: then B is, of all minimisers, the one nearest to the prior.

    Args:
        gram: X^T X, [p, p], symmetric.
        cross: X^T Y, [p, q].
        penalty: >= 0, relative to the mean diagonal of `gram`, hence free of the units and the number of rows of X.
        prior: [p, q]; None means 0.

    Returns:
        B [p, q] float64, on the device of `gram` (on the CPU where the device has no float64).

    Raises:
        ValueError: shapes that do not fit, a gram that is not symmetric, NaN or infinite entries, a penalty that is
            negative or not finite.

    Source: A. E. Hoerl and R. W. Kennard, "Ridge regression", Technometrics 12 (1970), equation (2.1); with a prior
    mean, the generalised form of the same.
    """
    _check_penalty(penalty)
    gram, cross = _as_float64(gram, "gram"), _as_float64(cross, "cross")
    size = gram.shape[0]
    if gram.shape[1] != size or cross.shape[0] != size:
        raise ValueError(
            f"gram has shape {list(gram.shape)} and cross {list(cross.shape)}; expected [p, p] and [p, q]: "
            "X^T X and X^T Y"
        )
    if not torch.allclose(gram, gram.T, rtol=1e-6, atol=1e-9 * float(gram.abs().max())):
        raise ValueError("gram is not symmetric; expected X^T X: accumulate x.T @ x, not x.T @ y")
    start = torch.zeros_like(cross) if prior is None else _as_float64(prior, "prior")
    if start.shape != cross.shape:
        raise ValueError(f"prior has shape {list(start.shape)}; expected that of cross, {list(cross.shape)}")
    ridge = penalty * gram.diagonal().mean()
    system = gram + ridge * torch.eye(size, dtype=gram.dtype, device=gram.device)
    return start + _solve_symmetric(system, cross - gram @ start)


class LeastSquares(Moments):
    """Streaming statistics of a regression of y [T, q] on x [T, p], all in float64; memory does not grow with the rows.

    Attributes, besides those of the moments of x:
        outputs: q, the features of y.
        cross: sum of x y^T, [p, q].
        y_sum: [q].
        energy: sum of ||y||^2.
    """

    def __init__(self, inputs: int, outputs: int, device: torch.device | str = "cpu") -> None:
        if inputs < 1 or outputs < 1:
            raise ValueError(f"inputs is {inputs} and outputs is {outputs}; expected both to be at least 1")
        super().__init__(inputs, device)
        self.outputs, self.energy = outputs, 0.0
        self.cross, self.y_sum = self._zeros(inputs, outputs), self._zeros(outputs)

    def update(self, x: Tensor, y: Tensor, weights: Tensor | None = None) -> None:
        """Add the rows x [T, p], y [T, q], any real dtype; T may be 0. `weights` [T] >= 0 count a row as so many.

        Raises:
            ValueError: other shapes, NaN or infinite entries. Nothing has been added then.
        """
        if x.ndim != 2 or y.ndim != 2 or (x.shape[1], y.shape[1]) != (self.inputs, self.outputs) or len(x) != len(y):
            raise ValueError(
                f"x has shape {list(x.shape)} and y {list(y.shape)}; expected [T, {self.inputs}] and "
                f"[T, {self.outputs}]: one row a token, padding removed"
            )
        x, y = _as_float64(x, "x").to(self.device), _as_float64(y, "y").to(self.device)
        counts = torch.ones(len(x), dtype=x.dtype, device=x.device)
        if weights is not None:
            if weights.shape != counts.shape or bool((weights < 0).any()):
                raise ValueError(
                    f"weights has shape {list(weights.shape)}; expected a number >= 0 for each of {len(x)} rows"
                )
            counts = _as_float64(weights[:, None], "weights").to(x)[:, 0]
        self.cross += self.add(x, None if weights is None else counts).T @ y
        self.y_sum += counts @ y
        self.energy += float(counts @ y.square().sum(dim=1))

    def merge(self, other: "LeastSquares") -> "LeastSquares":
        """The statistics of both sets of rows, on this one's device, as a new object. ValueError if shapes differ."""
        if (self.inputs, self.outputs) != (other.inputs, other.outputs):
            raise ValueError(
                f"cannot merge statistics of {self.inputs} -> {self.outputs} features with {other.inputs} -> "
                f"{other.outputs}; expected the same features on both sides"
            )
        merged = LeastSquares(self.inputs, self.outputs, self.device)
        for name in ("gram", "cross", "x_sum", "y_sum"):
            setattr(merged, name, getattr(self, name) + getattr(other, name).to(merged.device))
        merged.energy, merged.count = self.energy + other.energy, self.count + other.count
        return merged

    def __add__(self, other: "LeastSquares") -> "LeastSquares":
        return self.merge(other) if isinstance(other, LeastSquares) else NotImplemented

    def take(self, features: Tensor) -> "LeastSquares":
        """The statistics with none of x but `features` [n], in that order."""
        some = LeastSquares(len(features), self.outputs, self.device)
        features = features.to(self.gram.device)
        some.gram, some.cross = self.gram[features][:, features], self.cross[features]
        some.x_sum, some.y_sum = self.x_sum[features], self.y_sum.clone()
        some.energy, some.count = self.energy, self.count
        return some

    def solve(self, penalty: float, prior: Tensor | None = None, parts: Sequence[int] | None = None) -> Tensor:
        """B [p, q] float64 with y ~ x B: `solve_ridge` of these sums. Raises ValueError when no rows were seen.

        With `parts`, widths that make up p, each part of x is divided by its root mean square first, so that one
        penalty is as much for all of them.
        """
        self._require_rows()
        prior = None if prior is None else prior.to(self.cross)
        if parts is None:
            return solve_ridge(self.gram, self.cross, penalty, prior)
        squares = (self.gram.diagonal() / self.count).split(list(parts))
        means = [part.mean().clamp(min=1e-12).expand(len(part)) for part in squares]
        scales = torch.cat(means).sqrt()[:, None]
        start = None if prior is None else prior * scales
        return solve_ridge(self.gram / scales / scales.T, self.cross / scales, penalty, start) / scales

    def solve_affine(self, penalty: float, prior: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(B [p, q], bias [q]) float64 with y ~ x B + bias; the bias is not penalised.

        `penalty` is relative to the mean variance of x (times the rows), the diagonal of the centred gram.
        Raises ValueError when no rows were seen.
        """
        self._require_rows()
        x_mean, y_mean = self.x_sum / self.count, self.y_sum / self.count
        gram, cross = self.centred_gram, self.cross - torch.outer(self.x_sum, y_mean)
        # What is left of a constant feature is rounding, and its weight would be a quotient of roundings.
        constant = gram.diagonal() <= _CONSTANT * self.gram.diagonal()
        gram[constant], gram[:, constant], cross[constant] = 0.0, 0.0, 0.0
        weight = solve_ridge(gram, cross, penalty, None if prior is None else prior.to(self.device))
        return weight, y_mean - x_mean @ weight

    def error(self, weight: Tensor, bias: Tensor | None = None) -> float:
        """Mean over rows of ||x B (+ bias) - y||^2, from the sums alone; B = weight [p, q], bias [q].

        Being a difference of sums, it is 0 only up to about 1e-15 of the mean ||y||^2.
        Raises ValueError when no rows were seen, a shape does not fit, or weight or bias is not finite.
        """
        self._require_rows()
        offset = torch.zeros_like(self.y_sum) if bias is None else bias.to(self.y_sum)
        if weight.shape != self.cross.shape or offset.shape != self.y_sum.shape:
            raise ValueError(
                f"weight has shape {list(weight.shape)} and bias {list(offset.shape)}; expected "
                f"{list(self.cross.shape)} and {list(self.y_sum.shape)}"
            )
        weight = weight.to(self.cross)
        quadratic = (weight * (self.gram @ weight - 2 * self.cross)).sum() + self.count * offset @ offset
        linear = 2 * offset @ (self.x_sum @ weight - self.y_sum)
        total = self.energy + float(quadratic + linear)
        if not math.isfinite(total):
            raise ValueError(f"the squared error is {total}; expected finite entries in weight and bias")
        return max(0.0, total) / self.count

    def _require_rows(self) -> None:
        if self.count == 0:
            raise ValueError("no rows were seen; expected at least one: call update(x, y) with calibration activations")


def _check_penalty(penalty: float) -> None:
    if not math.isfinite(penalty) or penalty < 0:
        raise ValueError(
            f"penalty is {penalty}; expected a finite number >= 0 (relative to the mean diagonal, e.g. 1e-3)"
        )


def _as_float64(matrix: Tensor, name: str) -> Tensor:
    """A detached two-dimensional float64 tensor, checked to be finite."""
    if matrix.ndim != 2:
        raise ValueError(f"{name} has shape {list(matrix.shape)}; expected two dimensions")
    matrix = matrix.detach()
    matrix = (matrix.cpu() if matrix.device.type == "mps" else matrix).to(torch.float64)
    if not bool(torch.isfinite(matrix).all()):
        raise ValueError(
            f"{name} has NaN or infinite entries; expected finite values: run the calibration in float32 or bfloat16"
        )
    return matrix


def _solve_symmetric(system: Tensor, right: Tensor) -> Tensor:
    """system^-1 right for a positive definite system; its minimum-norm least-squares solution otherwise."""
    tolerance = len(system) * torch.finfo(system.dtype).eps
    factor, failed = torch.linalg.cholesky_ex(system)
    # pivot^2 / diagonal is the share of a feature that those before it leave unexplained, whatever the feature's scale.
    if not failed and bool((factor.diagonal().square() > tolerance * system.diagonal()).all()):
        return torch.cholesky_solve(right, factor)
    values, vectors = torch.linalg.eigh(system)
    kept = values > tolerance * values.abs().max()
    return vectors[:, kept] @ ((vectors[:, kept].T @ right) / values[kept, None])
