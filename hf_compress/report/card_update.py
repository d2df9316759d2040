"""New scores in a card that is there already: its Evaluation section and its metadata's, and nothing else."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any

import yaml
from huggingface_hub import ModelCardData

from hf_compress.evaluation.evaluate import EvaluationResult
from hf_compress.report.card import EVALUATED, NOT_EVALUATED
from hf_compress.report.card_scores import eval_results, evaluation
from hf_compress.report.card_summary import quality_line
from hf_compress.report.markdown import split_card

_TITLE = "## Evaluation"
_BEFORE = ("## How it was made", "## Limitations")  # the sections that follow it in a card of `model_card`
_QUALITY = re.compile(r"^- \*\*Quality:\*\* .*$", re.MULTILINE)
_SCORES = re.compile(r"^model-index:.*\n(?:[ \t-].*\n|[ \t]*\n)*", re.MULTILINE)


def with_scores(
    card: str,
    result: EvaluationResult,
    controls: Mapping[str, EvaluationResult],
    *,
    name: str,
    texts: str | None = None,
) -> str:
    """A card with what was measured in place of what it has told of that before.

    Args:
        card: the text of a README.md, edited perhaps. What stands in its Evaluation section and under `model-index` in
            its metadata is replaced; the rest stays as it is, letter for letter, but for the lines of its summary
            and of its limitations that say what was evaluated.
        result, controls: as for `model_card`.
        name: the model's name in the metadata, where the card has none.
        texts: what the texts of the perplexity are.

    Raises:
        ValueError: its metadata is no YAML.
    """
    metadata, body = split_card(card)
    data = _read(metadata)
    scores = eval_results(result, str(data.get("pipeline_tag") or "text-generation"), texts)
    kept = _SCORES.sub("", metadata)
    own = _model_name(data) or name
    added = ModelCardData(model_name=own, eval_results=scores).to_yaml() + "\n" if scores else ""
    body = _with_section(body, evaluation(result, controls, texts))
    body = _QUALITY.sub(lambda _: quality_line(result, controls), body, count=1)
    return f"---\n{kept}{added}---\n{body.replace(NOT_EVALUATED, EVALUATED)}"


def _read(metadata: str) -> dict[str, Any]:
    try:
        data = yaml.safe_load(metadata) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"the metadata at its beginning cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(data, dict):
        raise ValueError("the metadata at its beginning are no fields with values")
    return data


def _model_name(metadata: dict[str, Any]) -> str | None:
    """The name under which the scores stood before."""
    index = metadata.get("model-index")
    entry = index[0] if isinstance(index, list) and index else None
    return str(entry["name"]) if isinstance(entry, dict) and entry.get("name") else None


def _with_section(body: str, section: str) -> str:
    """The body with its Evaluation section replaced; with a new one where it has none."""
    starts = [*_headings(body), (len(body), "")]
    for (start, heading), (end, _) in pairwise(starts):
        if heading == _TITLE:
            rest = body[end:]
            return body[:start] + section + ("\n\n" + rest if rest else "\n")
    place = next((start for start, heading in starts if heading in _BEFORE), len(body))
    before, after = body[:place].rstrip("\n"), body[place:]
    return f"{before}\n\n{section}\n" + (f"\n{after}" if after else "")


def _headings(body: str) -> Iterator[tuple[int, str]]:
    """Where headings of the first two levels begin, and their lines; not those in blocks of code."""
    fence, at = "", 0
    for line in body.splitlines(keepends=True):
        mark = re.match(r" {0,3}(`{3,}|~{3,})", line)
        if mark and not fence:
            fence = mark[1]
        elif mark and mark[1].startswith(fence) and not line.strip().strip(fence[0]):
            fence = ""
        elif not fence and re.match(r"#{1,2}\s", line):
            yield at, line.strip()
        at += len(line)
