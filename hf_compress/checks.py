"""Checks of settings and arguments: an annotation and an interval say what a value may be, and so does the error."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set
from dataclasses import field, fields
from difflib import get_close_matches
from math import inf
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")
_NOUNS = {bool: "True or False", float: "a number", int: "a whole number", str: "a string"}


def setting(default: T, help: str = "", within: str = "", **metadata: Any) -> T:
    """A field of a class of settings, which `check_fields` checks.

    Args:
        default: its value when not given.
        help: what it means, for the command line and for errors.
        within: where its numbers lie, as in "(0, 1]" or "[1, inf)".
        metadata: `group`: of the fields of a group, one at most may be given.
    """
    return field(default=default, metadata={"help": help, "within": within, **metadata})  # type: ignore[return-value]


def check_fields(settings: Any) -> None:
    """Check every field of a dataclass by its annotation and metadata. Lists become tuples.

    Raises:
        ValueError: a field is of another kind, no such choice, or outside its interval; two of a group are given.
    """
    groups: dict[str, dict[str, Any]] = {}
    kinds = get_type_hints(type(settings))
    for one in fields(settings):
        given, more = getattr(settings, one.name), one.metadata
        value = check(one.name, given, kinds[one.name], more.get("within", ""), more.get("help", ""))
        if value is not given:
            object.__setattr__(settings, one.name, value)  # which may be frozen
        if value is not None and "group" in more:
            groups.setdefault(more["group"], {})[one.name] = value
    for group in groups.values():
        if len(group) > 1:
            told = " and ".join(f"{name}={value!r}" for name, value in group.items())
            raise ValueError(f"give {'= or '.join(group)}=, only one of them; got {told}")


def check_names(what: str, given: Iterable[str], known: Iterable[str], hints: Mapping[str, str] | None = None) -> None:
    """Raise TypeError for a name that is not known; it says which may be meant, unless `hints` say better."""
    known = list(known)
    for name in given:
        if name not in known:
            close = get_close_matches(str(name), known, n=1)
            hint = (hints or {}).get(name) or (f"did you mean {close[0]!r}?" if close else "")
            told = f" ({hint})" if hint else ""
            raise TypeError(f"{what} has no setting {name!r}{told}; it has {', '.join(known)}")


def check(name: str, value: Any, kind: Any, within: str = "", help: str = "") -> Any:
    """`value`, where it is of a kind and its numbers lie within an interval; a list as a tuple.

    Args:
        name: what the error calls it.
        value: what was given.
        kind: a type of settings: bool, int, float (which a whole number is, too), str, None, a Literal of strings, a
            tuple or Sequence of these, which is not empty, or a union.
        within: as in "(0, 1]"; everywhere when empty.
        help: what it means, for the error.

    Raises:
        ValueError: it is not.
    """
    listed = takes_several(kind) and isinstance(value, Iterable) and not isinstance(value, (str, bytes, Mapping, Set))
    found = tuple(value) if listed else value
    if not any(_fits(found, one, within) for one in kinds(kind)):
        told = f" ({help})" if help else ""
        raise ValueError(f"{name} must be {expected(kind, within)}{told}; got {value!r}")
    return found


def takes_several(kind: Any) -> bool:
    """Whether values of a kind may be several of something."""
    return any(get_origin(one) not in (None, Literal) for one in kinds(kind))


def expected(kind: Any, within: str = "") -> str:
    """In words, what values are of a kind and lie within an interval, as for `check`."""
    return " or ".join(_phrase(one, within) for one in kinds(kind) if one is not NoneType)


def _phrase(kind: Any, within: str) -> str:
    items = get_args(kind)
    if get_origin(kind) is Literal:
        return f"one of {', '.join(items)}"
    if items:
        return f"{_length(kind) or 'one or more'} {_NOUNS[items[0]].removeprefix('a ')}s{_range(within)}"
    return _NOUNS.get(kind, kind.__name__) + (_range(within) if kind in (int, float) else "")


def _range(within: str) -> str:
    if not within:
        return ""
    low, high = ends(within)
    if high < inf:
        return f" in {within}" if low > -inf else f" {'of at most' if within[-1] == ']' else 'below'} {high:g}"
    return f" {'of at least' if within[0] == '[' else 'above'} {low:g}" if low > -inf else " that are finite"


def _fits(value: Any, kind: Any, within: str) -> bool:
    if kind in (int, float):
        return is_number(value) and isinstance(value, (int, kind)) and (not within or _inside(value, within))
    if get_origin(kind) is Literal:
        return isinstance(value, str) and value in get_args(kind)
    if items := get_args(kind):
        fits = isinstance(value, tuple) and all(_fits(item, items[0], within) for item in value)
        return fits and len(value) == (_length(kind) or max(1, len(value)))
    return isinstance(value, kind)


def _length(kind: Any) -> int | None:
    """How many items a tuple has; None for any number of them."""
    items = get_args(kind)
    return None if get_origin(kind) is not tuple or ... in items else len(items)


def _inside(value: float, within: str) -> bool:
    low, high = ends(within)
    return (low < value or (within[0] == "[" and value == low)) and (
        value < high or (within[-1] == "]" and value == high)
    )


def ends(within: str) -> tuple[float, float]:
    """The two ends of an interval."""
    low, high = within[1:-1].split(",")
    return float(low), float(high)


def kinds(kind: Any) -> tuple[Any, ...]:
    """The kinds that a union is of, or the one."""
    return get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)


def is_number(value: Any) -> bool:
    """Whether `value` is an int or a float, and no bool."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)
