import math
import statistics

import numpy as np
import pytest

from hf_compress.evaluation.scores import RESAMPLES, ByDocument, TaskScore, task_scores

OURS, THEIRS = (1, 1, 1, 0, 1, 0), (1, 0, 0, 0, 1, 1)


def by_document(values, aggregate=None):
    return ByDocument(dict(enumerate(values)), aggregate)


def score(documents):
    return TaskScore("cloze", "acc", 0.5, 0.1, True, 6, documents)


def test_means_are_compared_by_the_differences_of_documents():
    gaps = [a - b for a, b in zip(OURS, THEIRS, strict=True)]
    value, error = score(by_document(OURS)).difference(score(by_document(THEIRS)))
    assert value == pytest.approx(1 / 6)
    assert error == pytest.approx(statistics.stdev(gaps) / math.sqrt(6))
    assert by_document(OURS).standard_error() == pytest.approx(statistics.stdev(OURS) / math.sqrt(6))


def test_what_differs_nowhere_has_no_error():
    assert by_document(OURS).difference(by_document(OURS)) == (0, 0)


def test_other_metrics_are_compared_by_a_bootstrap_of_documents():
    """Of a mean it gives what the formula gives, and the same each time; the same documents are drawn for both."""
    random = np.random.default_rng(3)
    first = random.normal(size=200).tolist()
    second = [value + 0.1 * gap for value, gap in zip(first, random.normal(size=200), strict=True)]
    exact = by_document(second).difference(by_document(first))
    drawn = by_document(second, statistics.fmean).difference(by_document(first, statistics.fmean))
    assert drawn[0] == pytest.approx(exact[0])
    assert drawn[1] == pytest.approx(exact[1], rel=4 / math.sqrt(2 * RESAMPLES))
    assert drawn == by_document(second, statistics.fmean).difference(by_document(first, statistics.fmean))
    alone = by_document(first, statistics.fmean).standard_error()
    assert alone == pytest.approx(by_document(first).standard_error(), rel=4 / math.sqrt(2 * RESAMPLES))


def test_a_single_document_has_no_error():
    for aggregate in (None, statistics.fmean):
        assert math.isnan(by_document([1.0], aggregate).standard_error())
        value, error = by_document([1.0], aggregate).difference(by_document([0.0], aggregate))
        assert value == 1
        assert math.isnan(error)


def test_other_documents_are_no_pairs():
    with pytest.raises(ValueError, match="different documents"):
        by_document(OURS).difference(by_document(THEIRS[:-1]))
    with pytest.raises(ValueError, match=r"cloze acc is not known"):
        score(None).difference(score(by_document(THEIRS)))


def harness(**changes):
    """What lm-eval returns of two tasks in a group, with a filter, and a metric that is no mean."""
    samples = {
        "one": [
            {"doc_id": i, "doc_hash": f"a{i}", "filter": "none", "acc": a, "f1": (i % 2, a)} for i, a in enumerate(OURS)
        ],
        "two": [{"doc_id": i, "doc_hash": f"b{i}", "filter": "none", "acc": a} for i, a in enumerate((0.0, 1.0))],
    }
    results = {
        "one": {"alias": "one", "acc,none": 4 / 6, "acc_stderr,none": 0.1, "f1,none": 2 / 7},
        "two": {"acc,none": 0.5, "acc_stderr,none": 0.5},
        "both": {"acc,none": 5 / 8, "acc_stderr,none": 0.2},
    }
    metrics = [{"metric": "acc", "aggregation": "mean"}, {"metric": "f1", "aggregation": "f1"}]
    return {
        "results": results,
        "samples": samples,
        "higher_is_better": {"one": {"acc": True}},
        "n-samples": {"one": {"effective": 6}, "two": {"effective": 2}},
        "configs": {"one": {"metric_list": metrics}, "two": {}},
        "group_subtasks": {"both": ["one", "two"]},
    } | changes


def test_what_lm_eval_scores_is_known_by_document():
    found = {(one.task, one.metric): one for one in task_scores(harness())}
    assert list(found["one", "acc"].by_document.values.values()) == list(OURS)
    assert found["one", "acc"].by_document.aggregate is None
    assert len(found["both", "acc"].by_document.values) == 8  # of a group, those of its tasks
    f1 = found["one", "f1"].by_document
    assert f1.aggregate(list(f1.values.values())) == pytest.approx(2 / 7)  # one hit, three false alarms, two misses
    assert "by_document" not in found["one", "acc"].to_dict()


@pytest.mark.parametrize(
    "changes",
    [
        {"samples": {}},
        {"results": {"one": {"acc,none": 0.9}}},  # made in some other way than by the mean
        {"results": {"one": {"acc,strict": 4 / 6}}},  # of another filter
    ],
)
def test_what_documents_contribute_is_not_guessed(changes):
    assert task_scores(harness(**changes))[0].by_document is None
