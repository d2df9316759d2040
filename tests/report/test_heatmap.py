"""Heatmaps: every word is there, coloured by its relevance, and nothing in a text can break the page."""

import re

import matplotlib.image
import pytest
import torch

from hf_compress import Relevance, heatmap
from tests.helpers.web_pages import check_self_contained

WORDS = ["<b>", "two & three", " five", "[PAD]", "\n"]
VALUES = torch.tensor([[2.0, -1.0, 0.5, 0.0, 0.1]])
ONE = Relevance(torch.tensor([1.25]), {}, VALUES, [WORDS], targets=["the class <i>"], composite="cp")
TOLD = "Explained: the class <i> (logit 1.25)"
LEGEND = "Orange speaks for what is explained, blue against it. Rules: cp."


def luminance(colour):
    """Relative luminance of red, green and blue from 0 to 255 (WCAG 2)."""
    lit = [c / 255 / 12.92 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in colour]
    return 0.2126 * lit[0] + 0.7152 * lit[1] + 0.0722 * lit[2]


def test_pages(tmp_path):
    """The strongest is orange, its negative half as blue; padding is left out; marks of HTML are text."""
    page = heatmap(ONE, tmp_path / "new" / "page.html").read_text(encoding="utf-8")
    spans = re.findall(r'<span style="background:rgb\((.*?)\);color:#\w+" title="(.*?)">(.*?)</span>', page)
    assert [(float(value), word) for _, value, word in spans] == [
        (2.0, "&lt;b&gt;"),
        (-1.0, "two &amp; three"),
        (0.5, " five"),
        (0.1, "⏎<br>"),
    ]
    colours = [tuple(map(int, colour.split(","))) for colour, _, _ in spans]
    assert colours[0] == (0xD5, 0x5E, 0)
    assert colours[1] == (128, 184, 216)  # half of 0072B2
    checked = check_self_contained(page)
    assert TOLD in checked.words
    assert LEGEND in checked.words


def test_every_word_can_be_read(tmp_path):
    """Text on any colour has the contrast that WCAG asks for."""
    values = torch.linspace(-1, 1, 41)[None]
    page = heatmap(Relevance(torch.ones(1), {}, values, [["word"] * 41]), tmp_path / "a.html").read_text()
    found = re.findall(r"background:rgb\((\d+),(\d+),(\d+)\);color:(#\w+)", page)
    assert len(found) == 41
    assert {ink for *_, ink in found} == {"#000", "#fff"}
    for *paper, ink in found:
        light, dark = sorted((luminance(map(int, paper)), 1.0 if ink == "#fff" else 0.0), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.5


def test_pictures_say_what_is_explained(tmp_path):
    picture = heatmap(ONE, tmp_path / "a.svg").read_text()
    assert TOLD.replace("<", "&lt;").replace(">", "&gt;") in picture
    assert LEGEND in picture


@pytest.mark.parametrize("words", [WORDS, ["$x", "^", "\\frac{", "_"], ["word"] * 40])
def test_pictures(words, tmp_path):
    """Nothing in a text is taken for a formula; long texts go over several rows."""
    values = torch.linspace(-1, 1, len(words))[None]
    path = heatmap(Relevance(torch.ones(1), {}, values, [words]), tmp_path / "a.png")
    picture = matplotlib.image.imread(path)
    assert picture.shape[0] > 20
    orange, blue = picture[..., 0] - picture[..., 2], picture[..., 2] - picture[..., 0]
    assert orange.max() > 0.5
    assert blue.max() > 0.5


def test_without_relevance_all_is_white(tmp_path):
    page = heatmap(Relevance(torch.ones(1), {}, torch.zeros(1, 2), [["a", "b"]]), tmp_path / "a.html").read_text()
    assert page.count("rgb(255,255,255)") == 2


@pytest.mark.parametrize(
    ("relevance", "name", "message"),
    [
        (Relevance(torch.ones(1), {}), "a.html", "no words to show"),
        (Relevance(torch.ones(1), {}, VALUES), "a.html", "tokenizer="),
        (ONE, "a.pdf", "png or .svg"),
    ],
)
def test_what_cannot_be_drawn(relevance, name, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        heatmap(relevance, tmp_path / name)
    assert list(tmp_path.iterdir()) == []
