"""Feature reports: what their pages say, read from the HTML, and the same figures made by hand."""

import html
import re
from types import SimpleNamespace

import pytest
import torch

from hf_compress.calibration.data import DataOptions
from hf_compress.features.report import feature_report


def report(tmp_path, model, texts, tokenizer, found=None, **more) -> str:
    more = {"options": DataOptions(batch_size=3)} | more
    path = feature_report(model, texts, tokenizer, tmp_path / "new" / "page.html", bottlenecks=found, **more)
    assert path == tmp_path / "new" / "page.html"
    return path.read_text(encoding="utf-8")


def cards(page: str) -> list[SimpleNamespace]:
    """The cards of a page, in their order."""
    return [card(text) for text in re.findall(r"<article>(.*?)</article>", page, re.S)]


def card(text: str) -> SimpleNamespace:
    head = re.search(r"<h3>#(\d+) .*? · (\S+)% of the energy", text)
    figures = re.search(r"active on (\S+)% .*mean \|z\| (\S+) · largest \|z\| (\S+)</p>", text)
    examples = re.findall(
        r'<li title="text (\d+), token (\d+)"><b class="(\w+)">(\S+)</b><span class="text">(.*?)</span></li>', text
    )
    places = {
        style: [(int(t), int(p), float(v)) for t, p, s, v, _ in examples if s == style] for style in ("pos", "neg")
    }
    words = [
        [(html.unescape(w), float(v)) for w, v in re.findall(r"<span>(.*?) <small>(.*?)</small></span>", part)]
        for part in re.findall(r'<div class="words">(.*?)</div>', text)
    ]
    return SimpleNamespace(
        index=int(head[1]),
        energy=float(head[2]) / 100,
        figures=tuple(map(float, figures.groups())),
        places=places,
        contexts=[context for *_, context in examples],
        words=words,
    )


def marked(one: SimpleNamespace) -> list[tuple[int, int, str, str, str]]:
    """(text, token, what stands before, the token, what stands behind) of each example of a card."""
    places = one.places["pos"] + one.places["neg"]
    parts = [re.fullmatch(r"(.*)<mark>(.*)</mark>(.*)", context).groups() for context in one.contexts]
    return [
        (text, token, before, word.strip("␣"), after)
        for (text, token, _), (before, word, after) in zip(places, parts, strict=True)
    ]


@torch.no_grad()
def streams(model, tokenizer, texts, layer) -> list[torch.Tensor]:
    """What leaves a block, of each text by itself, (tokens, hidden); NaN at special tokens."""
    found = []
    for text in texts:
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        stream = model(ids, output_hidden_states=True).hidden_states[layer + 1][0].clone()
        stream[torch.isin(ids[0], torch.tensor(tokenizer.all_special_ids))] = torch.nan
        found.append(stream)
    return found


def codes_of(found, model, tokenizer, texts) -> list[torch.Tensor]:
    """What the bottleneck behind block 1 makes of each text, (tokens, features); NaN at special tokens."""
    rows = streams(model, tokenizer, texts, 1)
    return [torch.where(row.isnan()[:, :1], torch.nan, found.places[1].module.encode(row)[0]) for row in rows]


def largest(codes: list[torch.Tensor], feature: int, count: int) -> list[tuple[int, int, float]]:
    """By hand: (text, token, value) of the largest codes above 0, at most two a text."""
    every = [(float(v), text, token) for text, code in enumerate(codes) for token, v in enumerate(code[:, feature])]
    chosen: list[tuple[int, int, float]] = []
    for value, text, token in sorted((one for one in every if one[0] > 0), reverse=True):
        if sum(one[0] == text for one in chosen) < 2:
            chosen.append((text, token, value))
    return chosen[:count]


def close(found, expected):
    assert [one[:2] for one in found] == [one[:2] for one in expected]
    assert [one[2] for one in found] == pytest.approx([one[2] for one in expected], rel=6e-3)
