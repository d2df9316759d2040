"""Scores of tasks with what each document contributes to them, and differences of two models, document by document."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

RESAMPLES = 1000  # of the documents, for the standard errors of what is no mean over them
_SEED = 0


@dataclass(frozen=True)
class ByDocument:
    """What each document contributes to a metric, and how the metric is made of that.

    Attributes:
        values: by what a document is known by, the same for all models: numbers, or what `aggregate` takes.
        aggregate: the metric of the values of some documents; their mean when None.
    """

    values: Mapping[Hashable, Any]
    aggregate: Callable[[Sequence[Any]], float] | None = None

    def standard_error(self) -> float:
        """Of the metric, documents being independent; NaN for a single one."""
        values = list(self.values.values())
        if self.aggregate is None:
            return _error_of_mean(values)
        made = self.aggregate
        return _bootstrap(len(values), lambda picked: made([values[i] for i in picked]))

    def difference(self, other: ByDocument) -> tuple[float, float]:
        """By how much this metric is above another model's on the same documents, and the standard error of that.

        Of a mean over documents that is the mean of their differences d with the error s(d) / sqrt(n). Of any other
        metric the error is that of a bootstrap: the documents are drawn anew, the same ones for both models, and the
        difference is taken again, 1,000 times with a fixed seed.

        Raises:
            ValueError: the two are not of the same documents.
        """
        if self.values.keys() != other.values.keys():
            raise ValueError("the two scores are of different documents, and cannot be compared in pairs")
        mine = list(self.values.values())
        theirs = [other.values[key] for key in self.values]
        if self.aggregate is None:
            gaps = [float(a) - float(b) for a, b in zip(mine, theirs, strict=True)]
            return math.fsum(gaps) / len(gaps), _error_of_mean(gaps)
        made = self.aggregate

        def gap(picked: Iterable[int]) -> float:
            chosen = list(picked)
            return made([mine[i] for i in chosen]) - made([theirs[i] for i in chosen])

        return gap(range(len(mine))), _bootstrap(len(mine), gap)


@dataclass(frozen=True)
class TaskScore:
    """One metric of one lm-eval task, or of labelled data.

    Attributes:
        task: Name of the task or group, or of the data.
        metric: Name of the metric, with lm-eval's filter after a comma where there is one.
        value: The metric, in its own unit (accuracies between 0 and 1).
        standard_error: As lm-eval gives it, taking documents as independent; NaN where it gives none.
        higher_is_better: None where the task does not say.
        documents: Number of documents scored; None for a group.
        by_document: What each document contributes; None where that is not known. Not part of the JSON.
    """

    task: str
    metric: str
    value: float
    standard_error: float
    higher_is_better: bool | None
    documents: int | None
    by_document: ByDocument | None = field(default=None, repr=False, compare=False)

    def difference(self, other: TaskScore) -> tuple[float, float]:
        """By how much this score is above another model's, document by document, and the standard error of that.

        Raises:
            ValueError: what the documents contribute is not known, or they are not the same ones.
        """
        if self.by_document is None or other.by_document is None:
            raise ValueError(f"what each document contributes to {self.task} {self.metric} is not known")
        return self.by_document.difference(other.by_document)

    def to_dict(self) -> dict[str, Any]:
        """As plain data, without the documents."""
        return {name: value for name, value in vars(self).items() if name != "by_document"}


def task_scores(harness: dict[str, Any]) -> tuple[TaskScore, ...]:
    """Every metric and its standard error in what lm-eval returned; by document too, where samples came with it."""
    scores = []
    for task, metrics in harness["results"].items():
        for key, value in metrics.items():
            metric, comma, kind = key.partition(",")
            if not comma or metric.endswith("_stderr"):
                continue  # the task's name and the like
            error = metrics.get(f"{metric}_stderr,{kind}")
            scores.append(
                TaskScore(
                    task=task,
                    metric=metric if kind == "none" else key,
                    value=float(value),
                    standard_error=float(error) if isinstance(error, (int, float)) else math.nan,
                    higher_is_better=harness["higher_is_better"].get(task, {}).get(metric),
                    documents=harness["n-samples"].get(task, {}).get("effective"),
                    by_document=_documents(harness, task, metric, kind, float(value)),
                )
            )
    return tuple(scores)


def _documents(harness: dict[str, Any], task: str, metric: str, kind: str, score: float) -> ByDocument | None:
    """What the documents of a task, or of all tasks of a group, contribute, if the score is made of just that."""
    samples = harness.get("samples", {})
    names = [task] if task in samples else harness.get("group_subtasks", {}).get(task, [])
    values: dict[Hashable, Any] = {
        (name, sample["doc_id"], sample.get("doc_hash")): sample[metric]
        for name in names
        for sample in samples.get(name, [])
        if sample.get("filter", "none") == kind and metric in sample
    }
    if not values:
        return None
    found = list(values.values())
    if all(isinstance(value, (bool, int, float, np.number)) for value in found) and _near(np.mean(found), score):
        return ByDocument(values)
    aggregate = _aggregation(harness, task, metric)
    return ByDocument(values, aggregate) if aggregate is not None and _near(aggregate(found), score) else None


def _aggregation(harness: dict[str, Any], task: str, metric: str) -> Callable[[Sequence[Any]], float] | None:
    """lm-eval's function that makes a metric of what the documents contribute; None for one of the task's own."""
    from lm_eval.api.registry import get_aggregation, get_metric_aggregation

    listed = harness.get("configs", {}).get(task, {}).get("metric_list") or []
    named = next((entry.get("aggregation") for entry in listed if entry.get("metric") == metric), None)
    try:
        return get_aggregation(named) if isinstance(named, str) else get_metric_aggregation(metric)
    except (KeyError, ValueError):
        return None


def _near(value: Any, score: float) -> bool:
    return math.isclose(float(value), score, rel_tol=1e-9, abs_tol=1e-12)


def _error_of_mean(values: Sequence[Any]) -> float:
    """s / sqrt(n); NaN for a single value."""
    if len(values) < 2:
        return math.nan
    return float(np.std([float(value) for value in values], ddof=1)) / math.sqrt(len(values))


def _bootstrap(documents: int, metric: Callable[[Iterable[int]], float]) -> float:
    """Standard deviation of a metric over draws of the documents, with replacement; NaN for a single document."""
    if documents < 2:
        return math.nan
    random = np.random.default_rng(_SEED)
    drawn = [metric(random.integers(documents, size=documents).tolist()) for _ in range(RESAMPLES)]
    return float(np.std(drawn, ddof=1))
