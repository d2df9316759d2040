"""Models of our own, for experiments that Transformers has no model for. Imported only when they are first used."""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOMES = {
    "DenseConfig": "hf_compress.models.dense_config",
    "DenseForClassification": "hf_compress.models.dense",
    "from_scikit_learn": "hf_compress.models.conversion",
    "from_sequential": "hf_compress.models.conversion",
}

__all__ = [*_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
