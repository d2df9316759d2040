"""The HTML of a feature report: one page with nothing outside it, no script, and every word of the texts escaped."""

from __future__ import annotations

import html
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

from hf_compress.features.charts import spectrum, training_curve
from hf_compress.features.reconstruction import Reconstruction
from hf_compress.report.canvas import BLUE, GREY, INK, VERMILION

_STYLE = f"""
:root{{color-scheme:light dark;--paper:#fff;--panel:#f5f6f8;--line:{GREY};--ink:{INK};--soft:#5a6470;--blue:{BLUE};
--red:{VERMILION};--mark:#ffe08a}}
@media(prefers-color-scheme:dark){{:root{{--paper:#15191e;--panel:#1e242b;--line:#4a545f;--ink:#e4e8ec;--soft:#9aa5b1;
--blue:#56b4e9;--red:#ff8a3d;--mark:#6b5200}}}}
*{{box-sizing:border-box}}
body{{font:16px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--paper);max-width:72rem;margin:0 auto;
padding:1.5rem 1.25rem 4rem;overflow-wrap:anywhere}}
h1{{font-size:1.6rem;margin:0}}h2{{font-size:1.3rem;margin:2.5rem 0 .25rem;padding-top:1rem;
border-top:2px solid var(--line)}}
h3{{font-size:1.05rem;margin:1.5rem 0 .4rem}}h4{{font-size:.85rem;margin:.7rem 0 .2rem;color:var(--soft)}}
p{{margin:.35rem 0}}.soft{{color:var(--soft);font-size:.9rem}}a{{color:var(--blue)}}nav a{{margin-right:1rem}}
dl{{display:flex;flex-wrap:wrap;gap:.5rem;margin:.75rem 0}}dl div{{background:var(--panel);border-radius:.4rem;
padding:.4rem .8rem}}dt{{font-size:.8rem;color:var(--soft)}}dd{{margin:0;font-size:1.15rem;font-weight:600}}
.charts,.cards{{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,27rem),1fr));gap:1rem}}
.charts h3{{margin-top:0}}.long{{max-height:12rem;overflow:auto}}
figure{{margin:0}}figcaption{{font-size:.9rem;font-weight:600}}svg{{display:block;width:100%;height:auto}}
svg text{{font:13px system-ui,sans-serif;fill:var(--ink)}}.grid{{stroke:var(--line);stroke-width:.6}}
.curve{{fill:none;stroke-width:2;stroke-linejoin:round}}.blue{{stroke:var(--blue)}}.red{{stroke:var(--red)}}
.dots{{fill:var(--blue)}}.crosses{{stroke:var(--red);fill:none;stroke-width:1.5}}
.pos{{color:var(--blue)}}.neg{{color:var(--red)}}
article{{background:var(--panel);border-radius:.5rem;padding:.7rem .9rem}}article h3{{margin:0}}
.bar{{height:.35rem;background:var(--line);border-radius:.2rem;margin:.3rem 0}}
.bar i{{display:block;height:100%;background:var(--blue);border-radius:.2rem}}
ol{{list-style:none;margin:0;padding:0}}li{{display:grid;grid-template-columns:4.2rem 1fr;gap:.5rem;font-size:.9rem;
padding:.15rem 0}}li b{{text-align:right;font-variant-numeric:tabular-nums}}
.text{{white-space:pre-wrap;unicode-bidi:isolate}}mark{{background:var(--mark);color:inherit;font-weight:600;
border-radius:.2rem;padding:0 .15em;white-space:pre-wrap}}
.words{{display:flex;flex-wrap:wrap;gap:.3rem;font-size:.9rem}}.words span{{border:1px solid var(--line);
border-radius:.25rem;padding:0 .35rem;white-space:pre-wrap;unicode-bidi:isolate}}
.words small{{color:var(--soft);white-space:nowrap}}
"""


@dataclass(frozen=True)
class Example:
    """A token at which a feature is large: its code, the token, what stands around it, and where that is."""

    value: float
    before: str
    token: str
    after: str
    place: str


@dataclass(frozen=True)
class Card:
    """One feature.

    Attributes:
        index: among the features that were trained.
        activity: share of the tokens where its code is not 0.
        mean, largest: of |z|, over all tokens.
        energy: share of that of all features, z²·‖W′_i‖².
        above, below: where the code is largest, and where it is most negative.
        raises, lowers: tokens, and by how much their logits change for each unit of the code.
    """

    index: int
    activity: float
    mean: float
    largest: float
    energy: float
    above: Sequence[Example]
    below: Sequence[Example]
    raises: Sequence[tuple[str, float]]
    lowers: Sequence[tuple[str, float]]


