"""Sparse probing: how well a few features tell one class from the others, with controls and a standard error.

Source: Gurnee et al. (arXiv 2305.01610); SAEBench (arXiv 2503.09532).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor

STRENGTHS = (0.01, 0.1, 1.0, 10.0)  # C of the logistic regression: the strongest regularisation comes first
FEWEST = 10  # samples of a class: 6 to train, 2 to validate and 2 to test

Column = Tensor | Callable[[Tensor], Tensor]
"""Features (samples, features), or what makes them for all samples after a fit on the training rows it is given."""
Parts = tuple[Tensor, ...]  # rows to train, to validate and to test on


@dataclass(frozen=True)
class ProbeScores:
    """How well k features tell the classes apart, by each k; None for all features.

    Attributes:
        accuracy: Share of right answers on test rows, half of them of the class: 0.5 is chance. The mean over the
            classes and splits.
        standard_error: Of `accuracy`. A sample can be tested in several splits and for several classes, so whole
            samples are the sampling unit. A side s is a class, and whether a row is of it: how many rows of each side
            are tested is fixed. With t_is how often sample i was tested on side s, y_is how often rightly, T_s the sum
            of t_is, a_s = sum_i y_is / T_s and r_i = mean_s (y_is - a_s t_is) / T_s, the variance is
            n / (n - 1) * sum_i r_i^2 over the n samples tested. In simulations the true error is 0.8 to 1.15 times
            this: rows tested in one split train the probes of others, which no such sum sees. 0 if all is right.
        by_class: Of each k, the accuracy for each class that was probed, the mean over the splits.
        chosen: Of each class and split, the features that were chosen, the best first, as many as the largest k.
        tested: (samples, classes, 2) int64: t, the classes as in `by_class`; first those not of the class.
        correct: Of each k, (samples, classes, 2) int64: y.
    """

    accuracy: dict[int | None, float]
    standard_error: dict[int | None, float]
    by_class: dict[int | None, dict[int, float]]
    chosen: dict[int, tuple[tuple[int, ...], ...]] = field(repr=False)
    tested: Tensor = field(repr=False, compare=False)
    correct: dict[int | None, Tensor] = field(repr=False, compare=False)

    def difference(self, other: ProbeScores, k: int | None) -> tuple[float, float]:
        """By how much this accuracy is above the other's at `k`, and the standard error of that, sample by sample.

        Samples hard for one are mostly hard for the other, so that is below what the two errors would give.

        Raises:
            ValueError: the two were not tested on the same rows, or one not at `k`.
        """
        if any(k not in one.correct for one in (self, other)):
            raise ValueError(f"k is {k}, but the scores are of {list(self.correct)} and {list(other.correct)}")
        if list(self.chosen) != list(other.chosen) or not torch.equal(self.tested, other.tested):
            raise ValueError("the two scores are of different test rows: use the same labels, splits and seed")
        gap, error, _ = _summarise(self.correct[k] - other.correct[k], self.tested)
        return gap, error


@dataclass(frozen=True)
class Split:
    """One division of the samples into disjoint parts.

    Attributes:
        train: All rows of the training part, sorted: what a column may be fitted on.
        parts: Of each class to probe, rows of the three parts: in each as many of the class as of the others, these
            drawn as evenly from the other classes as their numbers allow.
    """

    train: Tensor
    parts: dict[int, Parts]


def sparse_probing(
    features: Column,
    labels: Tensor | Sequence[int],
    ks: Sequence[int | None] = (1, 5, 50),
    splits: int = 3,
    seed: int = 0,
) -> ProbeScores:
    """Probe for each class against the rest with the k features that differ most between the two.

    For each of `balanced_splits` and each class: on the training rows alone the features are standardised (those
    constant there are 0) and ranked by |difference of class means| / standard deviation; a logistic regression is
    fitted on the k first; its strength C is the one of `STRENGTHS` best on the validation rows, of equals the smallest;
    the test rows are only scored. Of two classes the larger label alone is probed, for the other is its mirror.

    Args:
        features: (samples, features), one row a sample, or a callable (see `Column`) such as `pca_features` gives.
        labels: (samples) whole numbers, the class of each; at least 10 samples of each class.
        ks: numbers of features; None for all, as is a k above their number.
        splits: random divisions to average over.
        seed: of the splits; at least 0. The same seed gives the same scores.

    Raises:
        ValueError: features that are not a finite matrix of one row a label; labels that are not whole numbers, of
            less than two classes, or of a class too small; no `ks`, or one below 1; `splits` below 1; `seed` below 0.
    """
    return probe_side_by_side({"features": features}, labels, ks, splits, seed)["features"]


def probe_side_by_side(
    columns: Mapping[str, Column],
    labels: Tensor | Sequence[int],
    ks: Sequence[int | None] = (1, 5, 50),
    splits: int = 3,
    seed: int = 0,
) -> dict[str, ProbeScores]:
    """`sparse_probing` of several sets of features of the same samples, by name, all on the same rows.

    Raises:
        ValueError: no columns, or as `sparse_probing`; before the first probe, but for what a callable gives.
    """
    if not columns or len(ks) == 0:
        raise ValueError(f"expected at least one column and one k; got columns {list(columns)} and ks {list(ks)}")
    for k in [k for k in ks if k is not None]:
        _check_whole("k", k, 1, ", or None for all features")
    divided, labels = balanced_splits(labels, splits, seed), _check_labels(labels)
    for name in [name for name, column in columns.items() if not callable(column)]:
        _checked(columns[name], f"column {name!r}", len(labels))
    ks = list(dict.fromkeys(ks))
    return {name: _scores(column, f"column {name!r}", labels, divided, ks) for name, column in columns.items()}


def random_features(stream: Tensor, width: int, seed: int, rectified: bool = False) -> Tensor:
    """A control, (samples, width) float32: Gaussian projections of `stream` (samples, d), cut at 0 if `rectified`.

    Raises:
        ValueError: a stream that is not a finite matrix; `width` below 1; `seed` below 0.
    """
    stream = _checked(stream, "stream").float()
    _check_whole("width", width, 1)
    _check_whole("seed", seed, 0)
    directions = torch.randn(stream.shape[1], width, generator=torch.Generator().manual_seed(seed))
    projected = stream @ directions / math.sqrt(stream.shape[1])
    return projected.clamp(min=0) if rectified else projected


def pca_features(stream: Tensor, count: int) -> Callable[[Tensor], Tensor]:
    """A control: the leading principal components of `stream` (samples, d), fitted on the training rows of each split.

    The callable gives (samples, count) float64, fewer where the training rows do not span as many directions.

    Raises:
        ValueError: a stream that is not a finite matrix; `count` below 1.
    """
    stream = _checked(stream, "stream").double()
    _check_whole("count", count, 1)

    def fitted(train: Tensor) -> Tensor:
        mean = stream[train].mean(dim=0)
        _, values, directions = torch.linalg.svd(stream[train] - mean, full_matrices=False)
        # Directions without variance on the training rows are rounding noise, which standardising would blow up.
        spanned = values > values[0] * max(len(train), stream.shape[1]) * torch.finfo(values.dtype).eps
        return (stream - mean) @ directions[spanned][:count].T

    return fitted


def balanced_splits(labels: Tensor | Sequence[int], splits: int, seed: int) -> list[Split]:
    """Random divisions into 60% to train, 20% to validate and 20% to test, of each class alike.

    They depend on labels and seed alone, and refuse what `sparse_probing` does.
    """
    labels = _check_labels(labels)
    _check_whole("splits", splits, 1)
    _check_whole("seed", seed, 0)
    return [_split(labels, np.random.default_rng([seed, number])) for number in range(splits)]


def _split(labels: Tensor, random: np.random.Generator) -> Split:
    classes = labels.unique().tolist()
    by_class = []
    for label in classes:
        rows = _shuffled((labels == label).nonzero()[:, 0], random)
        fifth = (len(rows) + 2) // 5  # to the nearest
        by_class.append(rows.split([len(rows) - 2 * fifth, fifth, fifth]))
    parts = [torch.cat(rows) for rows in zip(*by_class, strict=True)]
    probed = classes[1:] if len(classes) == 2 else classes
    balanced = {label: tuple(_balanced(part, labels, label, random) for part in parts) for label in probed}
    return Split(parts[0].sort().values, balanced)


def _balanced(rows: Tensor, labels: Tensor, label: int, random: np.random.Generator) -> Tensor:
    """As many of the rows with the label as of those without, these dealt out class by class."""
    rows = _shuffled(rows, random)
    mine, others = rows[labels[rows] == label], rows[labels[rows] != label]
    turn = torch.empty_like(others)  # each row's place among those of its class
    for other in labels[others].unique():
        of_class = labels[others] == other
        turn[of_class] = torch.arange(int(of_class.sum()))
    size = min(len(mine), len(others))
    return torch.cat([mine[:size], others[turn.argsort(stable=True)][:size]])


def _shuffled(rows: Tensor, random: np.random.Generator) -> Tensor:
    return rows[torch.from_numpy(random.permutation(len(rows)))]


def _scores(column: Column, name: str, labels: Tensor, splits: list[Split], ks: Sequence[int | None]) -> ProbeScores:
    classes = list(splits[0].parts)
    tested = torch.zeros(len(labels), len(classes), 2, dtype=torch.int64)
    correct = {k: torch.zeros_like(tested) for k in ks}
    chosen: dict[int, list[tuple[int, ...]]] = {label: [] for label in classes}
    for split in splits:
        features = _checked(column(split.train) if callable(column) else column, name, len(labels))
        for at, (label, parts) in enumerate(split.parts.items()):
            order, right = _probe(features, labels == label, parts, ks)
            chosen[label].append(tuple(order.tolist()))
            side = (parts[2], at, (labels[parts[2]] == label).long())
            tested[side] += 1
            for k in ks:
                correct[k][side] += right[k]
    found = {k: _summarise(correct[k], tested) for k in ks}
    accuracy, error = {k: found[k][0] for k in ks}, {k: found[k][1] for k in ks}
    by_class = {k: dict(zip(classes, found[k][2], strict=True)) for k in ks}
    in_order = {label: tuple(orders) for label, orders in chosen.items()}
    return ProbeScores(accuracy, error, by_class, in_order, tested, correct)


def _probe(
    features: Tensor, positive: Tensor, parts: Parts, ks: Sequence[int | None]
) -> tuple[Tensor, dict[int | None, Tensor]]:
    """The features in order of choice, and for each k whether each test row's answer is right, 0 or 1."""
    train = features[parts[0]].double()
    mean, deviation = train.mean(dim=0), train.std(dim=0, correction=0)
    deviation[train.amax(dim=0) == train.amin(dim=0)] = 0  # of a constant it can come out as rounding noise
    targets = [positive[rows] for rows in parts]
    gap = train[targets[0]].mean(dim=0) - train[~targets[0]].mean(dim=0)
    distance = torch.where(deviation > 0, gap.abs() / deviation, 0.0)
    counts = {k: features.shape[1] if k is None else min(k, features.shape[1]) for k in ks}
    order = distance.argsort(descending=True, stable=True)[: max(counts.values())]
    shifted = (features[rows[:, None], order].double() - mean[order] for rows in parts)
    inputs = [torch.where(deviation[order] > 0, part / deviation[order], 0.0) for part in shifted]
    return order, {k: _test([part[:, :count].numpy() for part in inputs], targets) for k, count in counts.items()}


