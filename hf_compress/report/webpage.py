"""What all pages share: one HTML file with nothing outside it, no script, and every text in it escaped.

Their colours follow the reader's light or dark mode, wide parts scroll inside boxes of their own, and on paper nothing
is cut off.
"""

from __future__ import annotations

import html
import unicodedata
from collections.abc import Iterable, Mapping, Sequence

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
h3{{font-size:1.05rem;margin:1.5rem 0 .4rem}}
p{{margin:.35rem 0}}.soft{{color:var(--soft);font-size:.9rem}}a{{color:var(--blue)}}nav a{{margin-right:1rem}}
dl{{display:flex;flex-wrap:wrap;gap:.5rem;margin:.75rem 0}}dl div{{background:var(--panel);border-radius:.4rem;
padding:.4rem .8rem}}dt{{font-size:.8rem;color:var(--soft)}}dd{{margin:0;font-size:1.15rem;font-weight:600}}
.bar{{height:.35rem;background:var(--line);border-radius:.2rem;margin:.3rem 0}}
.bar i{{display:block;height:100%;background:var(--blue);border-radius:.2rem}}
"""
_TABLES = """
.box{overflow:auto;max-height:32rem;margin:.5rem 0}
table{border-collapse:collapse;font-size:.9rem;overflow-wrap:normal}
th,td{text-align:left;padding:.25rem .75rem .25rem 0;border-bottom:1px solid var(--line);vertical-align:top}
th{color:var(--soft);font-weight:600;position:sticky;top:0;background:var(--paper);white-space:nowrap}
.number{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
td .bar{width:12rem;margin:.5rem 0 0}
@media print{:root{--paper:#fff;--panel:#f5f6f8;--line:#bfc5cc;--ink:#22272e;--soft:#5a6470;--blue:#0072b2}
body{max-width:none;padding:0}.box{overflow:visible;max-height:none}th{position:static}
tr,figure,dl div{break-inside:avoid}h2,h3{break-after:avoid}}
"""

_TURNS = ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")  # what turns the order of letters around


def document(title: str, body: str, style: str = "", *, tables: bool = False, pictures: bool = False) -> str:
    """A whole page.

    Args:
        title: of the page, as text; it stands above all else, too.
        body: HTML.
        style: CSS beside the common one.
        tables: whether there are tables.
        pictures: whether there are pictures, in the page itself (data:).
    """
    policy = "default-src 'none'; style-src 'unsafe-inline'" + ("; img-src data:" if pictures else "")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escaped(title)}</title><style>{_STYLE}{_TABLES if tables else ''}{style}</style></head><body>"
        f"<h1>{escaped(title)}</h1>{body}</body></html>\n"
    )


def escaped(text: str) -> str:
    """Text as HTML; what would be unseen, or turn the page's own order around, is written out."""
    return html.escape("".join(_visible(character) for character in text))


def boxes(figures: Mapping[str, str]) -> str:
    """Figures, each in a box with its name, both text."""
    inside = "".join(f"<div><dt>{escaped(name)}</dt><dd>{escaped(value)}</dd></div>" for name, value in figures.items())
    return f"<dl>{inside}</dl>"


def bar(share: float) -> str:
    """A bar that is filled to a share of its width."""
    return f'<div class="bar"><i style="width:{100 * min(1.0, max(0.0, share)):.1f}%"></i></div>'


def table(header: Sequence[str], rows: Iterable[Sequence[str]], numbers: Sequence[int] = ()) -> str:
    """A table in a box of its own, which scrolls.

    Args:
        header: texts.
        rows: of cells that are HTML already.
        numbers: the columns whose cells stand at the right.
    """
    kinds = [' class="number"' if column in numbers else "" for column in range(len(header))]
    head = "".join(f"<th{kind}>{escaped(name)}</th>" for kind, name in zip(kinds, header, strict=True))
    body = "".join(
        f"<tr>{''.join(f'<td{kind}>{cell}</td>' for kind, cell in zip(kinds, row, strict=True))}</tr>" for row in rows
    )
    return f'<div class="box"><table><tr>{head}</tr>{body}</table></div>'


def _visible(character: str) -> str:
    code, category = ord(character), unicodedata.category(character)
    if character in "\n\t":
        return "⏎" if character == "\n" else "⇥"
    if category == "Cc":
        return chr(0x2400 + code) if code < 0x20 else f"⟨U+{code:04X}⟩"
    if category in ("Cs", "Zl", "Zp") or unicodedata.bidirectional(character) in _TURNS:
        return f"⟨U+{code:04X}⟩"
    return character
