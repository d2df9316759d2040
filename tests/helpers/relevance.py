"""Models to explain, and what an explanation is refused with."""

import torch

import hf_compress as hfc
from tests.helpers import linears
from tests.helpers.models import refusing
from tests.helpers.round_trip import build
from tests.helpers.tiny import randomise

FLOATS = torch.randn(3, 6, generator=torch.Generator().manual_seed(7))


class OddNorm(torch.nn.Module):
    """Scales each number by itself."""

    def forward(self, x):
        return x / (1 + x.abs())


def dense(**fields):
    return linears.dense(**{"num_labels": 4, "use_bias": True} | fields)


def make(family):
    """A model of four blocks in which every parameter matters, and attention is far from even."""
    if family == "Dense":
        return dense(num_hidden_layers=4, num_labels=3, residual=True)
    model = build(family)
    randomise(model, seed=2)
    return model


def refused(model, data, error, message, **settings):
    with refusing(model, error, message):
        hfc.relevance(model, data, **settings)
