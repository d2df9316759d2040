"""What is known of the model that a compressed one was made from: its name on the Hub, and what its own card says.

The card is the README.md beside the files that the base model was loaded from: in its folder, or in the local cache of
the Hub. Nothing is downloaded, and nothing in it is trusted: what is no id, code or link of the kind is passed over.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub.constants import REPOCARD_NAME

from hf_compress.report.history import beside, read_report
from hf_compress.report.markdown import split_card

logger = logging.getLogger(__name__)

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_IN_HUB_CACHE = re.compile(r"models--(?:([\w.-]+?)--)?([\w.-]+)[/\\]snapshots", re.ASCII)
_CODE = re.compile(r"[A-Za-z0-9][\w.+ -]{0,95}", re.ASCII)  # a licence's id or name, a language's code
_LINK = re.compile(r"https://[\w./%?=&#~+-]{1,400}", re.ASCII)
_LARGEST = 2**20  # characters of a card that are read


@dataclass(frozen=True)
class BaseCard:
    """What a base model's own card says in its metadata.

    Attributes:
        base_models: what the base model itself was made from, ids on the Hub.
        license, license_name, license_link: the licence's id; its name and its text where the id is "other".
        language: codes.
        datasets: ids on the Hub.
    """

    base_models: tuple[str, ...] = ()
    license: str | None = None
    license_name: str | None = None
    license_link: str | None = None
    language: tuple[str, ...] = ()
    datasets: tuple[str, ...] = ()


def hub_id(name: str) -> str | None:
    """The Hub id that a name is, or that a folder of the Hub's cache belongs to; None for any other folder."""
    if cached := _IN_HUB_CACHE.search(name):
        return "/".join(filter(None, cached.groups()))
    return name if HUB_ID.fullmatch(name) and not Path(name).exists() else None


def base_card(origin: str, revision: str | None = None) -> BaseCard:
    """What the card beside the files of a model says; of a folder, also what its compression report does.

    Args:
        origin: where the model was loaded from: a folder, or a name on the Hub.
        revision: the commit that was loaded from the Hub; the main branch's when None.
    """
    path = beside(origin, REPOCARD_NAME, revision)
    card = BaseCard() if path is None else _read(path)
    if card.base_models or not origin or not Path(origin).is_dir():
        return card
    return replace(card, base_models=_reported(Path(origin)))


def _reported(folder: Path) -> tuple[str, ...]:
    """What the compression report in a folder calls the original, where that is on the Hub."""
    try:
        report = read_report(folder)
    except (OSError, ValueError):
        return ()
    found = None if report is None else hub_id(report.base_model)
    return () if found is None else (found,)


def _read(path: Path) -> BaseCard:
    try:
        with path.open(encoding="utf-8") as file:
            metadata, _ = split_card(file.read(_LARGEST))
        data = yaml.safe_load(metadata)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        logger.warning("what %s says of the base model's licence is not known: it cannot be read (%s)", path, reason)
        return BaseCard()
    return _of(data) if isinstance(data, Mapping) else BaseCard()


def _of(data: Mapping[str, Any]) -> BaseCard:
    return BaseCard(
        base_models=_several(data.get("base_model"), HUB_ID),
        license=_one(data.get("license"), _CODE),
        license_name=_one(data.get("license_name"), _CODE),
        license_link=_one(data.get("license_link"), _LINK),
        language=_several(data.get("language"), _CODE),
        datasets=_several(data.get("datasets"), HUB_ID),
    )


def _several(given: Any, form: re.Pattern[str]) -> tuple[str, ...]:
    texts = ["no" if text is False else text for text in (given if isinstance(given, list) else [given])]  # Norwegian
    return tuple(text for text in texts if isinstance(text, str) and form.fullmatch(text))


def _one(given: Any, form: re.Pattern[str]) -> str | None:
    found = _several(given, form)
    return found[0] if len(found) == 1 else None
