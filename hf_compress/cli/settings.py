"""A method's settings from a recipe and from the command line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

if TYPE_CHECKING:
    from hf_compress.methods.base.settings import CompressionConfig


def config_from(
    method: str | None,
    recipe: Path | None = None,
    ratio: float | None = None,
    num: int | None = None,
    settings: Sequence[str] = (),
    seed: int | None = None,
) -> CompressionConfig:
    """The config that a recipe and options describe; the options win.

    Args:
        method: name of the method; the recipe's, or else "mka", when None.
        recipe: YAML or JSON file with `method` and the config's own fields.
        ratio: the config's `ratio`.
        num: the config's `num_…`, which stands in place of a ratio.
        settings: `field=value`, the value as in YAML.
        seed: the config's `seed`, where it has one.

    Raises:
        ValueError: an unknown method, a value that the config refuses, a recipe that is no mapping.
        TypeError: an unknown field.
        FileNotFoundError: no such recipe.
    """
    from hf_compress.methods.base.recipes import read_recipe
    from hf_compress.methods.base.settings import CompressionConfig, config_class

    values = read_recipe(recipe) if recipe else {}
    method = method or values.pop("method", None) or "mka"
    values.pop("method", None)
    cls = config_class(method)
    method = cls.method
    names = [field.name for field in fields(cls)]
    given = _listed(cls, dict(_setting(text) for text in settings))
    if ratio is not None:
        given["ratio"] = ratio
    if num is not None:
        given[_num_field(method, names)] = num
    if seed is not None and "seed" in names:
        given.setdefault("seed", seed)
    cls.check_names([*values, *given])
    groups = {field.name: field.metadata["group"] for field in fields(cls) if "group" in field.metadata}
    replaced = {groups[name] for name in given if name in groups}  # by what the command line says instead
    values = {name: value for name, value in values.items() if groups.get(name) not in replaced} | given
    return CompressionConfig.from_dict({"method": method, **values})


def _setting(text: str) -> tuple[str, Any]:
    from hf_compress.methods.base.recipes import as_number, parse_yaml

    name, equals, value = text.partition("=")
    if not equals or not name.strip():
        raise ValueError(f"--set takes field=value; got {text!r}")
    return name.strip(), as_number(parse_yaml(value, f"--set {text}"))


def _listed(cls: type[CompressionConfig], given: dict[str, Any]) -> dict[str, Any]:
    """Settings of several values as lists, from what has commas between: `layers=2,5`, or `layers=2`."""
    from hf_compress.checks import takes_several
    from hf_compress.methods.base.recipes import as_number, parse_yaml

    kinds = get_type_hints(cls)
    listed = {}
    for name, value in given.items():
        if name in kinds and takes_several(kinds[name]) and isinstance(value, str | int | float):
            listed[name] = [as_number(parse_yaml(part, name)) for part in str(value).split(",")]
    return given | listed


def _num_field(method: str, names: list[str]) -> str:
    """The field that says how many blocks, layers or the like."""
    found = [name for name in names if name.startswith("num_")]
    if len(found) != 1:
        raise ValueError(f"{method} has {'several' if found else 'no'} settings num_…: use --set field=value instead")
    return found[0]
