"""Recipe files: a method and its settings, in YAML or JSON."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

_EXPONENT = re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$")


def read_recipe(path: str | Path) -> dict[str, Any]:
    """The settings in a recipe file.

    Raises:
        ValueError: it is no YAML, or no mapping of words.
    """
    try:
        values = parse_yaml(Path(path).read_text(encoding="utf-8"), str(path))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error})") from None
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        found = type(values).__name__ if not isinstance(values, dict) else f"the fields {[*values]}"
        raise ValueError(f"{path}: a recipe is a mapping, 'method' and its fields; got {found}")
    return {name: _numbers(value) for name, value in values.items()}


def parse_yaml(text: str, source: str) -> Any:
    """What `text` holds as YAML; ValueError, naming `source`, where it is none."""
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{source} is not YAML: {error}") from None


def as_number(value: Any) -> Any:
    """A number that YAML takes for a word, such as 1e-5, as Python and JSON write it; anything else as it is."""
    return float(value) if isinstance(value, str) and _EXPONENT.match(value) else value


def _numbers(value: Any) -> Any:
    """The same inside lists and mappings."""
    if isinstance(value, dict):
        return {name: _numbers(entry) for name, entry in value.items()}
    return [_numbers(entry) for entry in value] if isinstance(value, list) else as_number(value)
