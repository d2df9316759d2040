"""Every variant can be built and run, and is another model than the one of the default settings."""

import pytest
import torch
from torch import Tensor

from tests.helpers import tiny
from tests.helpers.changes import forward, runs_of_blocks
from tests.helpers.variants import BY_NAME, VARIANTS, Variant

# These say what is so anyway, or what only other stacks than those of the tiny model read.
_NO_OTHER = {"nemotron_h", "esmc"}


def outputs(variant: Variant) -> Tensor:
    """The first output of a variant on its tiny inputs."""
    model = variant.build()
    return forward(model, tiny.tiny_inputs(model))


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_variants_run_and_differ_from_the_default(variant):
    for path, runs in runs_of_blocks(variant.build()).items():
        assert all(runs), f"{path}: {runs}"
    own = outputs(variant)
    assert torch.isfinite(own).all()
    try:
        default = outputs(Variant(variant.auto, variant.model_type, {}))
    except Exception:  # some model types need other settings to run at all
        return
    same = own.shape == default.shape and torch.equal(own, default)
    assert same == (variant.model_type in _NO_OTHER)


def test_variants_have_names_of_their_own():
    assert len(BY_NAME) == len(VARIANTS)
