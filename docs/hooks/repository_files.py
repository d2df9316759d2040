"""Files outside docs/ that pages link to, such as ../README.md, become part of the site, and the links lead there.

So a link has one form, which works on GitHub too. What a page outside docs/ links to is taken along as well.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

OUTSIDE = "repository/"  # where the site keeps what is outside docs/
FIRST = ("README.md", "CONTRIBUTING.md")  # pages of the navigation
LINK = re.compile(r"(\]\()([^)\s#]+)(#[^)\s]*)?(?=\))")
CODE = re.compile(r"^(```|~~~).*?^\1", re.DOTALL | re.MULTILINE)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Take along what is linked, from page to page, until there is nothing new."""
    root = Path(config.config_file_path).parent
    waiting = [*FIRST, *(f"docs/{file.src_uri}" for file in files.documentation_pages())]
    seen = set(waiting)
    for place in waiting:
        if not place.startswith("docs/"):
            kind = InclusionLevel.INCLUDED if place in FIRST else InclusionLevel.NOT_IN_NAV
            files.append(File.generated(config, OUTSIDE + place, abs_src_path=str(root / place), inclusion=kind))
        if place.endswith(".md"):
            for link in linked((root / place).read_text(encoding="utf-8"), place):
                if link not in seen and (root / link).is_file():
                    seen.add(link)
                    waiting.append(link)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Let relative links lead from where the page is in the site to where their target is there."""
    here = page.file.src_uri
    place = in_repository(here)

    def led(match: re.Match[str]) -> str:
        target = target_of(match[2], place)
        if target is None:
            return match[0]
        return match[1] + posixpath.relpath(in_site(target), posixpath.dirname(here) or ".") + (match[3] or "")

    return LINK.sub(led, markdown)


def linked(markdown: str, place: str) -> list[str]:
    """The paths in the repository that a page at `place` links to, outside its blocks of code."""
    targets = (target_of(match[2], place) for match in LINK.finditer(CODE.sub("", markdown)))
    return [target for target in targets if target is not None]


def target_of(link: str, place: str) -> str | None:
    """The path in the repository that a link on the page at `place` names; None for addresses elsewhere."""
    if re.match(r"[a-z]+:|/", link):
        return None
    return posixpath.normpath(posixpath.join(posixpath.dirname(place), link))


def in_repository(source: str) -> str:
    """The path in the repository of what the site has at `source`."""
    return source.removeprefix(OUTSIDE) if source.startswith(OUTSIDE) else f"docs/{source}"


def in_site(place: str) -> str:
    """The opposite of `in_repository`."""
    return place.removeprefix("docs/") if place.startswith("docs/") else OUTSIDE + place
