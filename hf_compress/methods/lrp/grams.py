"""What the linear maps of a block read, on the streams of pairs: once for all that read the same."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from hf_compress.anatomy.parts import is_linear, linear_map, linear_widths
from hf_compress.anatomy.stacks import Stack
from hf_compress.anatomy.undo import Undo
from hf_compress.calibration.processes import here, summed, told
from hf_compress.calibration.sweep import StreamPair
from hf_compress.calibration.together import Together
from hf_compress.methods.base.grams import few_at_once
from hf_compress.methods.lrp.scores import watch_rows
from hf_compress.numerics.cholesky import NARROW
from hf_compress.numerics.factor import Factor
from hf_compress.numerics.moments import Moments

_Sums = tuple[dict[str, Moments], dict[str, str]]  # and of each map, the first that is handed its tensor


def in_parts(linears: Mapping[str, nn.Module]) -> Iterator[dict[str, nn.Module]]:
    """Linear maps in parts whose Gram matrices fit into memory together: experts are many."""
    for paths in few_at_once({path: 8 * len(linear_map(module)) ** 2 for path, module in linears.items()}):
        yield {path: linears[path] for path in paths}


def grams_of(
    stack: Stack, index: int, linears: Mapping[str, nn.Module], pairs: list[StreamPair], onwards: bool = False
) -> dict[str, Tensor]:
    """Σ x xᵀ over what each linear map of a block reads at real tokens of all processes, (inputs, inputs).

    Maps that are always handed one tensor, such as queries, keys and values, have one: the same tensor here.

    Args:
        onwards: whether the compressed streams are to be past the block afterwards.
    """
    found = _agreed(_sums_of(stack, index, linears, pairs, onwards, shared=True))
    if found is None:
        found = _agreed(_sums_of(stack, index, linears, pairs, onwards, shared=False))
    assert found is not None, "apart, there is nothing to agree on"
    sums, first = found
    grams = {path: moments.gram for path, moments in sums.items()}
    return {path: grams[first[path]] for path in linears if path in first}  # in one order, whichever of them ran here


def sharing(grams: Mapping[str, Tensor]) -> list[list[str]]:
    """The paths of linear maps, those together that have one Gram matrix."""
    together: dict[int, list[str]] = {}
    for path, gram in grams.items():
        together.setdefault(id(gram), []).append(path)
    return list(together.values())


def factor_if_wide(gram: Tensor) -> Tensor | Factor:
    """The factor of a wide Gram matrix, by all processes together; a narrow one as it is, for the one that solves."""
    return Factor.of(gram, Together()) if len(gram) > NARROW else gram


def factor_of(known: Tensor | Factor) -> Factor:
    """The factor of a Gram matrix, if it is not one already."""
    return known if isinstance(known, Factor) else Factor.of(known)


def _sums_of(
    stack: Stack, index: int, linears: Mapping[str, nn.Module], pairs: list[StreamPair], onwards: bool, shared: bool
) -> _Sums | None:
    """The sums of this process; None where maps that were to share their sums are handed different tensors.

    If these are all maps of the block, all run once, and the streams stay where they are, nobody asks what the last map
    gives: from the second batch on it gives zeros.
    """
    sums: dict[str, Moments] = {}
    after: list[Tensor] = []
    seen, last = _Shared(), _Last(linears)
    whole = set(linears.values()) >= {part for part in stack.blocks[index].modules() if is_linear(part)}

    def add(path: str, rows: Tensor) -> None:
        if path not in sums:
            dtype = torch.promote_types(rows.dtype, torch.float32)  # enough for systems damped by a hundredth
            sums[path] = Moments(rows.shape[1], rows.device, dtype)
        sums[path].add(rows)

    def is_new(path: str, given: Tensor) -> bool:
        last.comes(path)
        return seen.is_new(path, given)

    try:
        for pair in pairs:
            with last.left_out(), watch_rows(stack, pair.runner.batch, linears, add, is_new if shared else None):
                output = pair.runner.run(index, pair.compressed)
            if onwards:
                after.append(pair.keep(output))
            elif shared and whole:
                last.find()
        first = seen.checked() if shared else {path: path for path in sums}
    except _ReadApart:
        return None
    for pair, output in zip(pairs, after, strict=False):
        pair.compressed = output
    return sums, first


def _agreed(found: _Sums | None) -> _Sums | None:
    """The sums of all processes; None where maps share their sums in some and not in others."""
    if here()[1] == 1:
        return found
    sums, first = found or ({}, {})
    shapes = {path: (one.inputs, one.dtype, one.device.type) for path, one in sums.items()}
    everywhere = told((found is not None, first, shapes))
    for alike, other, known in everywhere:
        if not alike or any(first.setdefault(path, one) != one for path, one in other.items()):
            return None
        for path, shape in known.items():
            if path not in sums:
                sums[path] = Moments(shape[0], shape[2], shape[1])
    for path in sorted(sums):
        sums[path].reduce(summed)
    return sums, first


class _ReadApart(Exception):
    """Maps that were handed one tensor once are not always, or do not run in one order."""


class _Last:
    """The linear map that runs last.

    Args:
        linears: those that are looked at.
    """

    def __init__(self, linears: Mapping[str, nn.Module]) -> None:
        self._linears = linears
        self._calls: list[str] = []  # on the batch that runs
        self._path: str | None = None

    def comes(self, path: str) -> None:
        """A map is about to run; raises _ReadApart if that is after the one that was to be the last."""
        if self._path is not None and self._path in self._calls:
            raise _ReadApart
        self._calls.append(path)

    def find(self) -> None:
        """After a batch: it is known, if all maps ran once."""
        if sorted(self._calls) == sorted(self._linears):
            self._path = self._calls[-1]

    @contextmanager
    def left_out(self) -> Iterator[None]:
        """A batch runs; the last map gives zeros, if it is known."""
        self._calls.clear()
        with Undo() as undo:
            if self._path is not None:
                module = self._linears[self._path]
                outputs = linear_widths(module)[1]
                undo.set(module, "forward", lambda given: given.new_zeros(*given.shape[:-1], outputs))
            yield


class _Shared:
    """Which maps are handed the very same tensors, found as they run.

    Attributes:
        first: of each map, the first that was handed its tensor.
    """

    def __init__(self) -> None:
        self.first: dict[str, str] = {}
        self._calls: dict[str, int] = {}
        self._last: tuple[str, Tensor] | None = None  # held, so that no other tensor gets its place

    def is_new(self, path: str, given: Tensor) -> bool:
        """Whether no other map has been handed this tensor before; raises _ReadApart if that is otherwise than once."""
        if self._last is None or self._last[1] is not given:
            self._last = (path, given)
        first = self._last[0]
        if self.first.setdefault(path, first) != first:
            raise _ReadApart
        self._calls[path] = self._calls.get(path, 0) + 1
        return first == path

    def checked(self) -> dict[str, str]:
        """`first`; raises _ReadApart where a map did not run as often as the one it shares with."""
        self._last = None
        if any(self._calls[path] != self._calls[first] for path, first in self.first.items()):
            raise _ReadApart
        return self.first
