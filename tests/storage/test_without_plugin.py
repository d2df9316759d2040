"""Whoever has not imported hf_compress never gets a wrong model: stock Transformers loads it right, or stops."""

import json
import subprocess
import sys

import pytest

from examples.round_trip import EDITS, MODELS, build
from hf_compress.anatomy.anatomy import Anatomy
from hf_compress.apply import apply
from hf_compress.errors import UnsupportedModelError
from hf_compress.storage.save import save

STOCK = """
import json, sys
import transformers
assert "hf_compress" not in sys.modules
outcomes = {}
for folder in sys.argv[1:]:
    for name in ("AutoModel", transformers.AutoConfig.from_pretrained(folder).architectures[0]):
        try:
            getattr(transformers, name).from_pretrained(folder)
            outcome = "loaded"
        except RuntimeError as error:
            outcome = "size mismatch" if "ignore_mismatched_sizes" in str(error) else f"RuntimeError {error}"
        outcomes.setdefault(folder, []).append(outcome)
assert "hf_compress" not in sys.modules
print(json.dumps(outcomes))
"""


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """What stock Transformers does with every change: (family, edit) -> outcomes without and with the head."""
    root = tmp_path_factory.mktemp("stock")
    folders, plain = {}, {}
    for family in MODELS:
        for edit in EDITS:
            model = build(family)
            try:
                apply(EDITS[edit](model, Anatomy(model).stack(), 1), model)
            except UnsupportedModelError:
                continue
            folder = save(model, root / f"{family}-{edit.replace(' ', '_')}")
            folders[str(folder)] = family, edit
            plain[family, edit] = getattr(model.config, "quantization_config", None) is None
    done = subprocess.run(
        [sys.executable, "-c", STOCK, *folders], capture_output=True, text=True, timeout=300, cwd=root
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.strip().splitlines()[-1])
    return {folders[folder]: outcome for folder, outcome in found.items()}, plain


def test_a_plain_result_loads_and_any_other_stops_with_a_size_mismatch(outcomes):
    found, plain = outcomes
    assert len(found) == len(MODELS) * len(EDITS) - 2
    for key, body_and_head in found.items():
        assert body_and_head == 2 * ["loaded" if plain[key] else "size mismatch"], key
    assert {plain[key] for key in found} == {True, False}
