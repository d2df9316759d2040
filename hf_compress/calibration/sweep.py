"""Calibration batches on their way up a stack, one block after another: all of them past one block, then the next.

So a block is in memory while it is its turn, and is read once however many batches there are. Of each batch one stream
is kept, or two where the original model's and the compressed one's go up side by side.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace

from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_compress.anatomy.residency import resident
from hf_compress.anatomy.stacks import Stack
from hf_compress.calibration.data import Batch, Calibration
from hf_compress.calibration.marks import Marks
from hf_compress.calibration.memory import WorkingMemory, working_memory
from hf_compress.calibration.processes import own
from hf_compress.calibration.progress import bar
from hf_compress.calibration.runner import BlockRunner, stopped_by_errors
from hf_compress.modules.compact import ROOM, kept_dense
from hf_compress.numerics.aside import give_back


def turns(
    stack: Stack,
    blocks: Iterable[int],
    description: str,
    hold: Callable[[nn.Module], AbstractContextManager[None]] = resident,
) -> Iterator[int]:
    """Blocks of a stack, each held in memory while it is its turn; by `hold`, where they are to be changed.

    What was freed meanwhile goes back to the system: elsewhere its peak would grow with every block.
    """
    for index in bar(list(blocks), description):
        with hold(stack.blocks[index]):
            yield index
        give_back()


@contextmanager
def resident_around(model: PreTrainedModel, stack: Stack) -> Iterator[None]:
    """Inside, what is not in the stack is in memory: embeddings, the head, the other side of an encoder-decoder."""
    names = stack.path.split(".")
    above = [model.get_submodule(".".join(names[:end])) for end in range(len(names))]
    with ExitStack() as held:
        for part in [child for module in above for child in module.children()]:
            if part not in above and part is not stack.blocks:
                held.enter_context(resident(part))
        yield


@dataclass
class Passed:
    """What a block made of the stream of a batch, both (samples, positions, width).

    Attributes:
        number: of the batch, among those of all processes.
    """

    number: int
    batch: Batch
    before: Tensor
    after: Tensor


def _of_own(model: PreTrainedModel, stack: Stack, batches: Iterable[Batch]) -> tuple[list[int], list[BlockRunner]]:
    """The batches that this process takes: their numbers among all, and what runs blocks on them."""
    mine = own(batches)
    return [number for number, _ in mine], [BlockRunner(model, stack, batch) for _, batch in mine]


class Sweep:
    """Batches on their way up through a model as it is, each block seen once; of several processes each has its own.

    for index in sweep.blocks("reading activations"):
        for passed in sweep.past(index):
            ...
    """

    def __init__(
        self, model: PreTrainedModel, stack: Stack, batches: Iterable[Batch], marks: Marks | None = None
    ) -> None:
        self.stack, self.memory, self.marks = stack, working_memory(), marks
        self.numbers, self.runners = _of_own(model, stack, batches)
        self._streams: list[Tensor] = []
        self._next = 0

    def blocks(self, description: str, end: int | None = None) -> Iterator[int]:
        """The blocks from the first to that before `end`, or the last; batches go past those that nobody looks at.

        With marks, it is from where they are, when this is done again.
        """
        self._streams = [self._first(place) for place in range(len(self.runners))]
        start, end = 0 if self.marks is None else self.marks.start, len(self.stack) if end is None else end
        for index in turns(self.stack, range(start, end), description):
            self._next = index
            yield index
            if self._next == index:
                for _ in self.past(index):
                    pass

    def _first(self, place: int) -> Tensor:
        """The stream of a batch before the block that comes first."""
        marked = None if self.marks is None else self.marks.at_start(place)
        return self.memory.keep(place, self.runners[place].start()) if marked is None else marked

    def past(
        self, index: int, watching: Callable[[Batch], AbstractContextManager[None]] | None = None
    ) -> Iterator[Passed]:
        """Take all batches past a block; what it made of each. While it runs, `watching(batch)` is entered."""
        for place, (runner, before) in enumerate(zip(self.runners, self._streams, strict=True)):
            if self.marks is not None:
                self.marks.keep(index, len(self.stack), place, len(self.runners), before)
            with nullcontext() if watching is None else watching(runner.batch):
                after = runner.run(index, before)
            yield Passed(self.numbers[place], runner.batch, before, after)
            self._streams[place] = self.memory.keep(place, after)
        self._next = index + 1

    def merged(self, index: int) -> None:
        """A block has become one with that behind it, which is out of the stack."""
        for runner in self.runners:
            runner.lose(index + 1)
        if self.marks is not None:
            self.marks.changed(index, len(self.runners))


class Streams:
    """Batches that went up through a model, and their streams at all blocks: in files, for those are many.

    Of several processes each has its own batches.

    Attributes:
        numbers: of the batches, among those of all processes.
        runners: of the batches.
        streams: of each batch, before every block and behind the last, of the model as it was kept last.
        skipped: the blocks that it was kept without.
    """

    def __init__(self, model: PreTrainedModel, stack: Stack, batches: Iterable[Batch]) -> None:
        self.model, self.stack, self.memory = model, stack, replace(working_memory(), streams=0)
        self.numbers, self.runners = _of_own(model, stack, batches)
        self.streams: list[dict[int, Tensor]] = []
        self.skipped: Collection[int] = ()

    def keep(self) -> None:
        """Keep the streams of the model as it is. The first time, with nothing changed."""
        with stopped_by_errors(self.runners):
            self.streams = [{0: self.memory.keep(number, r.start())} for number, r in enumerate(self.runners)]
            self.go_on(0, ())

    def start(self) -> list[StreamPair]:
        """Begin to keep them: these pairs are to be taken past every block, and noted at the next one each time."""
        with stopped_by_errors(self.runners):
            pairs = _pairs(self.numbers, self.runners, self.memory)
        self.streams = [{0: pair.compressed} for pair in pairs]
        return pairs

    def note(self, index: int, pairs: list[StreamPair]) -> None:
        """Keep the streams that pairs have at a block."""
        for streams, pair in zip(self.streams, pairs, strict=True):
            streams[index] = pair.compressed

    def go_on(self, start: int, skipped: Collection[int]) -> None:
        """Keep the streams behind block `start` on, which has changed, without the blocks `skipped`."""
        self.skipped = skipped
        for index in turns(self.stack, range(start, len(self.stack)), "reading streams"):
            for number, (runner, streams) in enumerate(zip(self.runners, self.streams, strict=True)):
                after = streams[index] if index in skipped else runner.run(index, streams[index])
                streams[index + 1] = after if index in skipped else self.memory.keep(number, after)

    def of(self, batch: Batch) -> tuple[BlockRunner, dict[int, Tensor]] | None:
        """What runs blocks on a batch, and its streams before every block and behind the last; None of another."""
        for runner, streams in zip(self.runners, self.streams, strict=False):  # none are kept as yet, or all
            if runner.batch is batch:
                return runner, streams
        return None

    def at(self, index: int) -> list[Tensor]:
        """The streams before a block, one a batch."""
        return [streams[index] for streams in self.streams]

    def run(self, index: int) -> list[Tensor]:
        """What a block, which may have changed since, makes of the streams before it."""
        return [runner.run(index, stream) for runner, stream in zip(self.runners, self.at(index), strict=True)]


@dataclass
class StreamPair:
    """A batch, and the streams (samples, positions, width) that two models have at some block of it.

    Attributes:
        number: of the batch, among those of all processes.
        runner: runs blocks on streams of this batch.
        original: the stream of the model as it was given.
        compressed: the stream of the model with the blocks so far changed; the same tensor while nothing is changed.
    """

    number: int
    runner: BlockRunner
    original: Tensor
    compressed: Tensor
    place: int = 0
    memory: WorkingMemory = field(default_factory=working_memory)

    def keep(self, stream: Tensor) -> Tensor:
        """A stream of the batch, in a file where it would take too much memory."""
        return self.memory.keep(self.place, stream)

    def take_original(self, index: int) -> Tensor:
        """Take the original stream past a block; what it was before."""
        before = self.original
        self.original = self.keep(self.runner.run(index, before))
        return before

    def take_compressed(self, index: int) -> None:
        """Take the compressed stream past a block."""
        self.compressed = self.keep(self.runner.run(index, self.compressed))

    def take_both(self, index: int) -> None:
        """Take both past a block that is the same in both models."""
        same = self.compressed is self.original
        self.take_original(index)
        if same:
            self.compressed = self.original
        else:
            self.take_compressed(index)


def start_pairs(model: PreTrainedModel, stack: Stack, calibration: Calibration, tokens: int) -> list[StreamPair]:
    """Before the first block, as many batches as hold about `tokens` tokens, spread over the data, at least four.

    Of several processes each has its own.
    """
    batches = calibration.about(tokens, calibration.tokens, least=4)
    return _pairs(*_of_own(model, stack, batches), working_memory())


def _pairs(numbers: list[int], runners: list[BlockRunner], memory: WorkingMemory) -> list[StreamPair]:
    """The streams of batches before the first block."""
    pairs = []
    for place, (number, runner) in enumerate(zip(numbers, runners, strict=True)):
        stream = memory.keep(place, runner.start())
        pairs.append(StreamPair(number, runner, stream, stream, place, memory))
    return pairs


def advance(pairs: list[StreamPair], index: int) -> None:
    """Take the compressed stream past a block."""
    if not pairs:
        return
    room = min(ROOM, pairs[0].memory.streams)
    with kept_dense(pairs[0].runner.stack.blocks[index], room):
        for pair in pairs:
            pair.take_compressed(index)
