"""Pages of feature reports that nothing in a text can break, and that need nothing beside them."""

from types import SimpleNamespace

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from hf_compress.features.words import _pieces
from tests.helpers.bottlenecks import TOP, fitted
from tests.helpers.pages import report
from tests.helpers.web_pages import Checked, check_self_contained

EVIL = ["<script>alert(1)</script>", "</style>", "&amp;", '"><img/src=x>', "\n", "\t", "\u202e", "\x00", "'", "-->"]


def evil_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: number for number, word in enumerate(["<pad>", "<unk>", "a", *EVIL])}
    backend = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", unk_token="<unk>")


def test_nothing_in_a_text_breaks_the_page(model, tmp_path):
    """Tokens, words of the vocabulary and the model's name alike; what is unseen is written out."""
    tokenizer = evil_tokenizer()
    ids = torch.arange(2, len(tokenizer)).repeat(2, 3)
    model.name_or_path = "<b>name</b> & co"
    plain = Checked(report(tmp_path, model, torch.full((2, 6), 2), tokenizer, fitted()))
    page = report(tmp_path, model, ids, tokenizer, fitted(), features=6)
    checked = Checked(page)
    assert {tag for tag, _ in checked.tags} <= {tag for tag, _ in plain.tags} | {"mark"}
    for seen in ("<script>alert(1)</script>", "</style>", "&amp;", '"><img/src=x>', "⏎", "⇥", "⟨U+202E⟩", "␀", "-->"):
        assert seen in checked.words
    assert "Features of <b>name</b> & co" in checked.words
    assert not any(character in page for character in ("\u202e", "\x00", "\t"))


def test_pages_are_whole_in_themselves(model, framing_tokenizer, texts, tmp_path):
    found = fitted(0)
    found.places[3] = fitted(3, form=TOP).places[3]
    page = report(tmp_path, model, texts, framing_tokenizer, found)
    checked = check_self_contained(page)
    assert "://" not in page
    links = [attributes["href"] for tag, attributes in checked.tags if tag == "a"]
    assert links == [f"#{attributes['id']}" for _, attributes in checked.tags if "id" in attributes]
    assert "prefers-color-scheme:dark" in page


def test_pieces_of_characters_that_tokens_share():
    """A byte of a character is a mark until the rest is there; spaces are told by the text before."""

    def decode(ids, **_):
        return b"".join({0: b"a", 1: b" b", 2: b"\xc3", 3: b"\xa9", 4: b"\n"}[i] for i in ids).decode(errors="replace")

    tokenizer = SimpleNamespace(decode=decode)
    assert _pieces(tokenizer, [0, 1, 2, 3, 4]) == ["a", " b", "\ufffd", "é", "\n"]
    assert _pieces(tokenizer, []) == []
