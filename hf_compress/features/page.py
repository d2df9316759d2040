"""The HTML of a feature report: one page with nothing outside it, no script, and every word of the texts escaped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count

from hf_compress.features.charts import spectrum, training_curve
from hf_compress.features.reconstruction import Reconstruction
from hf_compress.report.webpage import bar, boxes, document, escaped

_STYLE = """
h4{font-size:.85rem;margin:.7rem 0 .2rem;color:var(--soft)}
.charts,.cards{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,27rem),1fr));gap:1rem}
.charts h3{margin-top:0}.long{max-height:12rem;overflow:auto}
figure{margin:0}figcaption{font-size:.9rem;font-weight:600}svg{display:block;width:100%;height:auto}
svg text{font:13px system-ui,sans-serif;fill:var(--ink)}.grid{stroke:var(--line);stroke-width:.6}
.curve{fill:none;stroke-width:2;stroke-linejoin:round}.blue{stroke:var(--blue)}.red{stroke:var(--red)}
.dots{fill:var(--blue)}.crosses{stroke:var(--red);fill:none;stroke-width:1.5}
.pos{color:var(--blue)}.neg{color:var(--red)}
article{background:var(--panel);border-radius:.5rem;padding:.7rem .9rem}article h3{margin:0}
ol{list-style:none;margin:0;padding:0}li{display:grid;grid-template-columns:4.2rem 1fr;gap:.5rem;font-size:.9rem;
padding:.15rem 0}li b{text-align:right;font-variant-numeric:tabular-nums}
.text{white-space:pre-wrap;unicode-bidi:isolate}mark{background:var(--mark);color:inherit;font-weight:600;
border-radius:.2rem;padding:0 .15em;white-space:pre-wrap}
.words{display:flex;flex-wrap:wrap;gap:.3rem;font-size:.9rem}.words span{border:1px solid var(--line);
border-radius:.25rem;padding:0 .35rem;white-space:pre-wrap;unicode-bidi:isolate}
.words small{color:var(--soft);white-space:nowrap}
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
    links = "".join(f'<a href="#s{i}">{escaped(s.name)}</a>' for i, s in enumerate(sections))
    told = (
        '<p class="soft">Features are ranked by the mean of z²·‖W′‖², the energy of the code z times the norm of the '
        "decoder’s row W′, on the texts of this report. Padding and special tokens enter nothing. Spaces of single "
        "tokens are shown as ␣, new lines as ⏎, tabs as ⇥.</p>"
    )
    return document(title, f"{told}<nav>{links}</nav>{''.join(map(_section, sections, count()))}", _STYLE)


def _section(section: Section, number: int) -> str:
    quality, trained = section.quality, section.trained
    figures = {
        "features kept": f"{section.features:,}" + ("" if trained is None else f" of {trained:,}"),
        "active a token": f"{quality.l0:.4g}",
        "explained variance": f"{quality.explained_variance:.4f}",
        "dead": f"{len(section.dead):,}",
        "tokens seen": f"{quality.tokens:,}",
    }
    remarks = "".join(f"<p>{escaped(remark)}</p>" for remark in section.remarks)
    dead = ", ".join(f"#{index}" for index in section.dead) or "none"
    cards = "".join(_card(card, rank) for rank, card in enumerate(section.cards, 1))
    return (
        f'<section id="s{number}"><h2>Behind {escaped(section.name)}</h2>'
        f'<p class="soft">{escaped(section.path)} · {escaped(section.form)}</p>{boxes(figures)}{remarks}'
        f'<div class="charts">{training_curve(section.curve)}{spectrum(section.importance, section.kept)}'
        f"<div><h3>Dead features: {len(section.dead):,} of {section.features:,}</h3>"
        f'<p class="soft">{escaped(section.dead_rule)}</p><p class="long">{dead}</p></div></div>'
        f"<h3>The {len(section.cards)} most important features</h3>"
        f'<p class="soft">{escaped(section.logits)}</p><div class="cards">{cards}</div></section>'
    )


def _card(card: Card, rank: int) -> str:
    parts = [
        f'<article><h3>#{card.index} <span class="soft">rank {rank} · {_percent(card.energy)} of the energy</span></h3>'
        f"{bar(card.activity)}"
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
    text = f"{escaped(example.before)}<mark>{_token(example.token)}</mark>{escaped(example.after)}"
    return (
        f'<li title="{escaped(example.place)}"><b class="{style}">{example.value:+.3g}</b>'
        f'<span class="text">{text}</span></li>'
    )


def _percent(share: float) -> str:
    return f"{100 * share:.3g}%"


def _token(token: str) -> str:
    """A token by itself, of which blanks are seen too."""
    return escaped(token.replace(" ", "␣"))
