"""Ridge regression from streaming sums: least squares towards a prior, without keeping the data."""

import copy
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from .cholesky import cholesky, regular_cholesky, solve
from .moments import Moments, about, pieces

# A feature whose variance is below this share of its mean square counts as constant: sums of n rows carry a relative
# error of about sqrt(n) times 1e-16.
_CONSTANT = 1e-12
_SYMMETRIC = 1e-6

Solver = Callable[[Tensor], Tensor]
"""What gives system^-1 right for right sides [p, n]."""


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
    if float((gram - gram.T).abs().max()) > _SYMMETRIC * float(gram.abs().max()):
        raise ValueError("gram is not symmetric; expected X^T X: accumulate x.T @ x, not x.T @ y")
    start = torch.zeros_like(cross) if prior is None else _as_float64(prior, "prior")
    if start.shape != cross.shape:
        raise ValueError(f"prior has shape {list(start.shape)}; expected that of cross, {list(cross.shape)}")

    def system() -> Tensor:
        matrix = gram.clone()
        matrix.diagonal().add_(penalty * gram.diagonal().mean())
        return matrix

    return start + _solver(system, gram.dtype)(cross - gram @ start)


class Regression(Protocol):
    """What can be added to the sums of a regression of y [T, q] on x [T, p]; see `LeastSquares`."""

    inputs: int
    outputs: int

    @property
    def count(self) -> float: ...
    @property
    def x_sum(self) -> Tensor: ...
    @property
    def y_sum(self) -> Tensor: ...
    def energy_about(self, point: Tensor) -> float: ...
    def cross_about(self, x_point: Tensor, y_point: Tensor) -> Tensor: ...
    def gram_about(self, point: Tensor, onto: Tensor) -> Tensor: ...


