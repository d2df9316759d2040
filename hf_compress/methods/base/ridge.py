"""Ridge regression from calibration batches, every fourth of them held out: to choose a penalty, and to judge by."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from hf_compress.calibration.processes import from_one, gathered, here, spread, summed, told
from hf_compress.numerics.cholesky import NARROW
from hf_compress.numerics.regression_rows import RegressionRows
from hf_compress.numerics.ridge import LeastSquares, Ridge
from hf_compress.numerics.team import Team

_T = TypeVar("_T")
PENALTIES = (1e-4, 1e-3, 1e-2, 0.03, 0.1, 0.3, 1.0, 3.0)  # worth trying, relative to the mean variance of the inputs
CAUTIOUS = (0.1,)  # where there is nothing to choose a penalty by
_SMALLEST = PENALTIES[0]  # beside which the rounding of sums in float32 is nothing to speak of
MIXTURES = 64  # of the outputs, that a penalty is chosen by


def dtype_of_sums(dtype: torch.dtype, penalties: Sequence[float]) -> torch.dtype:
    """Of sums over rows of a dtype, to be solved with penalties: float32, unless these or the rows want float64."""
    return torch.float64 if min(penalties) < _SMALLEST else torch.promote_types(dtype, torch.float32)


@dataclass(frozen=True, eq=False)
class RidgeFit:
    """A solution whose penalty was chosen on rows held out.

    Attributes:
        weight: (inputs, outputs), of the dtype of the sums.
        bias: (outputs); None where none was solved for.
        penalty: the one that did best on the held-out rows.
        error: squared error there as a share of the mean ||y||^2.
    """

    weight: Tensor
    bias: Tensor | None
    penalty: float
    error: float


@dataclass
class HeldOutSums:
    """Sums of the regression of y (tokens, outputs) on x (tokens, inputs).

    Attributes:
        fitted: over most batches.
        held: over those held out. They are fewer, and kept as rows for as long as these take less memory.
    """

    fitted: LeastSquares
    held: LeastSquares | RegressionRows

    @staticmethod
    def empty(
        inputs: int,
        outputs: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float64,
        origin: tuple[Tensor, Tensor] | None = None,
    ) -> HeldOutSums:
        """Before the first batch; see `LeastSquares`."""
        fitted = LeastSquares(inputs, outputs, device, dtype, origin)
        return HeldOutSums(fitted, RegressionRows.like(fitted))

    @staticmethod
    def like(x: Tensor, y: Tensor, affine: bool) -> HeldOutSums:
        """Before the first batch, which has the rows x and y: in float32, unless those are float64.

        With a penalty as small as the smallest of `PENALTIES` the rounding of float32 sums costs nothing to speak of.
        They are kept about the means of these rows where they are for an affine fit: only that is about the means.
        """
        origin = (x.mean(dim=0, dtype=torch.float64), y.mean(dim=0, dtype=torch.float64)) if affine and len(x) else None
        return HeldOutSums.empty(x.shape[1], y.shape[1], x.device, torch.promote_types(x.dtype, torch.float32), origin)

    @staticmethod
    def like_first(x: Tensor | None, y: Tensor | None, affine: bool) -> HeldOutSums:
        """The same in all processes, for the rows that the first of them has; None where one has no batch."""

        def known() -> tuple[int, int, str, torch.dtype, tuple[Tensor, Tensor] | None]:
            assert x is not None, "the first process has the first batch"
            assert y is not None
            sums = HeldOutSums.like(x, y, affine).fitted
            origin = (sums.origin, sums.y_origin) if affine else None
            return sums.inputs, sums.outputs, sums.device.type, sums.dtype, origin

        if x is not None and y is not None and here()[1] == 1:
            return HeldOutSums.like(x, y, affine)
        inputs, outputs, device, dtype, origin = from_one(known)
        return HeldOutSums.empty(inputs, outputs, device if x is None else x.device, dtype, origin)

    @property
    def inputs(self) -> int:
        return self.fitted.inputs

    def reduce(self) -> None:
        """Make these the sums over the batches of all processes."""
        HeldOutSums.reduce_all([self])

    @staticmethod
    def reduce_all(several: Sequence[HeldOutSums]) -> None:
        """The same for several, of which all processes have as many.

        One of them may have all batches held out, and the others none: so where one keeps sums of those, all do.
        """
        rank, world = here()
        if world == 1:
            return
        sizes = zip(*told([one.held.nbytes if one._keeps_rows else None for one in several]), strict=True)
        for one, own in zip(several, sizes, strict=True):
            one.fitted.reduce(summed)
            rows = [size for size in own if size is not None]
            if len(rows) < world or sum(rows) > one.fitted.nbytes:
                one._sums_of_held().reduce(summed)
        kept = [one.held for one in several if isinstance(one.held, RegressionRows)]
        parts = gathered({rank: [rows.joined() for rows in kept]})
        for rows, *everywhere in zip(kept, *parts, strict=True):
            rows.replace_by(everywhere)

    def mix(self, outputs: Tensor) -> HeldOutSums:
        """The sums for mixtures of y, y · outputs (outputs, mixtures); those of x are shared."""
        return HeldOutSums(self.fitted.mix(outputs), self.held.mix(outputs))

    def of_outputs(self, outputs: slice) -> HeldOutSums:
        """The sums for some of y."""
        return HeldOutSums(self.fitted.of_outputs(outputs), self.held.of_outputs(outputs))

    @property
    def all(self) -> LeastSquares:
        """The sums over all batches, as new ones."""
        return self.fitted.merge(self.held)

    @property
    def energy(self) -> float:
        """Mean ||y||^2 over all batches."""
        return (self.fitted.energy + self.held.energy) / (self.fitted.count + self.held.count)

    def normal_gram(self, affine: bool, rows: Sequence[slice] | None = None) -> Tensor:
        """X^T X over all batches, (inputs, inputs), as a new tensor; about the mean if `affine`.

        Where `rows` are given, no more than these of its upper triangle have to be right.
        """
        point, _ = self._points(affine)
        gram = self.fitted.gram_about(point)
        if isinstance(self.held, RegressionRows):
            return self.held.gram_about(point, gram, rows)
        return self.held.gram_about(point, onto=gram)

    def normal_cross(self, affine: bool) -> Tensor:
        """X^T Y over all batches, (inputs, outputs); about the means if `affine`."""
        points = self._points(affine)
        return self.fitted.cross_about(*points).add_(self.held.cross_about(*points))

    def _points(self, affine: bool) -> tuple[Tensor, Tensor]:
        """The means of x and y over all batches, or zeros. ValueError where there are no rows at all."""
        count = self.fitted.count + self.held.count
        if count == 0:
            self.fitted.require_rows()
        if not affine:
            return torch.zeros_like(self.fitted.origin), torch.zeros_like(self.fitted.y_origin)
        share = 1 / count
        return share * (self.fitted.x_sum + self.held.x_sum), share * (self.fitted.y_sum + self.held.y_sum)

    def update(self, x: Tensor, y: Tensor, weights: Tensor | None = None, *, held: bool) -> None:
        """Add the rows of a batch; `weights` (tokens) count a row as so many."""
        (self.held if held else self.fitted).update(x, y, weights)
        if self._keeps_rows and self.held.nbytes > self.fitted.nbytes:
            self._sums_of_held()

    @property
    def _keeps_rows(self) -> bool:
        return isinstance(self.held, RegressionRows)

    def _sums_of_held(self) -> LeastSquares:
        """What is held out, from now on as sums."""
        if isinstance(self.held, RegressionRows):
            self.held = self.held.summed()
        return self.held

    def fit(
        self,
        prior: Tensor | None = None,
        affine: bool = False,
        penalties: Sequence[float] | None = None,
        parts: Sequence[int] | None = None,
    ) -> RidgeFit:
        """Choose the penalty that does best on the rows held out, and solve with it on all rows.

        Where inputs are many, penalties are tried from the middle outwards for as long as they do better (`downhill`):
        each costs a factorisation, and the error has one minimum but for noise. Where outputs are many, the error to
        choose by is that of a few random mixtures of them, an unbiased estimate. The one reported is that of them all.

        The sums are used up: those of the rows held out are added to the others in their memory, by one process.

        Where either has no rows, the penalty is a cautious one, and the error that of the fit on its own rows.

        Args:
            prior: (inputs, outputs) that the weight is penalised for leaving; None means 0.
            affine: with a bias, which is not penalised.
            penalties: to choose among, in rising order.
            parts: where it is not affine, the widths of parts of x that share a penalty (see `LeastSquares.solve`).

        Raises:
            ValueError: no rows at all; no penalties.
        """
        penalties = PENALTIES if penalties is None else penalties
        if not penalties:
            raise ValueError("penalties is empty; expected at least one, e.g. 1e-3")
        alone = self.fitted.count == 0 or self.held.count == 0
        if alone:
            self._absorb_held()
        judged = HeldOutSums(self.fitted, self.fitted) if alone else self
        search = _Search(judged, prior, affine, parts)
        penalty = search.lowest(CAUTIOUS if alone else penalties)

        def solution() -> tuple[Tensor, Tensor | None]:
            if not alone:
                self._absorb_held()
            ridge = Ridge(self.fitted, affine, parts)
            return ridge.solution(ridge.solver(penalty), self.fitted, prior)

        error, (weight, bias) = search.judged(penalty, solution)
        return RidgeFit(weight, bias, penalty, error)

    def _absorb_held(self) -> None:
        self.fitted.absorb(self.held)
        self.held = RegressionRows.like(self.fitted)


class _Search:
    """The search for a penalty, each tried by one process."""

    def __init__(self, sums: HeldOutSums, prior: Tensor | None, affine: bool, parts: Sequence[int] | None) -> None:
        self.sums, self.prior = sums, prior
        self.ridge = Ridge(sums.fitted, affine, parts)
        self.mixed, self.start = sums, prior
        if (mix := mixtures(sums.fitted.outputs, MIXTURES)) is not None:
            self.mixed = sums.mix(mix)
            self.start = None if prior is None else prior.to(mix) @ mix
        self._errors: dict[float, float] = {}
        self._owners: dict[float, int] = {}

    def lowest(self, penalties: Sequence[float]) -> float:
        """The penalty that does best on the rows held out."""
        search = downhill if self.sums.inputs > NARROW else lowest
        return search(partial(self._attempt, penalties), penalties)[0]

    def judged(
        self, penalty: float, solution: Callable[[], tuple[Tensor, Tensor | None]]
    ) -> tuple[float, tuple[Tensor, Tensor | None]]:
        """The error of the fit, as a share of the mean ||y||^2, and a solution; two processes do both at once."""
        rank, world = here()
        judge = self._owners[penalty]
        solver = (judge + 1) % world
        error = self._error(penalty) if rank == judge else 0.0
        found = solution() if rank == solver else None
        return from_one(lambda: error, judge), from_one(lambda: found, solver)  # type: ignore[return-value]

    def _attempt(self, penalties: Sequence[float], penalty: float) -> tuple[float, None]:
        """The error with a penalty on mixtures of the rows held out.

        Those that may be asked for next, on the same way up or down, are tried by other processes at once.
        """
        if penalty not in self._errors:
            up = not self._errors or penalty > min(self._errors)
            ahead = [p for p in penalties if p >= penalty] if up else [p for p in penalties if p <= penalty][::-1]
            new = ahead[: here()[1]]
            self._owners |= {one: rank for rank, one in enumerate(new)}
            self._errors |= dict(zip(new, spread(new, self._tried), strict=True))
        return self._errors[penalty], None

    def _tried(self, penalty: float) -> float:
        solution = self.ridge.solution(self.ridge.solver(penalty), self.mixed.fitted, self.start)
        return self.mixed.held.excess(*solution)

    def _error(self, penalty: float) -> float:
        """As a share of the mean ||y||^2 of the rows held out. A factor kept till now would be as large as the sums."""
        held = self.sums.held
        scale = held.energy / held.count
        error = held.error(*self.ridge.solution(self.ridge.solver(penalty), self.sums.fitted, self.prior))
        return error / scale if scale else 0.0


def for_own_outputs(sums: HeldOutSums, together: Team) -> HeldOutSums:
    """The sums for one process's part of y."""
    return sums if together.world == 1 else sums.of_outputs(together.part(sums.fitted.outputs))


