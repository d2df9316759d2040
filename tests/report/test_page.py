"""The page of a history: all that the report tells, text that stays text, and nothing outside it."""

import json
import math

import pytest

from hf_compress.report.page import EVALUATION_FILE, read_evaluation, report_page
from hf_compress.report.stages import Size, Stage, Step
from tests.helpers.browser import DARK, inside, measured, near, picture
from tests.helpers.cards import result
from tests.helpers.web_pages import Checked, check_self_contained

EVIL = "<script>alert(1)</script>&amp;\"'><img/src=x>\u202e\x00\t-->${x}"
PACKED = {"edit": "PackLinear", "module": "h.0.up", "group_size": 16, "planes": [4, 2, 2], "symmetric": False}


def stage(**changes):
    told = {
        "method": "drop_blocks",
        "config": {"num_blocks": 2, "criterion": "last", "ratio": None},
        "before": Size(1000, 2000, {"h": 12}),
        "after": Size(800, 1500, {"h": 10}),
        "edits": [{"edit": "RemoveBlocks", "stack": "h", "blocks": [3, 4]}],
        "notes": {"block_influence": [0.1 * (block + 1) for block in range(12)]},
        "steps": [Step("measure", 3.0), Step("apply and check", 1.5), Step("lost", math.nan)],
        "calibration": {"samples": 8, "tokens": 4096, "truncated": 0},
        "parity": True,
        "environment": {"python": "3.11", "torch": "2.9"},
    }
    return Stage(**(told | changes))


def test_all_of_it_is_told():
    second = stage(method="lrp", before=Size(800, 1500, {"h": 10}), after=Size(800, 500, {"h": 10}), edits=[PACKED])
    evaluation = json.loads(result(800).to_json())
    page = report_page([stage(), second], "/home/me/private/Base-1B", "small", evaluation)
    checked = check_self_contained(page)
    for told in (
        "small: what was done to it", "Made from Base-1B", "500 bytes (-75.0%)", "800 (-20.0%)", "10 of 12", "9.0 s",
        "1. drop_blocks", "h: left out: 3–4", "left out: 3–4", "num_blocks", "criterion", "last", "measure", "3.0",
        "4.5 s", "8 samples, 4,096 tokens", "Reload check: passed", "python 3.11, torch 2.9", "12 entries",
        "block influence", "2. lrp", "https://arxiv.org/abs/2507.05286", "PackLinear", "50.0%",
        "perplexity (3 documents, 300 tokens)", "17.00 ± 0.85", "cloze acc", "0.625 ± 0.034", 
        "maths exact_match,strict", "stored bytes", "3,200",
    ):  # fmt: skip
        assert told in checked.words, told
    assert "private" not in page
    assert "nan" not in checked.words.lower().split()
    assert sum(tag == "svg" for tag, _ in checked.tags) == 2
    assert "prefers-color-scheme:dark" in page
    assert "@media print" in page


def test_of_named_data_the_place_is_not_told():
    facts = {"source": "/home/me/private/texts.jsonl", "of": 10_000, "seed": 0, "batch_size": 8, "text_column": "body"}
    page = report_page([stage(calibration={**facts, "samples": 256, "tokens": 4096, "truncated": 0})], "m", "small")
    assert (
        "256 samples of 10,000, drawn with seed 0, 4,096 tokens; from texts.jsonl" in check_self_contained(page).words
    )
    assert "private" not in page


@pytest.mark.filterwarnings("ignore:Glyph")
def test_no_text_breaks_it():
    """Names, settings, notes and figures from anywhere are text; what is unseen is written out."""
    odd = stage(
        method=EVIL, config={EVIL: EVIL}, before=Size(10, 10, {EVIL: 3}), after=Size(10, 9, {EVIL: 2}),
        edits=[{"edit": EVIL, "stack": EVIL, "blocks": [1], EVIL: EVIL}, {"edit": "New", EVIL: [EVIL]}],
        notes={EVIL: EVIL, "more": {EVIL: [EVIL]}}, steps=[Step(EVIL, 1.0)], calibration={EVIL: 3},
        environment={EVIL: EVIL},
    )  # fmt: skip
    scores = {"scores": [{"task": EVIL, "metric": EVIL, "value": EVIL}, EVIL], "throughput": EVIL, "perplexity": {}}
    page = report_page([odd], EVIL, EVIL, {**scores, "parameters": EVIL})
    plain = Checked(report_page([stage(notes={**stage().notes, "a": [1]})], "a", "b", {"scores": []}))
    checked = check_self_contained(page)
    assert {tag for tag, _ in checked.tags} <= {tag for tag, _ in plain.tags}
    assert checked.words.count("<script>alert(1)</script>&amp;\"'><img/src=x>") > 20
    assert not any(character in page for character in ("\u202e", "\x00", "\t"))


