"""Results as notebooks show them, and as they are printed."""

import pytest
import torch

from hf_compress.api.estimate import Estimate
from hf_compress.plan.edits import RemoveBlocks
from hf_compress.plan.plan import Plan
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
        Estimate(100.0, 2.5, 30.0, 10**12, 5 * 10**9, (10**6, 10**9)),
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
