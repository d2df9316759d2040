"""What a card takes over from the base model's own card, in its folder or in the Hub's cache, and what not."""

from dataclasses import replace

import pytest
from huggingface_hub import ModelCard

from hf_compress.report.card import model_card
from hf_compress.report.card_base import BaseCard, base_card
from hf_compress.report.card_facts import CardDetails
from hf_compress.report.report import REPORT_FILE
from tests.helpers.cards import cut_down, restage

CARD = """---
license: other
license_name: gemma terms
license_link: https://example.org/terms
language: [en, de]
datasets: org/texts
base_model: org/Larger
---
# Base
license: mit
"""
SAID = BaseCard(("org/Larger",), "other", "gemma terms", "https://example.org/terms", ("en", "de"), ("org/texts",))


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "private" / "base"
    folder.mkdir(parents=True)
    (folder / "README.md").write_text(CARD)
    return folder


@pytest.fixture
def small(model, folder):
    """Made from the model in the folder."""
    small = cut_down(model)
    small.compression_report = replace(small.compression_report, base_model=str(folder))
    return small


def cached(monkeypatch, tmp_path, name, text):
    """The local cache of the Hub with one file of a repository."""
    place = tmp_path / "hub" / f"models--{name.replace('/', '--')}"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text("0123abc")
    (place / "snapshots" / "0123abc").mkdir(parents=True)
    (place / "snapshots" / "0123abc" / "README.md").write_text(text)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))


def test_a_card_beside_the_base_is_read(folder):
    assert base_card(str(folder)) == SAID


def test_a_card_in_the_hubs_cache_is_read(tmp_path, monkeypatch):
    cached(monkeypatch, tmp_path, "org/base", CARD)
    assert base_card("org/base") == SAID
    assert base_card("org/base", "0123abc") == SAID
    assert base_card("org/base", "fedcba9") == base_card("org/other") == base_card("") == BaseCard()


def test_it_is_taken_over(small, folder):
    card = model_card(small)
    data = ModelCard(str(card)).data
    assert (data.base_model, data.license, data.language) == ("org/Larger", "other", ["en", "de"])
    assert (data.get("license_name"), data.get("license_link")) == ("gemma terms", "https://example.org/terms")
    assert data.datasets == ["org/texts"]
    assert "base (made from [org/Larger](https://huggingface.co/org/Larger)), made smaller" in card.text
    assert "- **License:** [gemma terms](https://example.org/terms), as the base model's card says.\n" in card.text
    assert "- **Language:** en, de.\n" in card.text
    assert "private" not in str(card)


def test_what_is_given_wins(small):
    details = CardDetails(license="mit", language="fr", datasets=["me/more", "own"], base_model="org/base")
    card = model_card(small, details=details)
    assert (card.data.base_model, card.data.license, card.data.language) == ("org/base", "mit", ["fr"])
    assert card.data.datasets == ["org/texts", "me/more"]
    assert "license_name" not in str(card)
    assert "license_link" not in str(card)
    assert "- **License:** mit.\n" in card.text


def test_what_is_not_known_is_said(small, folder):
    (folder / "README.md").unlink()
    card = model_card(small)
    assert card.data.license is card.data.language is card.data.base_model is card.data.datasets is None
    assert "- **License:** not known here; the base model's own holds.\n" in card.text
    assert "- **Language:** not known here.\n" in card.text


@pytest.mark.parametrize(("origin", "told"), [("org/First", "org/First"), ("/home/me/first", None)])
def test_a_base_without_a_card_is_known_by_its_report(origin, told, small, folder):
    """Which says what the model in the folder was made from."""
    (folder / "README.md").unlink()
    replace(small.compression_report, base_model=origin).to_json(folder / REPORT_FILE)
    assert model_card(small).data.base_model == told


def test_a_merge_has_several_bases(small, folder):
    (folder / "README.md").write_text("---\nbase_model: [org/A, org/B]\n---\n")
    restage(small, edits=[{"edit": "PackLinear", "module": "a.0.b"}])
    card = model_card(small)
    assert card.data.base_model == ["org/A", "org/B"]
    assert card.data.get("base_model_relation") is None
    assert "[org/B](https://huggingface.co/org/B)" in card.text


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("no metadata", BaseCard()),
        ("---\nlicense: mit", BaseCard()),  # which never ends
        ("---\n- a list\n---", BaseCard()),
        ("---\nlicense: [mit, apache-2.0]\nlanguage: no\n---", BaseCard(language=("no",))),
        ("---\nlicense: 'a](x) **b**'\nlanguage: {a: b}\ndatasets: [1, ../x, a/b]\n---", BaseCard(datasets=("a/b",))),
        ("---\nlicense: mit\nlicense_link: javascript:alert(1)\nbase_model: /etc/passwd\n---", BaseCard(license="mit")),
    ],
)  # fmt: skip
def test_nothing_in_it_is_trusted(text, said, folder, caplog):
    (folder / "README.md").write_text(text)
    assert base_card(str(folder)) == said
    assert not caplog.records


@pytest.mark.parametrize(
    "content", [b"---\nlicense: [\n---\n", b"---\n!!python/object:os.system x\n---\n", b"---\n\xff"]
)
def test_one_that_cannot_be_read_is_passed_over_with_a_warning(content, folder, caplog):
    (folder / "README.md").write_bytes(content)
    (folder / REPORT_FILE).write_text("{}")
    assert base_card(str(folder)) == BaseCard()
    assert "says of the base model's licence is not known" in caplog.text
