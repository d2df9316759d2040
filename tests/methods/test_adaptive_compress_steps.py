"""AdaptiveCompress: the steps of a learner, those that make no sense among them, and what hangs on the variant."""

import pytest
import torch

from hf_compress.methods.adaptive_compress import AdaptiveCompressConfig
from hf_compress.methods.adaptive_compress.learner_run import LearnerRun
from tests.helpers.fitting import TRAINED, VARIANTS, learner, learnt, missed, stream


@pytest.mark.parametrize("variant", TRAINED)
def test_every_token_of_a_batch_is_learnt_from_once(variant, monkeypatch):
    found, seen = learner(variant, updates=4), []
    terms = found.terms
    monkeypatch.setattr(found, "terms", lambda rows: (seen.append(rows.clone()), terms(rows))[1])
    rows = stream(11)
    LearnerRun(found).learn(rows, 0, 8)
    assert [len(part) for part in seen] == [3, 3, 3, 2]
    assert sorted(torch.cat(seen).tolist()) == sorted(rows.tolist())
    assert torch.cat(seen).tolist() != rows.tolist(), "neighbours in a text come in the same step"


@pytest.mark.parametrize("variant", ["default", "paper"])
def test_a_step_without_tokens_teaches_nothing(variant):
    found = learner(variant, updates=1)
    run, before = LearnerRun(found), found.importance.clone()
    run.learn(stream()[:0], 0, 4)
    assert torch.equal(found.importance, before)
    assert run.curve["error"] == []


@pytest.mark.parametrize(
    ("variant", "steps"), [*((name, 6) for name in TRAINED), *((name, 1) for name in ("linear", "topk", "paper"))]
)
def test_a_step_that_makes_no_sense_any_more_is_the_last(variant, steps):
    """Where it is the last there is, that is noticed at the end."""
    found = learner(variant, updates=1, learning_rate=1e6)
    run = learnt(found, steps)
    if steps > 1:
        assert not run.goes_on
        assert len(run.curve["error"]) < steps
    module, _ = run.finished()
    assert "learning_rate" in run.stopped
    assert all(tensor.isfinite().all() for tensor in module.state_dict().values())
    assert missed(module(stream().float()), stream()) < 20 * found.variance


def test_what_is_no_number_stops_it_too_and_the_last_good_state_comes_back():
    found = learner("linear", updates=1)
    run = LearnerRun(found)
    run.learn(stream(), 0, 9)
    kept = found.module.encoder.detach().clone()
    run._good = (1, {name: tensor.clone() for name, tensor in found.state().items()})
    with torch.no_grad():
        found.module.encoder[0, 0] = float("nan")
    run.learn(stream(), 2, 9)
    assert "step 2 (error nan" in run.stopped
    assert "as it was in step 1" in run.stopped
    assert torch.equal(found.module.encoder, kept)


def test_nothing_more_is_learnt_once_it_has_stopped():
    found = learner("linear", updates=9, learning_rate=1e6)
    start, run = found.module.encoder.detach().clone(), LearnerRun(found)
    run.learn(stream(), 0, 9)
    run.learn(stream(), 9, 18)
    assert run.stopped.startswith("diverged in step 1 ")
    assert run.curve["step"] == [0]
    assert torch.equal(found.module.encoder, start)


def test_a_stream_far_from_0_is_learnt_by_the_paper_too():
    """ĥ begins as a tenth of h and some noise, so of E‖h‖² it misses most, which is many times the variance here."""
    rows = stream(50)
    rows[:, 2] += 8 * rows.std()
    run = learnt(learner("paper", rows, updates=1), 10, rows)
    assert not run.stopped
    assert len(run.curve["error"]) == 10


def test_what_depends_on_the_variant():
    rates = {name: AdaptiveCompressConfig(variant=name).rate for name in VARIANTS}
    assert rates == {"default": 3e-4, "paper": 1e-3, "pca": 1e-3, "linear": 1e-3, "topk": 1e-3, "batchtopk": 1e-3}
    passing = {name: AdaptiveCompressConfig(variant=name).passing for name in VARIANTS}
    assert passing == {"default": 0.1, "paper": 0.1, "pca": 0, "linear": 0, "topk": 0, "batchtopk": 0}
    assert AdaptiveCompressConfig(variant="pca", skip=0.3).passing == 0.3
    assert AdaptiveCompressConfig(skip=0).passing == 0
    tracked = [AdaptiveCompressConfig(variant=name).tracked for name in ("default", "paper")]
    assert tracked == ["energy", "sign"]
    assert AdaptiveCompressConfig(importance="sign").tracked == "sign"
