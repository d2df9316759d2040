"""A name -> function table that refuses to overwrite an entry and names its entries when asked for one it lacks."""

from collections.abc import Callable, Iterator, Mapping
from typing import TypeVar

T = TypeVar("T")


class Registry(Mapping[str, T]):
    """Read-only mapping from names to entries of one kind, filled by the `register` decorator.

    Args:
        kind: what the entries are, in words; it appears in the error messages ("similarity", "manifold").
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._entries: dict[str, T] = {}

    def __getitem__(self, name: str) -> T:
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator that files its target under `name`. Raises ValueError when the name is already taken."""

        def file(entry: T) -> T:
            if name in self._entries:
                raise ValueError(
                    f"{self.kind} {name!r} is already registered as {self._entries[name]!r}; choose another name"
                )
            self._entries[name] = entry
            return entry

        return file

    def resolve(self, name: str) -> T:
        """The entry under `name`. Raises ValueError, listing the known names, when there is none."""
        if not isinstance(name, str) or name not in self._entries:
            known = ", ".join(repr(known) for known in sorted(self._entries))
            raise ValueError(f"unknown {self.kind} {name!r}; expected one of {known}")
        return self._entries[name]
