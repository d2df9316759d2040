"""A feature report as a browser shows it: drawn, readable, within the window, in light and in dark."""

import subprocess
from pathlib import Path

import numpy as np
import pytest

from hf_compress.features.report import feature_report
from hf_compress.report.canvas import BLUE, INK, VERMILION
from hf_compress.rewrite.bottlenecks import Bottlenecks
from tests.helpers.bottlenecks import TOP, fitted
from tests.helpers.browser import DARK, browser, inside, measured, near, picture, pixels_of

# What else there is to measure: every curve, chart, label and marked token.
MORE = """
  curves: boxes('polyline'), charts: boxes('svg'), marks: boxes('mark'),
  labels: [...document.querySelectorAll('svg')].map(s => [...s.querySelectorAll('text')].map(box)),
  small: Math.min(...[...document.querySelectorAll("svg")].map(s => 13 * s.getScreenCTM().a)),
"""


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    """A report on two bottlenecks, with texts of one long word among them."""
    import torch

    from tests.helpers.language import tiny_llama, word_tokenizer, words

    found = fitted(0, width=14)
    found.places[1] = fitted(1, form=TOP).places[1]
    found = Bottlenecks(found.stack, found.places, {})
    steps = list(range(200))
    curve = {
        "retention": [1 - 0.4 * min(1, max(0, (s - 40) / 120)) for s in steps],
        "error": [0.5 / (s + 5) for s in steps],
    }
    for place in found.places.values():
        place.curve = {"step": [float(step) for step in steps], **curve}
        place.importance = torch.logspace(3, -1, len(place.importance))
    texts = [words(12, seed=seed) for seed in range(8)]
    model, tokenizer = tiny_llama(layers=3), word_tokenizer(add_special=True)
    model.name_or_path = "a" * 150  # nowhere to break it
    folder = tmp_path_factory.mktemp("page")
    return feature_report(model, texts, tokenizer, folder / "page.html", bottlenecks=found, features=4, examples=4)


@pytest.mark.parametrize(
    ("arguments", "paper", "ink", "blue", "red"),
    [
        ((), "#ffffff", INK, BLUE, VERMILION),
        ((DARK,), "#15191e", "#e4e8ec", "#56b4e9", "#ff8a3d"),
    ],
    ids=["light", "dark"],
)
def test_the_page_is_drawn(arguments, paper, ink, blue, red, page):
    """Background, words, and each curve without a gap where it should be: the first falls, and so does the second."""
    pixels, places = picture(page, 1000, *arguments), measured(page, 1000, MORE)
    assert pixels.shape[:2] == (1600, 1000)
    assert near(pixels, paper, 2).mean() > 0.5
    assert inside(near(pixels, ink), places["title"]).sum() > 100
    for box, colour in zip(places["curves"][:2], (blue, red), strict=True):
        drawn = inside(near(pixels, colour), box)
        columns = drawn.any(axis=0)
        assert columns.mean() > 0.97
        heights = [np.flatnonzero(drawn[:, column]).mean() for column in np.flatnonzero(columns)]
        assert heights[0] < 8
        assert heights[-1] > len(drawn) - 8
        assert not near(pixels, colour)[:, : round(places["charts"][0][0])].any()
    spectrum = places["charts"][2]
    assert inside(near(pixels, blue), spectrum, 0).sum() > 50  # dots of features kept
    assert inside(near(pixels, red), spectrum, 0).sum() > 15  # crosses of those cut


@pytest.mark.parametrize("width", [500, 1000, 1800])
def test_nothing_leaves_the_window(width, page):
    """Nor is there anything too small to read, or a word of a chart over another."""
    places = measured(page, width, MORE)
    assert places["width"] == width
    assert places["page"] == width
    assert places["outside"] == []
    assert places["small"] >= 10
    assert len(places["charts"]) == 6
    for chart, labels in zip(places["charts"], places["labels"], strict=True):
        assert len(labels) >= 8
        for at, (left, top, right, bottom) in enumerate(labels):
            assert left >= chart[0]
            assert top >= chart[1]
            assert right <= chart[2] + 0.5
            assert bottom <= chart[3] + 0.5
            for other in labels[:at]:
                apart = left >= other[2] or right <= other[0] or top >= other[3] - 3 or bottom <= other[1] + 3
                assert apart, (labels[at], other)


def test_marked_tokens_are_seen(page):
    pixels = picture(page, 1000)
    for box in [box for box in measured(page, 1000, MORE)["marks"] if box[3] < 1600][:4]:
        assert inside(near(pixels, "#ffe08a", 3), box, 0).mean() > 0.3
        assert inside(near(pixels, INK, 90), box, 0).any()


def test_in_firefox(page):
    """Which prints no page as it is laid out: so it is asked for the picture alone."""
    target = page.with_name("firefox.png")
    command = [browser("firefox-esr", "firefox"), "--headless", "--profile", str(page.parent / "fox")]
    (page.parent / "fox").mkdir()
    command += ["--window-size=1000,1600", "--screenshot", str(target), page.as_uri()]
    subprocess.run(command, capture_output=True, timeout=120, check=True)
    pixels = pixels_of(target)
    assert near(pixels, "#ffffff", 2).mean() > 0.5
    for colour in (INK, BLUE, VERMILION):
        assert near(pixels, colour).sum() > 300
