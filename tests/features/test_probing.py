"""Sparse probing: against a probe written out by hand, on planted, leaking and pure noise features, and its error."""

import math
import re
import statistics
from collections import Counter

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression

from hf_compress.features.probing import (
    balanced_splits,
    pca_features,
    probe_side_by_side,
    random_features,
    sparse_probing,
)
from tests.helpers.ffns import noise


def classes_of(*sizes, seed=0):
    """Labels of classes 0, 1, … of these sizes, in random order."""
    labels = torch.tensor([label for label, size in enumerate(sizes) for _ in range(size)])
    return labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))]


def with_signal(labels, width, seed=0):
    """Skewed noise, a constant, and two features alike but for the label: only large weights tell it from them."""
    features = noise(len(labels), width, seed=seed).clamp(min=-0.5).double()
    features[:, 4] = features[:, 2] + 0.5 * features[:, 4] - 0.4 * labels
    features[:, 2] += 0.4 * labels
    features[:, 6] = 0.1
    return features


def rows_tested(scores):
    return scores.tested.sum(dim=(1, 2)).nonzero()[:, 0]


def probe_by_hand(features, positive, parts, k):
    """The chosen features, and {test row: answer right}: feature by feature, with loops."""
    train, validation, test = (part.tolist() for part in parts)
    columns, distances = [], []
    for feature in range(features.shape[1]):
        values = [float(features[row, feature]) for row in train]
        constant = len(set(values)) == 1
        mean, deviation = statistics.fmean(values), 1.0 if constant else statistics.pstdev(values)
        inside, outside = (
            statistics.fmean(v for row, v in zip(train, values, strict=True) if bool(positive[row]) == side)
            for side in (True, False)
        )
        distances.append((0.0 if constant else -abs(inside - outside) / deviation, feature))
        columns.append([0.0 if constant else (float(v) - mean) / deviation for v in features[:, feature]])
    chosen = [feature for _, feature in sorted(distances)][:k]

    def inputs(rows):
        return np.array([[columns[feature][row] for feature in chosen] for row in rows])

    best, found = -1.0, None
    for strength in (0.01, 0.1, 1.0, 10.0):
        model = LogisticRegression(C=strength, max_iter=5000).fit(inputs(train), positive[train].numpy())
        share = float(np.mean(model.predict(inputs(validation)) == positive[validation].numpy()))
        if share > best:
            best, found = share, model.predict(inputs(test)) == positive[test].numpy()
    return chosen, dict(zip(test, found.tolist(), strict=True))


def error_by_hand(right, labels, gap_to=None):
    """Mean and standard error from {(split, class): {row: right}}, sample by sample."""
    sides = {}
    for (split, label), answers in right.items():
        for row, answer in answers.items():
            value = answer - (gap_to[split, label][row] if gap_to else 0)
            sides.setdefault((label, bool(labels[row] == label)), []).append((row, value))
    means = {side: statistics.fmean(value for _, value in answers) for side, answers in sides.items()}
    residuals = Counter()
    for side, answers in sides.items():
        for row, value in answers:
            residuals[row] += (value - means[side]) / len(answers) / len(sides)
    n = len(residuals)
    return statistics.fmean(means.values()), math.sqrt(n / (n - 1) * sum(r * r for r in residuals.values()))


@pytest.mark.parametrize("sizes", [(40, 60), (30, 50, 45)])
@pytest.mark.parametrize("k", [1, 3, 7])
def test_scores_are_those_of_probes_written_out(sizes, k):
    labels = classes_of(*sizes)
    one, two = with_signal(labels, 7, seed=1), with_signal(labels, 7, seed=2)
    found = probe_side_by_side({"one": one, "two": two}, labels, (k,), splits=2, seed=5)
    right = {}
    for name, features in {"one": one, "two": two}.items():
        right[name] = {}
        for number, split in enumerate(balanced_splits(labels, 2, 5)):
            for label, parts in split.parts.items():
                chosen, answers = probe_by_hand(features, labels == label, parts, k)
                assert found[name].chosen[label][number] == tuple(chosen)
                right[name][number, label] = answers
        mean, error = error_by_hand(right[name], labels)
        assert found[name].accuracy == {k: pytest.approx(mean)}
        assert found[name].standard_error == {k: pytest.approx(error)}
        for label, accuracy in found[name].by_class[k].items():
            shares = [statistics.fmean(answers.values()) for (_, of), answers in right[name].items() if of == label]
            assert accuracy == pytest.approx(statistics.fmean(shares))
    assert list(found["one"].by_class[k]) == ([1] if len(sizes) == 2 else [0, 1, 2])
    gap, error = found["two"].difference(found["one"], k)
    assert gap == pytest.approx(found["two"].accuracy[k] - found["one"].accuracy[k])
    assert (gap, error) == pytest.approx(error_by_hand(right["two"], labels, right["one"]))