class LeastSquares(Moments):
    """Streaming statistics of a regression of y [T, q] on x [T, p]; memory does not grow with the rows.

    Args:
        inputs: p.
        outputs: q, the features of y.
        device, dtype: as for the moments of x.
        origin: points near the means of x and y, [p] and [q], that their sums are kept about; 0 when None.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float64,
        origin: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        if inputs < 1 or outputs < 1:
            raise ValueError(f"inputs is {inputs} and outputs is {outputs}; expected both to be at least 1")
        super().__init__(inputs, device, dtype, None if origin is None else origin[0])
        self.outputs = outputs
        self.y_origin = self._vector(outputs, None if origin is None else origin[1])
        self._y, self._energy = self._vector(outputs), 0.0  # sums of y - origin and of its square
        self._cross = torch.zeros(inputs, outputs, dtype=dtype, device=self.device)

    def update(self, x: Tensor, y: Tensor, weights: Tensor | None = None) -> None:
        """Add the rows x [T, p], y [T, q], any real dtype; T may be 0. `weights` [T] >= 0 count a row as so many.

        Raises:
            ValueError: other shapes, NaN or infinite entries. Nothing has been added then.
        """
        check_rows(x, y, weights, self.inputs, self.outputs)
        for part in pieces(len(x)):
            counts = None if weights is None else weights[part]
            weighted, right = self._add(x[part], counts), about(y[part], self.y_origin, self.dtype)
            self._cross.addmm_(weighted.T, right)
            times = torch.ones(len(right), dtype=torch.float64) if counts is None else counts.double()
            times = times.to(right.device)
            self._y += times @ right.double()
            self._energy += float(times @ right.square().sum(dim=1, dtype=torch.float64))

    def _sums(self) -> list[Tensor]:
        return [self._x, self._y, self._cross]

    def _numbers(self) -> list[float]:
        return [self.count, self._energy]

    def _set_numbers(self, numbers: list[float]) -> None:
        self.count, self._energy = numbers

    @property
    def nbytes(self) -> int:
        """Of the sums, but for those of single features."""
        return self._gram.nbytes + self._cross.nbytes

    @property
    def cross(self) -> Tensor:
        """Sum of x y^T, [p, q]: the sums' own memory where their origins are 0."""
        if not self.origin.any() and not self.y_origin.any():
            return self._cross
        return self.cross_about(torch.zeros_like(self.origin), torch.zeros_like(self.y_origin))

    @property
    def y_sum(self) -> Tensor:
        """Sum of y, [q] float64."""
        return self._y + self.count * self.y_origin

    @property
    def y_mean(self) -> Tensor:
        """[q] float64"""
        return self.y_origin + self._y / self.count

    @property
    def energy(self) -> float:
        """Sum of ||y||^2."""
        return self.energy_about(torch.zeros_like(self.y_origin))

    def cross_about(self, x_point: Tensor, y_point: Tensor) -> Tensor:
        """Sum of (x - x_point)(y - y_point)^T, [p, q], as a new tensor."""
        x_step, y_step = self.origin - x_point.to(self.origin), self.y_origin - y_point.to(self.origin)
        left = torch.stack([self._x, x_step], dim=1).to(self._cross)
        return self._cross.addmm(left, torch.stack([y_step, self._y + self.count * y_step]).to(self._cross))

    def energy_about(self, point: Tensor) -> float:
        """Sum of ||y - point||^2."""
        step = self.y_origin - point.to(self.y_origin)
        return self._energy + float(step @ (2 * self._y + self.count * step))

    def normal_gram(self, affine: bool, rows: Sequence[slice] | None = None) -> Tensor:
        """X^T X [p, p], about the mean if `affine`, as a new tensor. ValueError if no rows were seen.

        All of it is right, whatever `rows` are asked for.
        """
        self.require_rows()
        return self.gram_about(self.mean if affine else torch.zeros_like(self.origin))

    def normal_cross(self, affine: bool) -> Tensor:
        """X^T Y [p, q], about the means if `affine`, as a new tensor. ValueError if no rows were seen."""
        self.require_rows()
        x_point, y_point = self.mean, self.y_mean
        return self.cross_about(x_point, y_point) if affine else self.cross_about(0 * x_point, 0 * y_point)

    def merge(self, other: "Regression") -> "LeastSquares":
        """The statistics of both sets of rows, like this one's, as a new object. ValueError if shapes differ."""
        merged = copy.copy(self)
        merged._gram, merged._cross = self.own_gram().clone(), self._cross.clone()
        merged.absorb(other)
        return merged

    def absorb(self, other: "Regression") -> None:
        """Become the statistics of both sets of rows, in memory that what `mix` and `of_outputs` gave shares.

        ValueError if shapes differ.
        """
        if (self.inputs, self.outputs) != (other.inputs, other.outputs):
            raise ValueError(
                f"cannot merge statistics of {self.inputs} -> {self.outputs} features with {other.inputs} -> "
                f"{other.outputs}; expected the same features on both sides"
            )
        more_x = other.x_sum.to(self._x) - other.count * self.origin
        more_y = other.y_sum.to(self._y) - other.count * self.y_origin
        self._energy += other.energy_about(self.y_origin)
        self._cross += other.cross_about(self.origin, self.y_origin).to(self._cross)
        other.gram_about(self.origin, onto=self.own_gram())
        self.count += other.count
        self._x, self._y = self._x + more_x, self._y + more_y

    def __add__(self, other: "LeastSquares") -> "LeastSquares":
        return self.merge(other) if isinstance(other, LeastSquares) else NotImplemented

    def take(self, features: Tensor) -> "LeastSquares":
        """The statistics with none of x but `features` [n], in that order."""
        some = copy.copy(self)
        features = features.to(self.device)
        some.inputs = len(features)
        some._gram, some._cross = self.own_gram()[features[:, None], features], self._cross[features]
        some.origin, some._x, some._y = self.origin[features], self._x[features], self._y.clone()
        return some

    def of_outputs(self, outputs: slice) -> "LeastSquares":
        """The statistics of the regression of some of y; the sums of x are shared. Of the energy, see `mix`."""
        some = copy.copy(self)
        some._cross, some._y, some.y_origin = self._cross[:, outputs], self._y[outputs], self.y_origin[outputs]
        some.outputs = len(some._y)
        return some

    def mix(self, outputs: Tensor) -> "LeastSquares":
        """The statistics of the regression of y M on x, M = outputs [q, n]; the sums of x are shared, not copied.

        Of the energy no more is known than that of y: errors are right up to a constant.
        """
        mixed = copy.copy(self)
        mixed.outputs, mixed._cross = outputs.shape[1], self._cross @ outputs.to(self._cross)
        mixed._y, mixed.y_origin = self._y @ outputs.to(self._y), self.y_origin @ outputs.to(self._y)
        return mixed

    def solve(self, penalty: float, prior: Tensor | None = None, parts: Sequence[int] | None = None) -> Tensor:
        """B [p, q] of the sums' dtype with y ~ x B: that of `solve_ridge`. Raises ValueError when no rows were seen.

        With `parts`, widths that make up p, each part of x is divided by its root mean square first, so that one
        penalty is as much for all of them.
        """
        ridge = Ridge(self, parts=parts)
        return ridge.solution(ridge.solver(penalty), self, prior)[0]

    def solve_affine(self, penalty: float, prior: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(B [p, q] of the sums' dtype, bias [q] float64) with y ~ x B + bias; the bias is not penalised.

        `penalty` is relative to the mean variance of x (times the rows), the diagonal of the centred gram.
        Raises ValueError when no rows were seen.
        """
        ridge = Ridge(self, affine=True)
        weight, bias = ridge.solution(ridge.solver(penalty), self, prior)
        assert bias is not None
        return weight, bias

    def error(self, weight: Tensor, bias: Tensor | None = None) -> float:
        """Mean over rows of ||x B (+ bias) - y||^2, from the sums alone; B = weight [p, q], bias [q].

        Being a difference of sums, it is 0 only up to about 1e-15 of the mean ||y||^2, 1e-7 where sums are float32.
        Raises ValueError when no rows were seen, a shape does not fit, or weight or bias is not finite.
        """
        return max(0.0, self._energy + self.excess(weight, bias)) / self.count

    def excess(self, weight: Tensor, bias: Tensor | None = None) -> float:
        """The squared error summed over rows, less the sum of ||y - its origin||^2. Raises as `error` does."""
        self.require_rows()
        offset = torch.zeros_like(self._y) if bias is None else bias.to(self._y)
        if weight.shape != self._cross.shape or offset.shape != self._y.shape:
            raise ValueError(
                f"weight has shape {list(weight.shape)} and bias {list(offset.shape)}; expected "
                f"{list(self._cross.shape)} and {list(self._y.shape)}"
            )
        weight = weight.to(self._cross)
        at_origin, of_sum = torch.stack([self.origin, self._x]) @ weight.double()
        offset = offset + at_origin - self.y_origin
        rest = (self.own_gram() @ weight).sub_(self._cross, alpha=2).mul_(weight).sum(dtype=torch.float64)
        total = rest + offset @ (2 * (of_sum - self._y) + self.count * offset)
        if not math.isfinite(total):
            raise ValueError(f"the squared error is {float(total)}; expected finite entries in weight and bias")
        return float(total)

    def require_rows(self) -> None:
        """Raise ValueError where there are none, or where sums of them have overflowed."""
        if self.count == 0:
            raise ValueError("no rows were seen; expected at least one: call update(x, y) with calibration activations")
        if not bool(torch.isfinite(self._gram.diagonal()).all()):
            raise ValueError(f"x is so large that sums of its squares overflow {self.dtype}; expected smaller entries")


class Ridge:
    """The ridge regression of some sums, for one penalty after another.

    The sums' dtype is what it is solved in. In float32 a system that is singular to working precision is regularised
    (`regular_cholesky`); in float64 it is solved by its eigenvalues (`solve_ridge`).

    Args:
        sums: of x and y.
        affine: with a bias, which is not penalised.
        parts: where it is not affine, the widths of parts of x that share a penalty.

    Raises:
        ValueError: no rows were seen.
    """

    def __init__(self, sums: LeastSquares, affine: bool = False, parts: Sequence[int] | None = None) -> None:
        sums.require_rows()
        self.sums, self.affine = sums, affine
        self.point = sums.mean if affine else torch.zeros_like(sums.origin)
        squares = sums.squares_about(self.point)
        scales = torch.ones_like(squares)
        if parts is not None:
            means = [part.mean().expand(len(part)) for part in (squares / sums.count).split(list(parts))]
            scales = torch.cat(means).clamp(min=1e-12).rsqrt()
        if affine:
            # What is left of a constant feature is rounding, and its weight would be a quotient of roundings.
            about_origin, about_zero = sums.squares_about(sums.origin), sums.squares_about(torch.zeros_like(self.point))
            scales[squares <= _CONSTANT * about_zero] = 0
            scales[squares <= torch.finfo(sums.dtype).eps * about_origin] = 0
        self.scales = scales.to(sums.dtype)
        self.unit = float((squares * scales.square()).mean())

    def solver(self, penalty: float) -> Solver:
        """Factorise the system of a penalty >= 0. ValueError if that is negative or not finite."""
        _check_penalty(penalty)

        def system() -> Tensor:
            gram = self.sums.gram_about(self.point)
            if bool((self.scales != 1).any()):
                gram.mul_(self.scales).mul_(self.scales[:, None])
            gram.diagonal().add_(penalty * self.unit)
            return gram

        return _solver(system, self.sums.dtype)

    def solution(self, solver: Solver, sums: LeastSquares, prior: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """(B [p, q], bias [q] or None) by a solver of these sums, for the outputs of `sums`: these, or a mix of them.

        Args:
            prior: [p, q]; None means 0.
        """
        y_point = sums.y_mean if self.affine else torch.zeros_like(sums.y_origin)
        right = sums.cross_about(self.point, y_point)
        scales = self.scales[:, None]
        if prior is not None:
            start = prior.to(right) * (scales != 0)
            sums.shift(right.sub_(sums.own_gram() @ start), self.point, start, sign=-1)
        weight = solver(right.mul_(scales)).mul_(scales)
        if prior is not None:
            weight += prior.to(weight)
        return weight, y_point - sums.mean @ weight.double() if self.affine else None


def check_rows(x: Tensor, y: Tensor, weights: Tensor | None, inputs: int, outputs: int) -> None:
    """Raise ValueError unless there are as many rows of both, of these widths, all finite, that count 0 or more."""
    if x.ndim != 2 or y.ndim != 2 or (x.shape[1], y.shape[1]) != (inputs, outputs) or len(x) != len(y):
        raise ValueError(
            f"x has shape {list(x.shape)} and y {list(y.shape)}; expected [T, {inputs}] and [T, {outputs}]: "
            "one row a token, padding removed"
        )
    _check_finite(x, "x")
    _check_finite(y, "y")
    if weights is not None:
        if weights.shape != (len(x),) or bool((weights < 0).any()):
            raise ValueError(
                f"weights has shape {list(weights.shape)}; expected a number >= 0 for each of {len(x)} rows"
            )
        _check_finite(weights, "weights")


def _check_penalty(penalty: float) -> None:
    if not math.isfinite(penalty) or penalty < 0:
        raise ValueError(
            f"penalty is {penalty}; expected a finite number >= 0 (relative to the mean diagonal, e.g. 1e-3)"
        )


def _as_float64(matrix: Tensor, name: str) -> Tensor:
    """A detached two-dimensional float64 tensor, checked to be finite."""
    if matrix.ndim != 2:
        raise ValueError(f"{name} has shape {list(matrix.shape)}; expected two dimensions")
    _check_finite(matrix, name)
    matrix = matrix.detach()
    return (matrix.cpu() if matrix.device.type == "mps" else matrix).to(torch.float64)


def _check_finite(values: Tensor, name: str) -> None:
    if not bool(torch.isfinite(values).all()):
        raise ValueError(
            f"{name} has NaN or infinite entries; expected finite values: run the calibration in float32 or bfloat16"
        )


def _solver(system: Callable[[], Tensor], dtype: torch.dtype) -> Solver:
    """What solves a positive semidefinite system of a dtype, made as often as it is called for; see `Ridge`."""
    factor = regular_cholesky(system) if dtype != torch.float64 else cholesky(system())
    return _by_eigenvalues(system()) if factor is None else partial(solve, factor)


def _by_eigenvalues(system: Tensor) -> Solver:
    """Minimum-norm least-squares solutions of a singular system."""
    values, vectors = torch.linalg.eigh(system)
    kept = values > len(system) * torch.finfo(system.dtype).eps * values.abs().max()
    values, vectors = values[kept, None], vectors[:, kept]
    return lambda right: vectors @ ((vectors.T @ right) / values)