def _test(inputs: Sequence[np.ndarray], targets: Sequence[Tensor]) -> Tensor:
    """Whether each test row's answer is right, of the regression that is best on the validation rows."""
    models = (LogisticRegression(C=strength, max_iter=1000).fit(inputs[0], targets[0]) for strength in STRENGTHS)
    # max keeps the first of equals: the strongest regularisation.
    best = max(models, key=lambda model: float(model.score(inputs[1], targets[1])))
    return (torch.from_numpy(best.predict(inputs[2])) == targets[2]).long()


def _summarise(correct: Tensor, tested: Tensor) -> tuple[float, float, list[float]]:
    """The mean over the classes, its standard error, and the mean of each class: see `ProbeScores`."""
    totals = tested.sum(dim=0).double()
    means = correct.sum(dim=0) / totals
    residuals = ((correct - means * tested) / totals).mean(dim=(1, 2))
    samples = int(tested.any(dim=2).any(dim=1).sum())
    variance = samples / (samples - 1) * float(residuals.square().sum())
    return float(means.mean()), math.sqrt(variance), means.mean(dim=1).tolist()


def _checked(features: Any, name: str, samples: int | None = None) -> Tensor:
    """The features, on the CPU and without gradients."""
    if not isinstance(features, Tensor) or features.ndim != 2 or features.numel() == 0:
        got = list(features.shape) if isinstance(features, Tensor) else type(features).__name__
        raise ValueError(f"{name} must be a tensor (samples, features), neither of them 0; got {got}")
    if samples is not None and len(features) != samples:
        raise ValueError(f"{name} has {len(features)} rows for {samples} labels; expected one row a label, in order")
    if not bool(torch.isfinite(features).all()):
        raise ValueError(f"{name} holds NaN or infinity; expected finite numbers: check what they were computed from")
    return features.detach().cpu()


def _check_labels(labels: Tensor | Sequence[int]) -> Tensor:
    """The labels, (samples) int64."""
    try:
        found = torch.as_tensor(labels).cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"labels must be whole numbers, one a sample: number the classes ({error})") from error
    if found.ndim != 1 or found.is_floating_point() or found.is_complex():
        got = f"{found.dtype} of shape {list(found.shape)}"
        raise ValueError(f"labels must be whole numbers, one a sample; got {got}: number the classes")
    classes, counts = found.unique(return_counts=True)
    if len(classes) < 2:
        raise ValueError(f"labels are of {len(classes)} classes; expected at least 2: a probe tells one from another")
    label, count = classes[counts.argmin()].item(), int(counts.min())
    if count < FEWEST:
        raise ValueError(f"class {label} has {count} samples; expected at least {FEWEST}: add some, or leave it out")
    return found.long()


def _check_whole(name: str, value: Any, least: int, otherwise: str = "") -> None:
    if type(value) is not int or value < least:
        raise ValueError(f"{name} is {value!r}; expected a whole number of at least {least}{otherwise}")
