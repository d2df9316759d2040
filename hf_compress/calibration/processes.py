"""Several processes that share one piece of work: each takes its own batches, and all come to the same results.

Work is shared inside `with sharing():` alone, which `compress` opens where torch.distributed has several processes. So
what one of them does by itself, such as a look at its model, waits for nobody. In one process nothing here does
anything.

Before every exchange the processes tell each other whether one has failed. One that leaves the `with` block by an error
takes part in that, so that the others end with an error that names it, and none waits for ever.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial, wraps
from typing import Any, ParamSpec, TypeVar
from zlib import crc32

import torch
import torch.distributed as dist
from torch import Tensor

from hf_compress.calibration.held_out import taker
from hf_compress.calibration.packing import packed, unpacked
from hf_compress.errors import ProcessesError, one_line

P = ParamSpec("P")
T = TypeVar("T")
Item = TypeVar("Item")
Ready = TypeVar("Ready")
_FAILED = -1
_SMALL = 2**18  # entries: tensors with fewer go together, since every exchange has its own delay


def here() -> tuple[int, int]:
    """This process's number, and how many share the work: 0 of 1 outside `sharing`."""
    return (0, 1) if _GROUP is None else (_GROUP.rank, _GROUP.world)


class _Group:
    """The processes that share work, and what they tell each other."""

    def __init__(self) -> None:
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.device = torch.device("cpu")
        if dist.get_backend() == "nccl":
            self.device = torch.device("cuda", torch.cuda.current_device())
        self.whole = True  # whether all exchanges so far have come to their end

    @contextmanager
    def exchange(self) -> Iterator[None]:
        """Nothing but exchanges may stand inside: what fails there fails for good."""
        self.whole = False
        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            gone = f"process {1 - self.rank}" if self.world == 2 else "another process"
            raise ProcessesError(
                f"{gone} of {self.world} has ended, or does not answer process {self.rank}; see its own output "
                f"({one_line(error)})"
            ) from error
        self.whole = True

    def meet(self, what: str, failure: BaseException | None = None) -> None:
        """Wait for the others, and tell them what comes next, or of an error.

        Raises:
            ProcessesError: another process has an error, or something else comes next there.
        """
        codes = torch.zeros(self.world, dtype=torch.int64, device=self.device)
        codes[self.rank] = crc32(what.encode()) if failure is None else _FAILED
        message = ["" if failure is None else one_line(failure)]
        with self.exchange():
            dist.all_reduce(codes)
            found = codes.tolist()
            if _FAILED in found:
                dist.broadcast_object_list(message, found.index(_FAILED), device=self.device)
        if failure is None and _FAILED in found:
            raise ProcessesError(f"process {found.index(_FAILED)} of {self.world} has failed: {message[0]}")
        if failure is None and len(set(found)) > 1:
            raise ProcessesError(
                f"process {self.rank} of {self.world} has come to {what}, and others to something else"
            )

    def all(self, value: Any) -> list[Any]:
        """Small values of all processes."""
        self.meet("values of all")
        values: list[Any] = [None] * self.world
        with self.exchange():
            dist.all_gather_object(values, value)
        return values

    def sum(self, tensor: Tensor) -> None:
        """Sum a tensor up, in its place."""
        own = tensor.detach().to(self.device).contiguous()
        dist.all_reduce(own)
        if own.data_ptr() != tensor.data_ptr():
            tensor.copy_(own)

    def send(self, value: Any, source: int) -> Any:
        """The value of one process, in all: tensors go by themselves, and everything else is pickled."""
        tensors, rest = packed(value) if self.rank == source else ([], b"")
        with self.exchange():
            told = [rest]
            dist.broadcast_object_list(told, source, device=self.device)
            if self.rank != source:
                value, tensors = unpacked(told[0], self.device_like)
            for tensor in tensors:
                self.broadcast(tensor, source)
        return value

    def broadcast(self, tensor: Tensor, source: int) -> None:
        """Give a tensor the values that it has in one process."""
        self.move(tensor, lambda moved: dist.broadcast(moved, source), written=self.rank != source)

    def move(self, tensor: Tensor, exchange: Callable[[Tensor], object], written: bool) -> None:
        """Have an exchange read the bytes of a tensor, of any dtype, or write them."""
        if tensor.numel():
            moved = tensor.detach().contiguous().reshape(-1).view(torch.uint8).to(self.device)
            exchange(moved)
            if written and moved.data_ptr() != tensor.data_ptr():
                tensor.detach().copy_(moved.view(tensor.dtype).view(tensor.shape))

    def device_like(self, kind: str) -> torch.device:
        return torch.device(kind, torch.cuda.current_device()) if kind == "cuda" else torch.device(kind)


