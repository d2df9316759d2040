"""Edits of modules, a file for each kind of part, and edits read from files.

Whoever reads one reads it here: then every kind is known. A new one is one class, in a file that is imported here.
"""

from __future__ import annotations

import json
from typing import Any

from hf_compress.errors import PlanError
from hf_compress.plan.edits import EDITS, Edit, short
from hf_compress.plan.plan import PLAN_VERSION, Plan
from hf_compress.rewrite.edits import attention, bottleneck, experts, ffn, packed, sealed  # noqa: F401

_MAX_EDITS = 100_000  # no model has as many modules; a longer list is an attack or an accident


def edit_from_dict(values: Any) -> Edit:
    """The inverse of `Edit.to_dict`.

    Raises:
        PlanError: an unknown edit, or missing, unknown or wrong fields.
    """
    if not isinstance(values, dict) or not isinstance(values.get("edit"), str) or values["edit"] not in EDITS:
        raise PlanError(f"unknown edit in the plan: {short(values)}; known are {', '.join(EDITS)}: upgrade hf-compress")
    given = {key: value for key, value in values.items() if key != "edit"}
    edit: Any = EDITS[values["edit"]]
    try:
        return edit(**given)
    except TypeError as error:
        raise PlanError(
            f"edit {values['edit']} has the wrong fields {short(sorted(map(str, given)))}: {str(error)[:200]}"
        ) from None


def edits_from_list(version: Any, edits: Any) -> tuple[Edit, ...]:
    """Edits from the JSON values of a plan of some version.

    Raises:
        PlanError: as `plan_from_json`.
    """
    if type(version) is not int or version != PLAN_VERSION:
        raise PlanError(f"this plan has version {str(version)[:100]}, known is {PLAN_VERSION}: upgrade hf-compress")
    if not isinstance(edits, list) or len(edits) > _MAX_EDITS:
        raise PlanError(f"a plan is a list of at most {_MAX_EDITS} edits; got {type(edits).__name__}")
    return tuple(edit_from_dict(values) for values in edits)


def plan_from_json(text: str) -> Plan:
    """The plan whose `to_json` gave `text`, without its tensors.

    Raises:
        PlanError: not a plan, a newer version, an unknown edit, or an edit with missing or wrong fields.
    """
    try:
        data = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise PlanError(f"a plan is JSON: {error}") from None
    if not isinstance(data, dict) or "edits" not in data:
        raise PlanError("a plan is a JSON object with the keys 'version' and 'edits'")
    return Plan(edits_from_list(data.get("version"), data["edits"]))
