"""Results as notebooks show them, and as they are printed."""

import math

import pytest
import torch

from hf_compress.api.estimate import Disk, Estimate
from hf_compress.plan.edits import RemoveBlocks
from hf_compress.plan.plan import Plan
from hf_compress.plan.tables import html_table, measured, text_table
from hf_compress.rewrite.edits.packed import SparsifyLinear
from tests.helpers.cards import result
from tests.helpers.web_pages import Checked

EDITS = (RemoveBlocks("h", (3,)), *(SparsifyLinear(f"h.{block}.up", 8) for block in range(200)))
SHOWN = {
    "plan": (
        Plan(EDITS, {"h.0.weight": torch.zeros(3, 4)}, {"note": [0.5] * 1000}),
        ("edits: 201; new tensors: 1, of 48 bytes", "left out: 3", "SparsifyLinear", "8 weights kept", "and 101 more"),
    ),
    "estimate": (
        Estimate(100.0, 2.5, 30.0, 10**12, 5 * 10**9, Disk(10**6, 10**6, 10**9)),
        ("about 2 min", "2.5 passes", "about 5.0 GB", "1 MB of new weights", "1.0 GB saved"),
    ),
    "evaluation": (
        result(1234, name="<b>models/out</b>"),
        ("<b>models/out</b>", "1,234", "4,936", "perplexity", "17.00", "cloze acc", "0.6250", "0.0340"),
    ),
}


@pytest.mark.parametrize("kind", SHOWN)
def test_results_are_shown(kind):
    shown, words = SHOWN[kind]
    page = Checked(shown._repr_html_())
    for word in words:
        assert word in page.words
        assert word in str(shown)
    assert {tag for tag, _ in page.tags} == {"table", "caption", "tr", "th", "td"}
    assert "tensor" not in repr(Plan((), {"a": torch.zeros(9)}))


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (20.354, 2.09, "20.4 ± 2.1"),
        (0.6453, 0.0338, "0.645 ± 0.034"),
        (-0.0801, 0.0032, "-0.0801 ± 0.0032"),
        (123456.7, 1500.0, "123,457 ± 1,500"),
        (0.5, 0.0, "0.5000 ± 0.0000"),
        (0.123456, math.nan, "0.1235"),
        (3.2e30, 1e29, "3.2e+30"),
        (math.inf, 1.0, "not finite"),
    ],
)
def test_figures_have_the_digits_that_their_errors_allow(value, error, text):
    assert measured(value, error) == text


def test_a_row_that_is_shorter_than_the_head_runs_on():
    rows = [("a", "1", "22"), ("b", "refused, and for a long reason")]
    assert text_table(("", "n", "m"), rows, right={1}).splitlines() == [
        "   n  m",
        "--------",
        "a  1  22",
        "b  refused, and for a long reason",
    ]
    assert '<td>b</td><td colspan="2">refused' in html_table("", ("", "n", "m"), rows)