_GROUP: _Group | None = None
_OPEN = False  # whether work is shared further up, even if this process works alone at the moment


@contextmanager
def sharing() -> Iterator[None]:
    """Inside, all processes work together, and each has to come to the same exchanges as the others.

    Raises:
        ProcessesError: another process has failed, has ended, or works on something else.
    """
    global _GROUP, _OPEN
    if _OPEN or not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        yield
        return
    group = _Group()
    _GROUP, _OPEN = group, True
    try:
        yield
        group.meet("the end")
    except ProcessesError:
        raise
    except BaseException as error:
        if group.whole:
            _tell(group, error)
        raise
    finally:
        _GROUP, _OPEN = None, False


def _tell(group: _Group, error: BaseException) -> None:
    try:
        group.meet("", error)
    except ProcessesError as gone:  # the others learn of it when this process ends
        error.add_note(str(gone))


@contextmanager
def _alone() -> Iterator[None]:
    """Inside, this process works by itself on something that the others will be given."""
    global _GROUP
    group, _GROUP = _GROUP, None
    try:
        yield
    finally:
        _GROUP = group


def agree(**facts: Callable[[], str]) -> None:
    """Raise ProcessesError, in all processes, where they do not have the same.

    Args:
        facts: what has to be the same, by its name for the message, in which `_` stands for a space.
    """
    if _GROUP is None:
        return
    everything = told({name: fact() for name, fact in facts.items()})
    for name in facts:
        for rank, other in enumerate(everything):
            if other[name] != everything[0][name]:
                raise ProcessesError(
                    f"process {rank} does not have the same {name.replace('_', ' ')} as process 0: call with the same "
                    "model, settings and data in all, each with all of the data, in the same order, on machines that "
                    "are alike"
                )


def own(items: Iterable[Item]) -> list[tuple[int, Item]]:
    """Those of some batches that this process takes, each with the number that it has among them all."""
    rank, world = here()
    return [(number, item) for number, item in enumerate(items) if taker(number, world) == rank]


def summed(tensors: Iterable[Tensor]) -> None:
    """Sum up tensors over all processes, in their places; all have as many, of the same shapes."""
    if _GROUP is None:
        return
    group, small = _GROUP, dict[tuple[torch.dtype, torch.device], list[Tensor]]()
    tensors = list(tensors)
    group.meet(f"sums of {[(tuple(tensor.shape), tensor.dtype) for tensor in tensors]}")
    with group.exchange():
        for tensor in tensors:
            if tensor.numel() < _SMALL:
                small.setdefault((tensor.dtype, tensor.device), []).append(tensor)
            else:
                group.sum(tensor)
        for parts in small.values():
            flat = torch.cat([part.detach().reshape(-1) for part in parts])
            group.sum(flat)
            for part, total in zip(parts, flat.split([part.numel() for part in parts]), strict=True):
                part.detach().copy_(total.view(part.shape))


def given(tensor: Tensor, source: int) -> None:
    """Give a contiguous tensor, in all processes, the values that it has in one; all have it of one shape."""
    if _GROUP is None:
        return
    _GROUP.meet(f"values of {tuple(tensor.shape)} {tensor.dtype} of process {source}")
    with _GROUP.exchange():
        _GROUP.broadcast(tensor, source)


def total(*numbers: float) -> list[float]:
    """Sums of numbers over all processes."""
    if _GROUP is None:
        return list(numbers)
    sums = torch.tensor(numbers, dtype=torch.float64)
    summed([sums])
    return sums.tolist()


def summed_by_name(table: dict[str, Tensor]) -> None:
    """Sum up tensors by their names over all processes; a process need not have them all."""
    if _GROUP is None:
        return
    known: dict[str, tuple[torch.Size, torch.dtype, str]] = {}
    for other in _GROUP.all({name: (value.shape, value.dtype, value.device.type) for name, value in table.items()}):
        known = other | known
    for name, (shape, dtype, kind) in known.items():
        if name not in table:
            table[name] = torch.zeros(shape, dtype=dtype, device=_GROUP.device_like(kind))
    summed(table[name] for name in known)


