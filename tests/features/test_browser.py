"""A feature report as a browser shows it: drawn, readable, within the window, in light and in dark."""

import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

from hf_compress.features.report import feature_report
from hf_compress.report.canvas import BLUE, INK, VERMILION
from hf_compress.rewrite.bottlenecks import Bottlenecks
from tests.helpers.bottlenecks import TOP, fitted

CHROMIUM = ("chromium", "chromium-browser", "google-chrome")
# Prints where everything is, as soon as the page is laid out. It is put into a copy of the page alone.
MEASURE = """<pre id="measured"></pre><script>
const box = element => {const r = element.getBoundingClientRect(); return [r.left, r.top, r.right, r.bottom]};
const all = [...document.body.querySelectorAll('*:not(script)')].filter(e => e.id != 'measured');
const wide = document.documentElement.clientWidth;
document.getElementById('measured').textContent = JSON.stringify({
  width: wide, page: document.documentElement.scrollWidth,
  outside: all.filter(e => box(e)[2] > wide + 0.5 || box(e)[0] < -0.5).map(e => e.outerHTML.slice(0, 80)),
  title: box(document.querySelector('h1')), curves: [...document.querySelectorAll('polyline')].map(box),
  charts: [...document.querySelectorAll('svg')].map(box),
  labels: [...document.querySelectorAll('svg')].map(s => [...s.querySelectorAll('text')].map(box)),
  marks: [...document.querySelectorAll('mark')].map(box),
  small: Math.min(...[...document.querySelectorAll("svg")].map(s => 13 * s.getScreenCTM().a)),
})</script></body>"""


def browser(*names: str) -> str:
    """The first of the browsers that there is, and that starts; skips the test where there is none."""
    for name in names:
        path = shutil.which(name)
        if path and subprocess.run([path, "--version"], capture_output=True, timeout=60).returncode == 0:
            return path
    return pytest.skip(
        f"no browser to look at the page with: install Debian's {names[0]}; looked for {', '.join(names)}"
    )


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


def chromium(page: Path, width: int, *arguments: str) -> str:
    command = [browser(*CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    command += [f"--user-data-dir={page.parent / 'profile'}", f"--window-size={width},1600", *arguments, page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def measured(page: Path, width: int) -> dict:
    """Where everything is in a window of a width, in pixels."""
    copy = page.with_name("measured.html")
    text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page.read_text(encoding="utf-8"))
    copy.write_text(text.replace("</body>", MEASURE), encoding="utf-8")
    told = re.search(r'<pre id="measured">(.*?)</pre>', chromium(copy, width, "--dump-dom"), re.S)
    return json.loads(unescape(told[1]))


def picture(page: Path, width: int, *arguments: str) -> np.ndarray:
    """What the window shows, (height, width, 3) from 0 to 255."""
    target = page.with_suffix(".png")
    chromium(page, width, f"--screenshot={target}", *arguments)
    return np.round(255 * matplotlib.image.imread(target)[..., :3]).astype(int)


def near(pixels: np.ndarray, colour: str, distance: int = 40) -> np.ndarray:
    """Which pixels have about a colour, (height, width) bool."""
    parts = [int(colour[at : at + 2], 16) for at in (1, 3, 5)]
    return np.abs(pixels - parts).max(axis=-1) <= distance


def inside(values: np.ndarray, box: list[float], room: int = 2) -> np.ndarray:
    left, top, right, bottom = (round(edge) for edge in box)
    return values[max(0, top - room) : bottom + room, max(0, left - room) : right + room]


@pytest.mark.parametrize(
    ("arguments", "paper", "ink", "blue", "red"),
    [
        ((), "#ffffff", INK, BLUE, VERMILION),
        (("--blink-settings=preferredColorScheme=0",), "#15191e", "#e4e8ec", "#56b4e9", "#ff8a3d"),
    ],
    ids=["light", "dark"],
)
def test_the_page_is_drawn(arguments, paper, ink, blue, red, page):
    """Background, words, and each curve without a gap where it should be: the first falls, and so does the second."""
    pixels, places = picture(page, 1000, *arguments), measured(page, 1000)
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
    places = measured(page, width)
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
    for box in [box for box in measured(page, 1000)["marks"] if box[3] < 1600][:4]:
        assert inside(near(pixels, "#ffe08a", 3), box, 0).mean() > 0.3
        assert inside(near(pixels, INK, 90), box, 0).any()


def test_in_firefox(page):
    """Which prints no page as it is laid out: so it is asked for the picture alone."""
    target = page.with_name("firefox.png")
    command = [browser("firefox-esr", "firefox"), "--headless", "--profile", str(page.parent / "fox")]
    (page.parent / "fox").mkdir()
    command += ["--window-size=1000,1600", "--screenshot", str(target), page.as_uri()]
    subprocess.run(command, capture_output=True, timeout=120, check=True)
    pixels = np.round(255 * matplotlib.image.imread(target)[..., :3]).astype(int)
    assert near(pixels, "#ffffff", 2).mean() > 0.5
    for colour in (INK, BLUE, VERMILION):
        assert near(pixels, colour).sum() > 300
