"""Checks of single settings, each of which names the value and the expectation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def check_ratio(name: str, value: float | None) -> None:
    """Raise unless `value` is None or strictly between 0 and 1."""
    if value is not None and not (is_number(value) and 0 < value < 1):
        raise ValueError(f"{name} must lie strictly between 0 and 1 (a fraction of the blocks); got {value!r}")


def check_choice(name: str, value: str, choices: list[str] | tuple[str, ...]) -> None:
    """Raise unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(sorted(choices))}; got {value!r}")


def check_at_least(name: str, value: int | float | None, least: int | float) -> None:
    """Raise unless `value` is None or a number not below `least`; a whole one where `least` is."""
    whole = isinstance(least, int)
    if value is not None and not (is_number(value) and value >= least and (isinstance(value, int) or not whole)):
        raise ValueError(f"{name} must be a {'whole ' * whole}number of at least {least}; got {value!r}")


def check_positive(name: str, value: float) -> None:
    """Raise unless `value` is a number above 0."""
    if not (is_number(value) and value > 0):
        raise ValueError(f"{name} must be a number above 0; got {value!r}")


def check_not_negative(name: str, value: float) -> None:
    """Raise unless `value` is a number, and not below 0."""
    if not (is_number(value) and value >= 0):
        raise ValueError(f"{name} must be a number of at least 0; got {value!r}")


def check_share(name: str, value: float) -> None:
    """Raise unless `value` is a number from 0 to 1, both included."""
    if not (is_number(value) and 0 <= value <= 1):
        raise ValueError(f"{name} must lie between 0 and 1; got {value!r}")


def check_kind(name: str, value: Any, annotation: str) -> None:
    """Raise where a value is none of the kinds that an annotation names, as "no", which is true, for a bool."""
    kinds = [_KINDS.get(kind) for kind in annotation.split(" | ")]
    if None not in kinds and not any(check(value) for check in kinds if check is not None):
        raise ValueError(f"{name} must be {annotation.replace(' | ', ' or ')}; got {value!r}")


def is_number(value: Any) -> bool:
    """Whether `value` is an int or a float, and no bool."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


_KINDS: dict[str, Callable[[Any], bool]] = {
    "bool": lambda value: isinstance(value, bool),
    "float": is_number,
    "int": lambda value: isinstance(value, int) and is_number(value),
    "None": lambda value: value is None,
    "str": lambda value: isinstance(value, str),
}
