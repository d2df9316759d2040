"""Which cases of a test run every time."""

from collections.abc import Iterable
from typing import Any

import pytest


def only_quick(cases: Iterable[Any], *quick: Any) -> list[Any]:
    """Cases of a parametrized test; all but the `quick` ones are marked slow, for together they take long."""
    cases = list(cases)
    assert set(quick) <= set(cases), "no such case"
    return [case if case in quick else pytest.param(case, marks=pytest.mark.slow) for case in cases]
