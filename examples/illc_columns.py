"""The columns of the examples on ILLC: what is compared at the same width, chosen and solved on the same data."""

from __future__ import annotations

from typing import Any

DEFAULT = "ILLC (default)"
COLUMNS: dict[str, dict[str, Any]] = {
    DEFAULT: {},
    "… towards the FFN's own output": {"target": "ffn"},
    "clusters + ridge": {"reduction": "average"},
    "representatives + ridge": {"reduction": "representative"},
    "variance + ridge": {"reduction": "variance"},
    "magnitude + ridge": {"reduction": "magnitude"},
    "random + ridge": {"reduction": "random"},
    "clusters (the paper's)": {"variant": "paper"},
    "clusters, not iterative (SpArX)": {"variant": "paper", "iterative": False},
    "variance + bias (FLAP-like)": {"reduction": "variance", "compensation": "bias"},
    "variance": {"reduction": "variance", "compensation": "none"},
    "magnitude": {"reduction": "magnitude", "compensation": "none"},
    "random": {"reduction": "random", "compensation": "none"},
}
