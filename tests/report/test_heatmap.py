"""Heatmaps: every word is there, coloured by its relevance, and nothing in a text can break the page."""

import re

import matplotlib.image
import pytest
import torch

from hf_compress import Relevance, heatmap

WORDS = ["<b>", "two & three", " five", "[PAD]", "\n"]
VALUES = torch.tensor([[2.0, -1.0, 0.5, 0.0, 0.1]])
ONE = Relevance(torch.ones(1), {}, VALUES, [WORDS])


def test_pages(tmp_path):
    """The strongest is red, its negative half as blue; padding is left out; marks of HTML are text."""
    page = heatmap(ONE, tmp_path / "new" / "page.html").read_text(encoding="utf-8")
    spans = re.findall(r'<span style="background:rgb\((.*?)\)" title="(.*?)">(.*?)</span>', page)
    assert [(float(value), word) for _, value, word in spans] == [
        (2.0, "&lt;b&gt;"),
        (-1.0, "two &amp; three"),
        (0.5, " five"),
        (0.1, "⏎<br>"),
    ]
    colours = [tuple(map(int, colour.split(","))) for colour, _, _ in spans]
    assert colours[0] == (255, 0, 0)
    assert colours[1] == (128, 128, 255)
    assert "http" not in page


@pytest.mark.parametrize("words", [WORDS, ["$x", "^", "\\frac{", "_"], ["word"] * 40])
def test_pictures(words, tmp_path):
    """Nothing in a text is taken for a formula; long texts go over several rows."""
    values = torch.linspace(-1, 1, len(words))[None]
    path = heatmap(Relevance(torch.ones(1), {}, values, [words]), tmp_path / "a.png")
    picture = matplotlib.image.imread(path)
    assert picture.shape[0] > 20
    red, blue = picture[..., 0] - picture[..., 2], picture[..., 2] - picture[..., 0]
    assert red.max() > 0.5
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
