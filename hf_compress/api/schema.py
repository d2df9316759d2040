"""The JSON schema of recipes, for editors: made of the same fields that check them."""

from __future__ import annotations

from dataclasses import MISSING, fields
from math import inf
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from hf_compress.api.recipe import SEEDS, CalibrationSource, EvaluationPlan
from hf_compress.checks import ends, kinds
from hf_compress.evaluation.loading import Dtype
from hf_compress.methods.base.settings import config_class, method_names
from hf_compress.report.stages import HEAL
from hf_compress.training.heal_config import HealConfig

DRAFT = "https://json-schema.org/draft/2020-12/schema"
_TYPES = {bool: "boolean", int: "integer", float: "number", str: "string", NoneType: "null"}


def recipe_schema() -> dict[str, Any]:
    """What a recipe may be, as a JSON schema (draft 2020-12)."""
    settings = {name: config_class(name) for name in method_names()} | {HEAL: HealConfig}
    alone = [name for name, cls in settings.items() if _has_defaults(cls)]
    stages = [{"enum": alone}, *(_stage(name, cls) for name, cls in settings.items())]
    calibration = {"anyOf": [{"type": "string"}, _section(CalibrationSource, required=["data"])]}
    properties = {
        "model": {"type": "string", "description": "a folder with a model, or a model's name on the Hub"},
        "stages": {"type": "array", "minItems": 1, "items": {"anyOf": stages}, "description": "in this order"},
        "calibration": calibration,
        "evaluate": _section(EvaluationPlan),
        "output": {"type": "string", "description": "the folder that the smaller model goes to"},
        "dtype": {**_value(Dtype, ""), "default": "auto"},
        "seed": {**_value(int, SEEDS), "default": 0},
        "portable": {"type": "boolean", "default": False, "description": "for trust_remote_code=True"},
    }
    return {"$schema": DRAFT, "title": "hf_compress recipe", **_mapping(properties, ["model", "stages"])}


def _has_defaults(cls: Any) -> bool:
    """Whether the name of a method alone is a stage."""
    try:
        cls()
    except ValueError:
        return False
    return True


def _stage(method: str, cls: Any) -> dict[str, Any]:
    properties = {"method": {"const": method}, **_properties(cls)}
    summary = (cls.__doc__ or "").strip().splitlines()[0]
    return {"description": summary, **_mapping(properties, ["method"])}


def _section(cls: Any, required: list[str] | None = None) -> dict[str, Any]:
    return _mapping(_properties(cls), required or [])


def _mapping(properties: dict[str, Any], required: list[str]) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def _properties(cls: Any) -> dict[str, Any]:
    """The schema of each field of a class of settings."""
    hints, found = get_type_hints(cls), {}
    for field in fields(cls):
        value = _value(hints[field.name], field.metadata.get("within", ""))
        if help_ := field.metadata.get("help"):
            value["description"] = help_
        if field.default is not MISSING:
            value["default"] = [*field.default] if isinstance(field.default, tuple) else field.default
        found[field.name] = value
    return found


def _value(kind: Any, within: str) -> dict[str, Any]:
    """The schema of the values of a kind and within an interval, as `checks.check` takes them."""
    options = [_one(each, within) for each in kinds(kind)]
    return options[0] if len(options) == 1 else {"anyOf": options}


def _one(kind: Any, within: str) -> dict[str, Any]:
    items = get_args(kind)
    if get_origin(kind) is Literal:
        return {"enum": [*items]}
    if items:
        several = {"type": "array", "items": _one(items[0], within), "minItems": 1}
        fixed = get_origin(kind) is tuple and ... not in items
        return several | ({"minItems": len(items), "maxItems": len(items)} if fixed else {})
    return {"type": _TYPES[kind]} | (_limits(within) if kind in (int, float) and within else {})


def _limits(within: str) -> dict[str, float]:
    low, high = ends(within)
    limits = {"minimum" if within[0] == "[" else "exclusiveMinimum": low}
    limits["maximum" if within[-1] == "]" else "exclusiveMaximum"] = high
    return {name: value for name, value in limits.items() if abs(value) < inf}
