"""Learners of AdaptiveCompress and their steps, and fits of a model that are compared or interrupted."""

import torch

from hf_compress.calibration.data import DataOptions
from hf_compress.methods.adaptive_compress import AdaptiveCompressConfig
from hf_compress.methods.adaptive_compress.fit import LEARNERS
from hf_compress.methods.adaptive_compress.learner import StreamMoments
from hf_compress.methods.adaptive_compress.learner_run import LearnerRun

VARIANTS = ("default", "paper", "pca", "linear", "topk", "batchtopk")
TRAINED = tuple(name for name in VARIANTS if name != "pca")
DICTIONARIES = ("topk", "batchtopk")
HIDDEN, TOKENS = 5, 9
DATA = DataOptions(batch_size=3)  # four batches of 24 tokens


# --- learners ---------------------------------------------------------------------------------------------------------


def stream(tokens=TOKENS, seed=0):
    """Tokens with coordinates that belong together, and a mean."""
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(HIDDEN, HIDDEN, generator=torch.Generator().manual_seed(99), dtype=torch.float64)
    return 0.7 + torch.randn(tokens, HIDDEN, generator=generator, dtype=torch.float64) @ common


def learner(variant, rows=None, seed=0, **settings):
    """A learner before its first step, in float64."""
    rows, moments = stream() if rows is None else rows, StreamMoments(HIDDEN, torch.device("cpu"))
    moments.update(rows)
    settings = {"retention_final": 0.4} | settings
    found = LEARNERS[variant](AdaptiveCompressConfig(variant=variant, **settings), moments, seed)
    found.module.double()
    found.importance = found.importance.double()
    return found


def learnt(found, steps, rows=None):
    """The run of a learner over so many steps, of these rows or of fresh ones for each."""
    run = LearnerRun(found)
    for step in range(steps):
        run.learn(stream(seed=step) if rows is None else rows, step, steps)
    return run


def missed(rebuilt, rows):
    return (rows - rebuilt).detach().square().sum(1).mean().item()


# --- fits -------------------------------------------------------------------------------------------------------------


def config(variant="default", **settings):
    defaults = {"layers": (1, 3), "retention_final": 0.5, "updates": 2}
    return AdaptiveCompressConfig(variant=variant, **defaults | settings)


def everything():
    """A config of every kind."""
    more = {"topk": {"dead_steps": 2}, "batchtopk": {"dead_steps": 1}, "default": {"tie_weights": True}}
    return [config(name, learning_rate=0.01, **more.get(name, {})) for name in VARIANTS] + [config(l1=1.0)]


def assert_same(found, expected):
    """Bottlenecks, bit for bit."""
    assert (found.config, found.tokens, found.stack) == (expected.config, expected.tokens, expected.stack)
    assert found.layers == expected.layers
    for layer, place in expected.places.items():
        mine = found.places[layer]
        assert torch.equal(mine.importance, place.importance)
        assert torch.equal(mine.kept, place.kept)
        assert (mine.curve, mine.stopped, mine.module.form) == (place.curve, place.stopped, place.module.form)
        for name, tensor in place.module.state_dict().items():
            assert torch.equal(mine.module.state_dict()[name], tensor), f"{name} of block {layer}"


def interrupt(monkeypatch, owner, name, call, error=RuntimeError):
    """Have a method raise when it is called for that time."""
    original, calls = getattr(owner, name), []

    def counted(*args, **kwargs):
        calls.append(None)
        if len(calls) == call:
            raise error("in the middle")
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, counted)
