"""The charts of a feature report: where curves, dots and crosses lie, and what there is little or much of."""

import math
import re

import pytest

from hf_compress.features import charts
from tests.helpers.bottlenecks import CURVE


def points(chart: str) -> list[tuple[float, float]]:
    line = re.search(r'<polyline .*?points="(.*?)"', chart)[1]
    return [tuple(map(float, pair.split(","))) for pair in line.split()]


def test_curves_lie_where_their_axes_say():
    """A value on a line of the grid is drawn at its height; x runs over the whole width; both axes have names."""
    retention, error = charts.training_curve(CURVE).split("</figure>")[:2]
    assert "training step" in retention
    assert ">retention</text>" in retention
    assert ">error</text>" in error
    for chart, values in ((retention, CURVE["retention"]), (error, CURVE["error"])):
        levels = {
            float(label): float(y)
            for y, label in re.findall(r'M\d+ ([\d.]+)H\d+"/><text [^>]*text-anchor="end">([^<]*)<', chart)
        }
        assert len(levels) >= 3
        found = points(chart)
        assert [x for x, _ in found] == pytest.approx([66, 257, 448])
        (low, y_low), (high, y_high) = min(levels.items()), max(levels.items())
        for (_, y), value in zip(found, values, strict=True):
            assert y == pytest.approx(y_low + (value - low) / (high - low) * (y_high - y_low), abs=0.2)


def test_curves_of_thousands_of_steps_are_means():
    steps = [float(step) for step in range(5000)]
    curve = {"step": steps, "retention": [1.0] * 5000, "error": [1.0 + step % 2 for step in range(5000)]}
    chart = charts.training_curve(curve)
    found = points(chart.split("</figure>")[1])
    assert 200 <= len(found) <= 400
    assert charts._thinned(list(zip(steps, curve["error"], strict=True)))[0] == (6.0, pytest.approx(1 + 6 / 13))


@pytest.mark.parametrize(
    "curve",
    [
        {"step": [7.0], "retention": [0.95], "error": [0.0]},
        {"step": [0.0, 1.0], "retention": [1.0, 1.0], "error": [1e-13, 0.5]},
        {"step": [0.0, 1.0], "retention": [0.5, 0.5], "error": [math.nan, 0.5]},
        {"step": [0.0, 1e6], "retention": [0.5, 0.5], "error": [1e-9, 1e9]},
        {"step": [0.0, 1.0], "retention": [0.5, 0.4]},
    ],
)
def test_odd_curves(curve):
    """Every number stays within its chart."""
    chart = charts.training_curve(curve)
    assert chart.count("<figure>") == sum(name in curve for name in ("retention", "error"))
    assert "nan" not in chart
    for part in chart.split("</figure>")[:-1]:
        assert all(66 <= x <= 448 and 12 <= y <= 206 for x, y in points(part))
        labels = re.findall(r"<text [^>]*>([^<]*)</text>", part)
        assert len(labels) >= 4
        assert max(len(label) for label in labels[:-2]) <= 7


def test_what_is_not_known_of_the_training_is_said():
    assert "not known" in charts.training_curve({})
    assert "not known" in charts.spectrum([], None)
    assert "none was measured" in charts.spectrum([0.0, 0.0], [0, 1])


def test_spectrum():
    """Dots for what is kept, crosses for what is cut, in falling order, on a log scale; zeros on the lowest line."""
    chart = charts.spectrum([1.0, 100.0, 0.0, 10.0], [1, 3])
    dots = re.search(r'class="dots" d="(.*?)"', chart)[1]
    crosses = re.search(r'class="crosses" d="(.*?)"', chart)[1]
    places = [
        [tuple(map(float, place)) for place in re.findall(r"M([\d.]+) ([\d.]+)m", path)] for path in (dots, crosses)
    ]
    xs = [[x for x, _ in part] for part in places]
    assert xs == [[66.0, pytest.approx(66 + 382 / 3, abs=0.1)], [pytest.approx(66 + 382 * 2 / 3, abs=0.1), 448.0]]
    (_, hundred), (_, ten) = places[0]
    (_, one), (_, zero) = places[1]
    assert one - ten == pytest.approx(ten - hundred, abs=0.2)
    assert zero == pytest.approx(hundred + 5 * (ten - hundred), abs=0.5)
    assert "kept (2)" in chart
    assert "cut (2)" in chart
    assert "1 below 0.001 stand on the lowest line" in chart
    assert "importance (log scale)" in chart
    assert "cut not told apart" in charts.spectrum([1.0, 2.0], None)


def test_spectra_of_thousands_of_features_are_thinned():
    chart = charts.spectrum([float(value) for value in range(1, 10001)], range(5000, 10000))
    assert 600 <= chart.count("m-2.2") + chart.count("m-3.5") <= 800
    assert "kept (5,000)" in chart
