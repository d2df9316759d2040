"""Whoever has not imported hf_compress never gets a wrong model: stock Transformers loads it right, or stops."""

import pytest

from hf_compress.errors import UnsupportedModelError
from hf_compress.storage.save import save
from tests.helpers.round_trip import EDITS, MODELS, build, change
from tests.helpers.stock import stock_outcomes


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """What stock Transformers does with every change: (family, edit) -> outcomes without and with the head."""
    root = tmp_path_factory.mktemp("stock")
    folders, plain = {}, {}
    for family in MODELS:
        for edit in EDITS:
            try:
                model = change(build(family), edit)
            except UnsupportedModelError:
                continue
            folder = save(model, root / f"{family}-{edit.replace(' ', '_')}")
            folders[str(folder)] = family, edit
            plain[family, edit] = getattr(model.config, "quantization_config", None) is None
    found = stock_outcomes(folders, root)
    return {folders[folder]: outcome for folder, outcome in found.items()}, plain


@pytest.mark.slow
def test_a_plain_result_loads_and_any_other_stops_with_a_size_mismatch(outcomes):
    found, plain = outcomes
    assert len(found) == len(MODELS) * len(EDITS) - 2
    for key, body_and_head in found.items():
        assert body_and_head == 2 * ["loaded" if plain[key] else "size mismatch"], key
    assert {plain[key] for key in found} == {True, False}