@pytest.mark.parametrize("sizes", [(90, 10), (10, 90), (40, 40, 40), (100, 50, 10), (200, 13, 17, 30)])
def test_parts_are_disjoint_stratified_and_balanced_with_even_negatives(sizes):
    labels = classes_of(*sizes)
    for split in balanced_splits(labels, 3, seed=1):
        assert list(split.parts) == ([1] if len(sizes) == 2 else list(range(len(sizes))))
        kept = Counter(labels[split.train].tolist())
        assert all(kept[label] == size - 2 * round(0.2 * size) for label, size in enumerate(sizes))
        outside = [parts[1:] for parts in split.parts.values()]
        validation, test = (set(torch.cat(side).tolist()) for side in zip(*outside, strict=True))
        assert not validation & test
        assert not (validation | test) & set(split.train.tolist())
        for label, parts in split.parts.items():
            assert set(parts[0].tolist()) <= set(split.train.tolist())
            for part, share in zip(parts, (None, 0.2, 0.2), strict=True):
                there = {c: round(0.2 * n) if share else n - 2 * round(0.2 * n) for c, n in enumerate(sizes)}
                counts = Counter(labels[part].tolist())
                negatives = {other: counts[other] for other in there if other != label}
                assert len(set(part.tolist())) == len(part)
                assert counts[label] == sum(negatives.values()) == min(there[label], sum(there.values()) - there[label])
                for other, count in negatives.items():  # none gives less than another unless it has no more
                    assert count == there[other] or count >= max(negatives.values()) - 1


def test_splits_differ_and_do_not_depend_on_their_number():
    labels = classes_of(40, 60)
    three, one = balanced_splits(labels, 3, 0), balanced_splits(labels, 1, 0)
    assert torch.equal(three[0].train, one[0].train)
    assert all(torch.equal(a, b) for a, b in zip(three[0].parts[1], one[0].parts[1], strict=True))
    assert torch.equal(one[0].train, one[0].train.sort().values)
    assert not torch.equal(three[0].train, three[1].train)
    assert not torch.equal(one[0].train, balanced_splits(labels, 1, 1)[0].train)


def test_which_class_gives_the_odd_negative_is_random():
    labels = classes_of(25, 25, 25)
    tests = [labels[split.parts[0][2]].tolist() for split in balanced_splits(labels, 20, 0)]
    assert all(sorted((rows.count(1), rows.count(2))) == [2, 3] for rows in tests)
    assert 0 < sum(rows.count(1) == 3 for rows in tests) < 20


def test_a_planted_feature_is_found_and_the_classes_without_one_are_not():
    labels = classes_of(60, 60, 60)
    features = noise(180, 30)
    features[:, 17] = (labels == 2) * 3.0 + 0.01 * noise(180, seed=4)
    scores = sparse_probing(features, labels, (1, 5))
    assert [order[0] for order in scores.chosen[2]] == [17] * 3
    assert scores.by_class[1][2] == scores.by_class[5][2] == 1
    assert scores.by_class[1][0] < 0.9
    alone = sparse_probing(features, (labels == 2).long(), (1,))
    assert (alone.accuracy[1], alone.standard_error[1]) == (1, 0)


def test_features_are_compared_in_units_of_their_deviation():
    labels = classes_of(100, 100)
    features = noise(200, 10)
    features[:, 3] *= 1000  # the raw difference of means is the largest here, by chance
    features[:, 8] = 0.01 * (features[:, 8] + 2 * labels)
    assert [order[0] for order in sparse_probing(features, labels, (1,)).chosen[1]] == [8] * 3


