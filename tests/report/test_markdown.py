"""Texts from elsewhere: in a model card, they break neither Markdown nor YAML, and are shown as they are."""

from functools import cache

import pytest
from huggingface_hub import ModelCard
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hf_compress.evaluation.evaluate import TaskScore
from hf_compress.evaluation.size import parameter_count, stored_bytes
from hf_compress.report.card import model_card
from hf_compress.report.card_facts import CardDetails
from hf_compress.report.markdown import escape, fence, in_words, one_line
from hf_compress.report.report import CompressionReport
from hf_compress.report.stages import Size, Stage, Step
from tests.helpers.cards import PARSER, result
from tests.helpers.language import tiny_llama

LINK = {"link_open", "link_close"}
OTHER_BLOCKS = {"html_block", "hr", "blockquote_open", "ordered_list_open", "code_block"}
SECTIONS = ["How to load it", "Size", "Evaluation", "What was changed", "How it was made", "Limitations"]
NASTY = [
    "---\nlicense: mit\n---",
    "a | b \\| c",
    "`code` ``` ~~~",
    "a\n```\n# b\n````\n~~~",
    "[x](https://evil.example) ![y](z) <b>bold</b> <!-- -->",
    "{{ 7 * 7 }} {% raw %}",
    "# title\n\n## Evaluation\n===\n***\n1. one",
    "__a__ *b* ~~c~~ $$d$$ \\(e\\)",
    "a: b # c\n- d\r\n\t\x00\u202e\ud800",
    "'\"\\n&amp;&#124;",
]
SPECIAL = st.text(
    alphabet=st.sampled_from("|`*_[]<>#-=+~$\\&{}!().:/'\"19 aZ\n\r\t\x00\x85\u2028\u202e\ud800"), max_size=30
)
TEXTS = st.one_of(SPECIAL, st.text(max_size=20), st.sampled_from(NASTY))


@settings(max_examples=300, deadline=None)
@given(TEXTS)
@example("1. one")
@example("2) two")
@example("$$a$$ \\(b\\)")
def test_escaped_text_is_shown_as_it_is(text):
    line = one_line(text)
    assert "$" not in escape(text)  # nor anything else that the Hub takes for a formula
    assert "\\\\(" not in escape(text)
    for document in ("# {}", "- {}", "[{}](/x)", "|a|b|\n|-|-|\n|{}|1|"):
        tokens = PARSER.parse(document.format(escape(text)))
        inline = [child for token in tokens if token.type == "inline" for child in token.children]
        assert {child.type for child in inline} <= {"text", *LINK}
        shown = "".join(child.content for child in inline)
        assert shown == (f"ab{line}1" if "\n" in document else line)
    paragraph = PARSER.parse(f"before\n{escape(text)}")
    assert [token.type for token in paragraph] == ["paragraph_open", "inline", "paragraph_close"]


@settings(max_examples=200, deadline=None)
@given(TEXTS)
@example("a\n```\n# b\n````\nc")
def test_nothing_closes_a_code_block(text):
    tokens = PARSER.parse(f"x\n\n{fence(text, 'bash')}\n\ny")
    assert [token.type for token in tokens if token.nesting == 0] == ["inline", "fence", "inline"]
    block = next(token for token in tokens if token.type == "fence")
    assert block.info == "bash"
    assert one_line(block.content) == one_line(text)


@cache
def nasty_base():
    """A model, once for all examples."""
    return tiny_llama()


@settings(max_examples=60, deadline=None)
@given(st.lists(TEXTS, min_size=12, max_size=12))
def test_no_text_breaks_the_card(texts):
    name, base, method, stack, field, license, about, task, control, command, limit, version = texts
    model = nasty_base()
    count = parameter_count(model)
    size = Size(count, stored_bytes(model), {stack: 2})
    edit, steps = {"edit": method, "stack": stack, field: about}, [Step(method, 1.0)]
    told = {name: about}, steps, {field: 3}, True, {field: version}
    model.compression_report = CompressionReport(base, [Stage(method, {field: about}, size, size, [edit], *told)])
    scores = (TaskScore(task, method, 0.5, 0.1, True, 3),)
    card = model_card(
        model,
        result=result(count, scores=scores),
        controls={control: result(count, scores=scores)},
        command=command,
        details=CardDetails(
            name=name, license=license, language=[field], datasets=[base, about], calibration=about, evaluation=about,
            training=version, limitations=[limit, about],
        ),
    )  # fmt: skip
    str(card).encode()
    data = ModelCard(str(card)).data
    assert data.to_dict() == card.data.to_dict()
    assert data.license == (one_line(license) or None)
    assert data.tags[0] == "hf-compress"
    assert data.eval_results[1].dataset_name == one_line(task)
    tokens = PARSER.parse(card.text)
    headings = [tokens[i + 1].content for i, token in enumerate(tokens) if token.type == "heading_open"]
    assert headings[1:] == SECTIONS
    assert sum(token.type == "table_open" for token in tokens) == 3
    assert sum(token.type == "bullet_list_open" for token in tokens) == 2
    points = 6 + 3 + len([text for text in (limit, about) if one_line(text)])
    assert sum(token.type == "list_item_open" for token in tokens) == points
    assert sum(token.type == "fence" for token in tokens) == (3 if command.strip() else 2)
    assert not {token.type for token in tokens} & OTHER_BLOCKS
    inline = [child for token in tokens if token.type == "inline" for child in token.children]
    links = [child.attrs["href"] for child in inline if child.type == "link_open"]
    assert {child.type for child in inline} <= {
        "text",
        "softbreak",
        "code_inline",
        "strong_open",
        "strong_close",
        *LINK,
    }
    assert all(link.startswith("https://huggingface.co/") for link in links)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.1 + 0.2, "0.3"), ([], "none"), ([1, 2.5, "a"], "1, 2.5, a"), (None, "null"), ("~/x/y", "y"), (True, "true")],
)
def test_values_in_words(value, text):
    assert in_words(value) == text