def lowest(attempt: Callable[[float], tuple[float, _T]], values: Sequence[float]) -> tuple[float, _T]:
    """Of values, the first where a function is lowest, and what came with it there."""
    tried = [attempt(value) for value in values]
    place = min(range(len(values)), key=lambda number: tried[number][0])
    return values[place], tried[place][1]


def downhill(attempt: Callable[[float], tuple[float, _T]], values: Sequence[float]) -> tuple[float, _T]:
    """Of values in order, one where a function is lower than at its neighbours, and what came with it there."""
    place = len(values) // 2
    at, found = attempt(values[place])
    for step in (1, -1):
        start = place
        while 0 <= place + step < len(values):
            next_at, next_found = attempt(values[place + step])
            if next_at >= at:
                break
            place, at, found = place + step, next_at, next_found
        if place != start:  # downhill on this side: the other is uphill
            break
    return values[place], found


def mixtures(outputs: int, count: int) -> Tensor | None:
    """Random signs, (outputs, count), scaled so that `count` mixtures have the energy of all outputs in the mean.

    None where outputs are fewer than twice as many: then mixtures spare little.
    """
    if outputs < 2 * count:
        return None
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, (outputs, count), generator=generator, dtype=torch.float32) * 2 - 1
    return signs / count**0.5