def test_nothing_but_the_answers_depends_on_the_test_rows():
    labels = classes_of(100, 100)
    features = with_signal(labels, 20)
    before = sparse_probing(features, labels, (1, 5), splits=1)
    test = rows_tested(before)
    assert len(test) == 40
    shuffled = features.clone()  # as if the labels were shuffled on the test rows alone
    shuffled[test] = features[test[torch.randperm(40, generator=torch.Generator().manual_seed(1))]]
    after = sparse_probing(shuffled, labels, (1, 5), splits=1)
    assert after.chosen == before.chosen
    assert after.accuracy[5] < before.accuracy[5]
    leaking = features.clone()
    spare = next(feature for feature in range(20) if feature not in before.chosen[1][0])
    leaking[test, spare] = 100 * labels[test].double()  # the label itself, but on the test rows alone
    assert sparse_probing(leaking, labels, (1, 5), splits=1) == before


def test_validation_rows_choose_no_features():
    labels = classes_of(100, 100)
    features = with_signal(labels, 20)
    before = sparse_probing(features, labels, (5,), splits=1)
    _, validation, _ = balanced_splits(labels, 1, 0)[0].parts[1]
    features[validation] = 100 * labels[validation][:, None].double()
    assert sparse_probing(features, labels, (5,), splits=1).chosen == before.chosen


@pytest.mark.slow
@pytest.mark.parametrize(("classes", "cut", "k"), [(2, None, 5), (2, 1.0, 1), (3, None, None)])
def test_noise_gives_chance_and_the_stated_error_is_about_right(classes, cut, k):
    """Sparse noise, too, where a probe says of all test rows of either side the same, whatever they are."""
    accuracies, errors = [], []
    for seed in range(100):
        features = noise(150, 8, seed=seed)
        labels = torch.randint(0, classes, (150,), generator=torch.Generator().manual_seed(1000 + seed))
        if cut is not None:
            features = (features - cut).clamp(min=0)
        scores = sparse_probing(features, labels, (k,), splits=2, seed=seed)
        accuracies.append(scores.accuracy[k])
        errors.append(scores.standard_error[k])
    stated = math.sqrt(statistics.fmean(error**2 for error in errors))
    assert abs(statistics.fmean(accuracies) - 0.5) < 3 * stated / math.sqrt(100)
    assert 0.75 < statistics.stdev(accuracies) / stated < 1.25
    assert statistics.fmean(abs(a - 0.5) < 2 * e for a, e in zip(accuracies, errors, strict=True)) > 0.88


def test_rare_classes_do_not_let_a_probe_win_by_their_rarity():
    scores = sparse_probing(noise(300, 5), classes_of(270, 30), (1, None), splits=5)
    assert abs(scores.accuracy[1] - 0.5) < 3 * scores.standard_error[1]
    assert torch.equal(scores.tested.sum(dim=0), torch.tensor([[5 * 6, 5 * 6]]))


def test_a_difference_of_alike_features_is_surer_than_the_scores():
    labels = classes_of(100, 100)
    features = with_signal(labels, 10)
    close = features + 0.02 * noise(200, 10, seed=9)
    scores = probe_side_by_side({"a": features, "b": close}, labels, (5,))
    _, error = scores["a"].difference(scores["b"], 5)
    assert 0 < error < math.hypot(*(score.standard_error[5] for score in scores.values())) / 2
    assert scores["a"].difference(scores["a"], 5) == (0, 0)


def test_a_difference_needs_the_same_rows_and_k():
    labels = classes_of(30, 30)
    features = noise(60, 4)
    scores = sparse_probing(features, labels, (1,))
    more = sparse_probing(features, labels, (1, 2))
    with pytest.raises(ValueError, match=r"k is 2, but the scores are of \[1\] and \[1, 2\]"):
        scores.difference(more, 2)
    with pytest.raises(ValueError, match=r"k is 2, but the scores are of \[1, 2\] and \[1\]"):
        more.difference(scores, 2)
    others = [
        sparse_probing(features, labels, (1,), seed=1),
        sparse_probing(features, labels, (1,), splits=2),
        sparse_probing(features, labels + 1, (1,)),
    ]
    for other in others:
        with pytest.raises(ValueError, match="different test rows: use the same labels, splits and seed"):
            scores.difference(other, 1)


