"""Scores of a comparison in the cards of the compressed models that are part of it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from hf_compress.evaluation.comparison import Comparison
from hf_compress.evaluation.evaluate import EvaluationResult, load_on
from hf_compress.report.card import model_card
from hf_compress.report.card_facts import CardDetails
from hf_compress.report.card_scores import UNCOMPRESSED
from hf_compress.report.card_update import with_scores
from hf_compress.report.history import read_report
from hf_compress.storage.manifest import CARD_FILE


def write_scores(comparison: Comparison, folders: Mapping[str, Path], texts: str | None = None) -> list[Path]:
    """Put what was measured into the cards of compressed models, beside the other models of the comparison.

    What people have edited in a card stays, but for its Evaluation section and what its metadata tell of scores. A card
    is no part of the manifest, so the folder verifies as before.

    Args:
        comparison: of the models.
        folders: by name in the comparison, the directory of each model whose card is written; each with a compression
            report.
        texts: what the texts of the perplexity are.

    Returns:
        The cards.

    Raises:
        ValueError: a card's metadata, or a report, cannot be read. No card is written then.
    """
    cards = {folder / CARD_FILE: _card(comparison, name, folder, texts) for name, folder in folders.items()}
    for path, card in cards.items():
        _replace(path, card)
    return list(cards)


def texts_told(source: str | None, limit: int | None) -> str | None:
    """What a card says of texts that came by name."""
    if source is None:
        return None
    return f"{'' if limit is None else f'the first {limit} texts of '}{Path(source).name}"


def _card(comparison: Comparison, name: str, folder: Path, texts: str | None) -> str:
    result, path = comparison.results[name], folder / CARD_FILE
    controls = _controls(comparison, name, folder)
    if not path.is_file():
        tokenizer = (folder / "tokenizer_config.json").is_file()
        details = CardDetails(name=folder.resolve().name, evaluation=texts, tokenizer=tokenizer)
        return str(model_card(load_on(str(folder)), result=result, controls=controls, details=details))
    try:
        return with_scores(path.read_text(encoding="utf-8"), result, controls, name=folder.resolve().name, texts=texts)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _controls(comparison: Comparison, name: str, folder: Path) -> dict[str, EvaluationResult]:
    """The other models: the first as the uncompressed one, if it is as large as that was, and all others by name."""
    report = read_report(folder)
    first = comparison.results[comparison.reference]
    is_base = report is not None and report.before.parameters == first.parameters
    return {
        UNCOMPRESSED if is_base and other == comparison.reference else other: result
        for other, result in comparison.results.items()
        if other != name
    }


def _replace(path: Path, text: str) -> None:
    """Write a file in one step, so that a crash leaves the old one or the new."""
    beside = path.with_name(f".{path.name}.new")
    beside.write_text(text, encoding="utf-8")
    if path.exists():
        beside.chmod(path.stat().st_mode)
    os.replace(beside, path)