@dataclass(frozen=True)
class Section:
    """One bottleneck.

    Attributes:
        name: such as "block 3"; path: of the block.
        form: in words, what the bottleneck does.
        trained: how many features were trained; None where nobody knows.
        quality: on the texts of the report.
        curve: as of `FittedBottleneck`; empty where it is not known, or nothing was trained in steps.
        importance: of every feature that was trained; empty where it is not known.
        kept: indices of those that the bottleneck has; None where it is not known which of the trained they are.
        dead, dead_rule: those of the features kept that are never active, and what that means.
        cards, logits: the most important features, and what is to be said of their effects on logits.
        remarks: whatever else there is to say.
    """

    name: str
    path: str
    form: str
    features: int
    trained: int | None
    quality: Reconstruction
    curve: dict[str, list[float]]
    importance: Sequence[float]
    kept: Sequence[int] | None
    dead: Sequence[int]
    dead_rule: str
    cards: Sequence[Card]
    logits: str
    remarks: Sequence[str] = ()


def page(title: str, sections: Sequence[Section]) -> str:
    """The whole page."""
    links = "".join(f'<a href="#s{i}">{_text(s.name)}</a>' for i, s in enumerate(sections))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{_text(title)}</title><style>{_STYLE}</style></head><body><h1>{_text(title)}</h1>"
        '<p class="soft">Features are ranked by the mean of z²·‖W′‖², the energy of the code z times the norm of the '
        "decoder’s row W′, on the texts of this report. Padding and special tokens enter nothing. Spaces of single "
        "tokens are shown as ␣, new lines as ⏎, tabs as ⇥.</p>"
        f"<nav>{links}</nav>{''.join(_section(s, i) for i, s in enumerate(sections))}</body></html>\n"
    )


def _section(section: Section, number: int) -> str:
    quality, trained = section.quality, section.trained
    figures = {
        "features kept": f"{section.features:,}" + ("" if trained is None else f" of {trained:,}"),
        "active a token": f"{quality.l0:.4g}",
        "explained variance": f"{quality.explained_variance:.4f}",
        "dead": f"{len(section.dead):,}",
        "tokens seen": f"{quality.tokens:,}",
    }
    boxes = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in figures.items())
    remarks = "".join(f"<p>{_text(remark)}</p>" for remark in section.remarks)
    dead = ", ".join(f"#{index}" for index in section.dead) or "none"
    cards = "".join(_card(card, rank) for rank, card in enumerate(section.cards, 1))
    return (
        f'<section id="s{number}"><h2>Behind {_text(section.name)}</h2>'
        f'<p class="soft">{_text(section.path)} · {_text(section.form)}</p><dl>{boxes}</dl>{remarks}'
        f'<div class="charts">{training_curve(section.curve)}{spectrum(section.importance, section.kept)}'
        f"<div><h3>Dead features: {len(section.dead):,} of {section.features:,}</h3>"
        f'<p class="soft">{_text(section.dead_rule)}</p><p class="long">{dead}</p></div></div>'
        f"<h3>The {len(section.cards)} most important features</h3>"
        f'<p class="soft">{_text(section.logits)}</p><div class="cards">{cards}</div></section>'
    )


def _card(card: Card, rank: int) -> str:
    parts = [
        f'<article><h3>#{card.index} <span class="soft">rank {rank} · {_percent(card.energy)} of the energy</span></h3>'
        f'<div class="bar"><i style="width:{100 * card.activity:.1f}%"></i></div>'
        f'<p class="soft">active on {_percent(card.activity)} of the tokens · mean |z| {card.mean:.3g} · largest |z| '
        f"{card.largest:.3g}</p>"
    ]
    for name, style, examples in (("Most positive", "pos", card.above), ("Most negative", "neg", card.below)):
        if examples:
            rows = "".join(_example(example, style) for example in examples)
            parts.append(f"<h4>{name}</h4><ol>{rows}</ol>")
    for name, words in (("Raises the logits of", card.raises), ("Lowers the logits of", card.lowers)):
        if words:
            chips = "".join(f"<span>{_token(word)} <small>{value:+.3g}</small></span>" for word, value in words)
            parts.append(f'<h4>{name}</h4><div class="words">{chips}</div>')
    return "".join(parts) + "</article>"


def _example(example: Example, style: str) -> str:
    text = f"{_text(example.before)}<mark>{_token(example.token)}</mark>{_text(example.after)}"
    return (
        f'<li title="{_text(example.place)}"><b class="{style}">{example.value:+.3g}</b>'
        f'<span class="text">{text}</span></li>'
    )


def _percent(share: float) -> str:
    return f"{100 * share:.3g}%"


def _token(token: str) -> str:
    """A token by itself, of which blanks are seen too."""
    return _text(token.replace(" ", "␣"))


def _text(text: str) -> str:
    """Text as HTML; what would be unseen, or turn the page's own order around, is written out."""
    return html.escape("".join(_visible(character) for character in text))


def _visible(character: str) -> str:
    code, category = ord(character), unicodedata.category(character)
    if character in "\n\t":
        return "⏎" if character == "\n" else "⇥"
    if category == "Cc":
        return chr(0x2400 + code) if code < 0x20 else f"⟨U+{code:04X}⟩"
    if category in ("Cs", "Zl", "Zp") or unicodedata.bidirectional(character) in _TURNS:
        return f"⟨U+{code:04X}⟩"
    return character


_TURNS = ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")