def test_the_seed_decides_and_nothing_else():
    labels, features = classes_of(50, 50, 50), noise(150, 6)
    columns = {"a": features, "b": noise(150, 9, seed=3), "pca": pca_features(features, 3)}
    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    first = probe_side_by_side(columns, labels, (1, 3))
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(2)
    np.random.seed(2)
    again = probe_side_by_side(dict(reversed(columns.items())), labels.tolist(), (3, 1))
    assert list(again) == ["pca", "b", "a"]
    assert again == first
    assert sparse_probing(features, labels, (1, 3)) == first["a"]
    assert sparse_probing(features, labels, (1, 3), seed=1) != first["a"]


def test_none_and_too_large_a_k_are_all_features():
    labels, features = classes_of(50, 50), noise(100, 6)
    scores = sparse_probing(features, labels, (2, 100, None, 6, None))
    assert list(scores.accuracy) == [2, 100, None, 6]
    assert scores.accuracy[100] == scores.accuracy[None] == scores.accuracy[6] != scores.accuracy[2]
    assert sorted(scores.chosen[1][0]) == list(range(6))


def test_constant_features_are_zero():
    labels = classes_of(100, 100)
    flat = torch.full((200, 3), 0.1, dtype=torch.float64)  # 0.1 has a rounding error that sums up in a mean
    assert sparse_probing(flat, labels, (1, None)).accuracy == {1: 0.5, None: 0.5}
    assert sparse_probing(flat, labels, (1,)).chosen == {1: ((0,), (0,), (0,))}
    features = noise(200, 4).double()
    train = balanced_splits(labels, 1, 0)[0].parts[1][0]
    leaking = torch.cat([features, labels[:, None] * 9.0], dim=1)
    leaking[train, 4] = 0.1
    without, scores = (sparse_probing(one, labels, (None,), splits=1) for one in (features, leaking))
    assert scores.chosen[1][0][-1] == 4
    assert scores.accuracy == without.accuracy
    assert sparse_probing(leaking[:, 4:], labels, (1,), splits=1).accuracy == {1: 0.5}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int32, torch.bool])
def test_features_of_any_real_dtype(dtype):
    labels = classes_of(30, 30)
    assert sparse_probing(labels[:, None].to(dtype), labels.bool(), (1,)).accuracy == {1: 1}


def test_gradients_are_not_kept():
    features = noise(60, 2).requires_grad_()
    assert 0 <= sparse_probing(features, classes_of(30, 30), (1,)).accuracy[1] <= 1


def test_a_callable_is_given_the_training_rows_of_each_split():
    labels, features, given = classes_of(40, 40, 40), noise(120, 5), []

    def fitted(train):
        given.append(train)
        return features[:, : 3 + len(given)]

    scores = probe_side_by_side({"a": fitted}, labels, (None,), splits=2)["a"]
    assert [rows.tolist() for rows in given] == [split.train.tolist() for split in balanced_splits(labels, 2, 0)]
    assert [len(order) for order in scores.chosen[0]] == [4, 5]
    once = probe_side_by_side({"a": lambda train: features}, labels, (1,), splits=1)["a"]
    assert not set(rows_tested(once).tolist()) & set(given[0].tolist())


def test_principal_components_are_those_of_the_training_rows():
    stream = noise(50, 8) * torch.arange(1, 9) + 3
    train = torch.arange(0, 50, 2)
    found = pca_features(stream, 3)(train)
    expected = PCA(3, svd_solver="full").fit(stream[train].double().numpy()).transform(stream.double().numpy())
    assert np.allclose(np.abs(found.numpy()), np.abs(expected))
    changed = stream.clone()
    changed[1::2] *= 100
    assert torch.equal(pca_features(changed, 3)(train)[train], found[train])


def test_principal_components_are_no_more_than_the_training_rows_span():
    stream = noise(40, 2).double() @ noise(2, 6, seed=1).double()
    assert pca_features(stream, 6)(torch.arange(30)).shape == (40, 2)
    assert pca_features(noise(40, 6), 9)(torch.arange(4)).shape == (40, 3)
    with pytest.raises(ValueError, match=r"column 'pca' must be a tensor \(samples, features\).*got \[40, 0\]"):
        probe_side_by_side({"pca": pca_features(torch.ones(40, 6), 2)}, classes_of(20, 20))


