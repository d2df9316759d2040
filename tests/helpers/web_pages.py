"""HTML pages, as a parser reads them."""

import re
from html.parser import HTMLParser


class Checked(HTMLParser):
    """Raises where tags are not balanced; keeps every tag with its attributes, and the text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words = ""
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "br", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> without a beginning"
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words += data


def check_self_contained(page: str) -> Checked:
    """No script, nothing loaded, and links within the page that all lead somewhere; what the parser has read."""
    checked = Checked(page)
    assert page.startswith("<!doctype html>")
    assert not re.search(r"url\((?!#)|@import|xmlns", page)
    ids = [attributes["id"] for _, attributes in checked.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    for tag, attributes in checked.tags:
        assert tag not in ("script", "link", "iframe", "object", "embed", "img")
        assert not {"src", "srcset", "action"} & set(attributes)
        assert not any(name.startswith("on") for name in attributes)
        for link in (attributes.get("href"), attributes.get("xlink:href")):
            if link is not None and link.startswith("#"):
                assert link[1:] in ids
            elif link is not None:  # to a paper, or a picture in the page itself
                assert link.startswith("https://arxiv.org/abs/" if tag == "a" else "data:image/png;base64,")
    for place in re.findall(r"url\(#(.*?)\)", page):
        assert place in ids
    return checked
