"""The example's table: every kind of change on six families, through files, trained, and through files again."""

import pytest

from hf_compress.errors import UnsupportedModelError
from tests.helpers.round_trip import EDITS, MODELS, build, round_trip

PLAIN = {"remove a block", "merge two blocks", "narrow every FFN"}
REFUSED = {("Mixtral", "linear FFN"), ("Mixtral", "low-rank FFN")}


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("family", MODELS)
def test_round_trip(family, edit, tmp_path):
    if (family, edit) in REFUSED:
        with pytest.raises(UnsupportedModelError, match="is a mixture of experts"):
            round_trip(build(family), edit, tmp_path)
        return
    outcome = round_trip(build(family), edit, tmp_path)
    assert outcome.same
    assert outcome.same_trained
    assert outcome.plain == (edit in PLAIN)
    before, after = outcome.bytes
    assert (after < before) == (edit not in {"bottleneck", "blended activation"})