def test_random_features_are_gaussian_projections():
    stream = noise(20, 64)
    found = random_features(stream, 2000, seed=3)
    directions = random_features(torch.eye(64), 2000, seed=3) * 8  # times √64
    assert found.shape == (20, 2000)
    assert torch.allclose(found, stream @ directions / 8, atol=1e-5)
    assert abs(float(directions.mean())) < 0.02
    assert float(directions.std()) == pytest.approx(1, abs=0.02)
    assert float((directions.abs() < 1).float().mean()) == pytest.approx(0.683, abs=0.01)
    assert torch.equal(random_features(stream, 2000, 3, rectified=True), found.clamp(min=0))
    assert not torch.equal(random_features(stream, 2000, 4), found)


GOOD = {"features": noise(40, 3), "labels": classes_of(20, 20)}
SPOILT = noise(40, 3)
SPOILT[3, 1] = math.nan


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"features": noise(40)}, r"must be a tensor \(samples, features\).*got \[40\]"),
        ({"features": noise(40, 0)}, r"neither of them 0; got \[40, 0\]"),
        ({"features": noise(40, 3).tolist()}, "must be a tensor .*got list"),
        ({"features": SPOILT}, "column 'features' holds NaN or infinity; expected finite numbers"),
        ({"features": 1 / torch.zeros(40, 3)}, "holds NaN or infinity"),
        ({"features": noise(39, 3)}, "has 39 rows for 40 labels; expected one row a label"),
        ({"features": lambda train: noise(39, 3)}, "has 39 rows for 40 labels"),
        ({"features": lambda train: SPOILT}, "holds NaN or infinity"),
        ({"labels": torch.zeros(40, dtype=torch.int64)}, "labels are of 1 classes; expected at least 2"),
        ({"labels": classes_of(31, 9)}, "class 1 has 9 samples; expected at least 10"),
        ({"labels": classes_of(20, 20).double()}, r"whole numbers, one a sample; got torch.float64 of shape \[40\]"),
        ({"labels": classes_of(20, 20)[:, None]}, r"got torch.int64 of shape \[40, 1\]"),
        ({"labels": torch.zeros(40, dtype=torch.complex64)}, "got torch.complex64"),
        ({"labels": ["cat", "dog"] * 20}, "labels must be whole numbers.*number the classes"),
        ({"labels": [0, None] * 20}, "labels must be whole numbers.*number the classes"),
        ({"ks": ()}, r"expected at least one column and one k; got columns \['features'\] and ks \[\]"),
        ({"ks": (1, 0)}, "k is 0; expected a whole number of at least 1, or None for all features"),
        ({"ks": (1, -2)}, "k is -2"),
        ({"ks": (2.0,)}, "k is 2.0; expected a whole number"),
        ({"ks": (True,)}, "k is True"),
        ({"splits": 0}, "splits is 0; expected a whole number of at least 1"),
        ({"splits": 1.5}, "splits is 1.5"),
        ({"seed": -1}, "seed is -1; expected a whole number of at least 0"),
    ],
)
def test_refuses_what_cannot_be_probed(arguments, message):
    with pytest.raises(ValueError, match=message):
        sparse_probing(**{**GOOD, **arguments})


def test_refuses_columns_before_the_first_probe():
    called = []

    def never(train):
        called.append(train)
        return GOOD["features"]

    for bad, message in [(noise(39, 3), "has 39 rows"), (SPOILT, "holds NaN")]:
        with pytest.raises(ValueError, match=re.escape(f"column 'second' {message}")):
            probe_side_by_side({"first": never, "second": bad}, GOOD["labels"])
    assert not called
    with pytest.raises(ValueError, match=r"expected at least one column and one k; got columns \[\]"):
        probe_side_by_side({}, GOOD["labels"])


def test_controls_refuse_what_is_no_stream_or_no_width():
    for control in (lambda x, n: random_features(x, n, 0), pca_features):
        with pytest.raises(ValueError, match="stream must be a tensor"):
            control(noise(4), 2)
        with pytest.raises(ValueError, match="stream holds NaN"):
            control(SPOILT, 2)
        with pytest.raises(ValueError, match="is 0; expected a whole number of at least 1"):
            control(noise(4, 3), 0)
    with pytest.raises(ValueError, match="seed is -1"):
        random_features(noise(4, 3), 2, -1)
