"""Relevance on every architecture that can be built tiny: nothing computed changes, or it is refused with a reason."""

import pytest
import torch

from hf_compress.attribution.passes import check_conserved, explaining, logits_of
from hf_compress.calibration.capture import forward
from hf_compress.calibration.data import Batch
from hf_compress.calibration.objective import first_tensor
from hf_compress.errors import UnsupportedModelError
from hf_compress.rewrite.probe import quiet
from tests.helpers.changes import Trace
from tests.helpers.matrix import FAMILIES
from tests.helpers.models import leftovers
from tests.helpers.tiny import CannotBuild, tiny_inputs

TYPES = [(key, kind) for key, family in FAMILIES.items() if key != "settings" for kind in family.types]
# What has to pass: were all refused, no test would fail.
COVERED = {
    *("llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe", "gemma", "gemma2", "gemma3_text", "phi", "phi3"),
    *("gpt2", "gpt_neox", "gptj", "opt", "olmo2", "cohere", "stablelm", "deepseek_v3", "granite", "starcoder2"),
    *("bert", "distilbert", "electra", "modernbert", "vit", "deit", "t5", "bart", "marian"),
}


@pytest.mark.slow
@pytest.mark.parametrize(("key", "kind"), TYPES)
def test_relevance(key, kind):
    try:
        model = FAMILIES[key].build(kind).eval()
        batch = Batch(tiny_inputs(model), None)
        expected = plain(model, batch)
    except (CannotBuild, UnsupportedModelError, RuntimeError):  # of its own, without us
        assert kind not in COVERED
        return
    before, own = Trace.of(model), leftovers(model)  # Transformers' own hooks, which it never takes off
    logits, refusal = explained(model, batch)
    assert leftovers(model) == own
    assert before.difference(model) is None
    if refusal:
        assert kind not in COVERED, refusal
    elif model.get_output_embeddings() is None:
        assert torch.equal(logits, expected)


@torch.no_grad()
def plain(model, batch):
    torch.manual_seed(0)  # some families draw patches to mask, or hashes
    with quiet():
        return first_tensor(forward(model, batch))


def explained(model, batch):
    """What the model gives under the rules, or why it is refused."""
    try:
        with quiet():
            check_conserved(model, batch)
            torch.manual_seed(0)
            with explaining(model) as sources:
                return logits_of(model, batch, sources), ""
    except UnsupportedModelError as error:
        return None, str(error)