@pytest.mark.parametrize(
    "notes",
    [{"block_influence": "x"}, {"blocks": [3]}, {"similarity": [[1, 2]]}, {"fits": {"a": 1}}, {"linears": [3]}],
)
def test_notes_that_cannot_be_drawn_are_told_all_the_same(notes):
    page = report_page([stage(notes=notes)], "a", "b")
    assert "not such as can be drawn" in page
    assert str(*notes) in Checked(page).words


def test_long_notes_are_cut():
    page = report_page([stage(notes={"values": list(range(30_000))})], "a", "b")
    assert "letters more" in page
    assert len(page) < 100_000


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "is no JSON"), ("[" * 100_000, "is no JSON"), ("[]", "is not what"), ('{"scores": 1}', "is not what")],
)
def test_another_evaluation_is_refused(content, message, tmp_path):
    assert read_evaluation(tmp_path) is None
    (tmp_path / EVALUATION_FILE).write_text(content)
    with pytest.raises(ValueError, match=f"{EVALUATION_FILE} {message}.*: move it away"):
        read_evaluation(tmp_path)


# --- as a browser shows it --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    """A page with wide tables, long words, a heatmap and many blocks."""
    blocks = 40
    similarity = [[1 / (1 + abs(i - j)) for j in range(blocks)] for i in range(blocks)]
    wide = stage(
        config={"a" * 90: "b" * 300, "nothing": None},
        before=Size(10**10, 2 * 10**10, {"model.layers": blocks}),
        after=Size(10**10, 10**9, {"model.layers": blocks - 2}),
        edits=[{"edit": "RemoveBlocks", "stack": "model.layers", "blocks": [3, 4]}],
        notes={"similarity": similarity},
    )
    packed = [PACKED | {"module": f"model.layers.{block}.{'long_' * 30}"} for block in range(60)]
    page = report_page([wide, stage(edits=packed)], "c" * 150, "small", {"scores": []})
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


MORE = """boxes: [...document.querySelectorAll('.box')].map(e => [e.clientWidth, e.scrollWidth, e.clientHeight]),
  plots: boxes('.plot'), rects: boxes('.plot image')"""


@pytest.mark.parametrize("width", [500, 1000, 1800])
def test_nothing_leaves_the_window(width, shown):
    """Wide tables and pictures scroll inside their boxes, which are never higher than a window."""
    places = measured(shown, width, MORE)
    assert (places["page"], places["outside"]) == (width, [])
    assert any(scroll > client for client, scroll, _ in places["boxes"])
    assert max(high for _, _, high in places["boxes"][1:] if high) <= (512 if width < 900 else 1200)
    assert len(places["plots"]) == 2


@pytest.mark.parametrize(("arguments", "paper", "ink"), [((), "#ffffff", "#22272e"), ((DARK,), "#15191e", "#e4e8ec")])
def test_it_is_read_in_light_and_in_dark(arguments, paper, ink, shown):
    """The heatmap is drawn too, which is a picture in the page: black on white in either."""
    pixels, places = picture(shown, 1000, *arguments), measured(shown, 1000, MORE)
    assert inside(near(pixels, paper, 2), places["title"]).mean() > 0.5
    assert inside(near(pixels, ink), places["title"]).sum() > 100
    plot = inside(pixels, places["plots"][0], 0)[:900]
    assert near(plot, "#ffffff", 2).mean() > 0.2
    heatmap = inside(pixels, places["rects"][0], 0)
    assert near(heatmap, "#00224e", 30).mean() > 0.2  # cividis, where blocks differ
