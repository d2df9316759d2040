"""What of each input's energy later inputs cannot make up for: what errors of its weights cost that are compensated."""

from __future__ import annotations

from torch import Tensor

from hf_compress.calibration.processes import here, spread
from hf_compress.calibration.sweep import StreamPair, Streams, advance, turns
from hf_compress.methods.lrp.grams import grams_of, in_parts, sharing
from hf_compress.methods.lrp.linears import Subject
from hf_compress.numerics.aside import Aside
from hf_compress.numerics.factor import Factor


def unexplained(subject: Subject, streams: Streams) -> dict[str, Tensor]:
    """Of the inputs of every linear map, (inputs) by its path, block by block; the streams are kept then.

    There are never more Gram matrices than those of one block. Of several processes each keeps one more of every width.
    """
    stack, journal, world = subject.stack, subject.context.journal, here()[1]
    pairs, found = streams.start(), dict[str, Tensor]()
    for index in turns(stack, range(len(stack)), "weighing inputs"):
        first = index - index % world  # of so many blocks, after which nothing waits to be factorised
        name = f"unexplained inputs of block {first}"
        if index == first:
            known, waiting = journal.has(name), _Waiting(subject.aside)
        if known:
            advance(pairs, index)
        else:
            _take_past(subject, index, pairs, waiting)
        streams.note(index + 1, pairs)
        if index == min(first + world, len(stack)) - 1:
            found |= journal.tensors(name, waiting.finish)
    return found


def _take_past(subject: Subject, index: int, pairs: list[StreamPair], waiting: _Waiting) -> None:
    """Take the streams past a block, and have the Gram matrices of what its linear maps read factorised."""
    parts = list(in_parts(subject.of_block(index)))
    for own in parts:
        grams = grams_of(subject.stack, index, own, pairs, onwards=own is parts[-1])
        for paths in sharing(grams):
            waiting.add(paths, grams[paths[0]])
        del grams
    if not parts:
        advance(pairs, index)


class _Waiting:
    """Gram matrices that wait until there is one of a size for each process: then all factorise at once."""

    def __init__(self, aside: Aside) -> None:
        self._aside, self._found = aside, dict[str, Tensor]()
        self._sizes: dict[int, list[tuple[list[str], Tensor | None]]] = {}

    def add(self, paths: list[str], gram: Tensor) -> None:
        """What the maps of some paths read; it is kept by the process that is to factorise it."""
        rank, world = here()
        alike = self._sizes.setdefault(len(gram), [])
        alike.append((paths, gram if len(alike) == rank else None))
        if len(alike) == world:
            self._factorise(alike)

    def finish(self) -> dict[str, Tensor]:
        """What was found of all paths."""
        for alike in self._sizes.values():
            self._factorise(alike)
        return self._found

    def _factorise(self, alike: list[tuple[list[str], Tensor | None]]) -> None:
        for (paths, _), left in zip(alike, spread([gram for _, gram in alike], _left_by), strict=True):
            self._found |= dict.fromkeys(paths, self._aside.put(left))
        alike.clear()


def _left_by(gram: Tensor | None) -> Tensor:
    assert gram is not None, "the process that keeps it is the one that factorises it"
    return Factor.of(gram).unexplained