def from_one(make: Callable[[], T], rank: int = 0) -> T:
    """What one process makes, in all of them: the very same bits. It works alone meanwhile."""
    if _GROUP is None:
        return make()
    made: T | None = None
    if _GROUP.rank == rank:
        with _alone():
            made = make()
    _GROUP.meet(f"what process {rank} makes")
    return _GROUP.send(made, rank)  # type: ignore[no-any-return]


def spread(items: Sequence[Item], make: Callable[[Item], T]) -> Iterator[T]:
    """What is made of each of some items, in their order; each is made by one process, alone, and given to all."""
    return spread_prepared(items, lambda item: item, make)


def spread_prepared(items: Sequence[Item], prepare: Callable[[Item], Ready], make: Callable[[Ready], T]) -> Iterator[T]:
    """The same, but first all processes prepare each item together. Only the one that goes on from there keeps it."""
    rank, world = here()
    for start in range(0, len(items), world):
        turn, kept, made = items[start : start + world], list[Ready](), list[T]()
        for place, item in enumerate(turn):
            ready = prepare(item)
            kept += [ready] if place == rank else []
            del ready
        with _alone():
            if kept:
                made.append(make(kept.pop()))
        for source in range(len(turn)):
            yield from_one(lambda made=made: made[0], source)  # type: ignore[misc]


def by_first(function: Callable[P, T]) -> Callable[P, T]:
    """Of several processes, have the first alone run a function; the others wait for what it returns.

    Where it fails, all of them raise its error.
    """

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        failure = list[Exception]()

        def attempt() -> tuple[T | None, Exception | None]:
            try:
                return function(*args, **kwargs), None
            except Exception as error:
                failure.append(error)
                return None, _tellable(error)

        with sharing():
            if _GROUP is None:
                return function(*args, **kwargs)
            returned, error = from_one(attempt)
        if error is not None:
            raise failure[0] if failure else error
        return returned  # type: ignore[return-value]

    return run


def by_one(held: Callable[P, AbstractContextManager[None]]) -> Callable[P, AbstractContextManager[None]]:
    """Of several processes, have the first alone enter and leave a context; where it cannot, all of them fail."""

    @contextmanager
    def entered(*args: P.args, **kwargs: P.kwargs) -> Iterator[None]:
        with ExitStack() as stack:

            def enter() -> None:
                stack.enter_context(held(*args, **kwargs))

            from_one(enter)
            yield

    return entered


def _tellable(error: Exception) -> Exception:
    """An error as it is, unless other processes cannot be given one of its class."""
    try:
        return pickle.loads(pickle.dumps(error))  # type: ignore[no-any-return]
    except Exception:
        return ProcessesError(f"process 0 has failed: {one_line(error)}")


def take_values_of_first(model: torch.nn.Module) -> None:
    """Give a model, in all processes, the values that it has in the first, as DDP does when a training begins."""
    if _GROUP is None:
        return
    _GROUP.meet("the first one's values")
    with _GROUP.exchange():
        for tensor in [*model.parameters(), *model.buffers()]:
            _GROUP.broadcast(tensor, 0)


def gathered(parts: Mapping[int, T]) -> list[T]:
    """What all processes have of their batches, by the numbers of those, in their order."""
    if _GROUP is None:
        return [parts[number] for number in sorted(parts)]
    everything: dict[int, T] = {}
    for rank in range(_GROUP.world):
        everything |= from_one(lambda: dict(parts), rank)
    return [everything[number] for number in sorted(everything)]


def gathered_at(rank: int, parts: Mapping[int, Tensor]) -> list[Tensor]:
    """The same of tensors for one process alone; nothing in the others."""
    if _GROUP is None:
        return gathered(parts)
    group, everything = _GROUP, dict(parts)
    known = told({number: (part.shape, part.dtype, part.device.type) for number, part in parts.items()})
    with group.exchange():
        for source in (source for source in range(group.world) if source != rank):
            for number, (shape, dtype, kind) in known[source].items():
                if group.rank == source:
                    group.move(parts[number], lambda moved: dist.send(moved, rank), written=False)
                elif group.rank == rank:
                    everything[number] = torch.empty(shape, dtype=dtype, device=group.device_like(kind))
                    group.move(everything[number], partial(dist.recv, src=source), written=True)
    return [everything[number] for number in sorted(everything)] if group.rank == rank else []


def told(value: T) -> list[T]:
    """Small values of all processes."""
    return [value] if _GROUP is None else _GROUP.all(value)


def any_of(flag: bool) -> bool:
    """Whether it is so in any process."""
    return any(told(flag))
