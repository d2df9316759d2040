"""A plan's edits in words, for the model card."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from hf_compress.errors import PlanError
from hf_compress.plan.edits import runs
from hf_compress.report.markdown import escape, in_words, table
from hf_compress.report.report import REPORT_FILE
from hf_compress.rewrite.edits import edit_from_dict

MOST_ROWS = 24  # of the table; the report beside the card has every edit

_MODULE = re.compile(r"([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*)\.(\d{1,6})((?:\.\w+)*)", re.ASCII)  # a path with a block in it


def edits_table(edits: Sequence[Mapping[str, Any]]) -> str:
    """A table of what was changed, from the edits as a report has them; kinds that are not known here, too."""
    rows = in_rows(edits)
    text = table(["edit", "where", "what"], [[escape(cell) for cell in row] for row in rows[:MOST_ROWS]])
    if more := rows[MOST_ROWS:]:
        text += f"\n\nAnd {len(more):,} more lines; {REPORT_FILE} has every one of the {len(edits):,} edits."
    return text


def in_rows(edits: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, str]]:
    """Kind, place and effect of edits, as a report has them; those that differ by their block alone are one row."""
    groups: dict[tuple[str, str, str, str], list[int]] = {}
    for edit in edits:
        kind, where, what = str(edit.get("edit")), _where(edit), _what(edit)
        path = _MODULE.fullmatch(where)
        before, block, after = path.groups() if path else (where, None, "")
        groups.setdefault((kind, what, before, after), []).extend([] if block is None else [int(block)])
    return [
        (kind, f"{before}.{', '.join(runs(sorted(set(blocks))))}{after}" if blocks else before, what)
        for (kind, what, before, after), blocks in groups.items()
    ]


def _where(edit: Mapping[str, Any]) -> str:
    """The stack or the module that an edit changes: of several, the first that it names by itself."""
    paths = (value for value in edit.values() if _is_module(value))
    return str(edit["stack"]) if "stack" in edit else next(paths, "")


def _what(edit: Mapping[str, Any]) -> str:
    """What an edit does; of one that is not known here, its fields but for the modules' paths."""
    with suppress(PlanError):
        return edit_from_dict(edit).describe()
    return ", ".join(
        f"{key}: {in_words(value)}"
        for key, value in edit.items()
        if key not in ("edit", "stack") and not _is_module(value) and not _are_modules(value)
    )


def _is_module(value: Any) -> bool:
    return isinstance(value, str) and _MODULE.fullmatch(value) is not None


def _are_modules(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and bool(value) and all(map(_is_module, value))
