"""Pictures are drawn from whatever a report holds, and refused where it holds nothing."""

import sys
from dataclasses import replace

import pytest
import torch

from hf_compress.report.plots import plot_similarity
from hf_compress.report.report import CompressionReport
from hf_compress.report.stages import Size, Stage, Step

MERGE = {"edit": "MergeBlocks", "stack": "model.layers", "kept": 1, "absorbed": [2]}


@pytest.fixture
def report():
    before, after = Size(1000, 2000, {"model.layers": 4}), Size(750, 1500, {"model.layers": 3})
    stage = Stage("mka", {"method": "mka"}, before, after, [MERGE], {}, [Step("choose", 1.0)], {"samples": 2}, True)
    return CompressionReport("somewhere/model", [stage])


def told(report, **changes):
    """The report with another stage in place of its own."""
    return replace(report, stages=[replace(report.stages[0], **changes)])


def test_the_ending_says_the_format(report, tmp_path):
    assert "<svg" in report.plot(tmp_path / "plot.svg").read_text()[:800]
    assert report.plot(tmp_path / "new" / "plot.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(ValueError, match=r"\.png or \.svg; got .*plot\.pdf"):
        report.plot(tmp_path / "plot.pdf")


def test_a_report_without_scores_or_edits_shows_sizes_and_names_are_no_formulas(report, tmp_path):
    named = replace(told(report, edits=[], method="\\frac$"), base_model="a/$x^")
    drawn = named.plot(tmp_path / "plot.svg").read_text()
    assert "stored (MB)" in drawn
    assert "$x^: \\frac$" in drawn


def test_texts_are_escaped_in_notebooks(report):
    named = replace(told(report, method="<b>mka"), base_model="<script>alert(1)</script>\nmore")
    page = named._repr_html_()
    assert all(tag not in page for tag in ("<script", "<b>"))
    assert "&lt;script&gt;alert(1)&lt;/script&gt; more: &lt;b&gt;mka" in page
    assert len(str(named).splitlines()) == 4


def test_a_large_matrix_is_drawn_and_one_that_is_not_square_is_refused(tmp_path):
    matrix = torch.rand(60, 60, dtype=torch.float64)
    assert plot_similarity(matrix, tmp_path / "big.png", "title", merged=[(3, 4)]).exists()
    assert plot_similarity([[1.0]], tmp_path / "one.png", "title").exists()
    with pytest.raises(ValueError, match="must be square"):
        plot_similarity([[1.0, 0.5]], tmp_path / "bad.png", "title")


def test_pyplot_and_its_global_state_are_not_used(report, tmp_path):
    report.plot(tmp_path / "plot.png")
    assert "matplotlib.pyplot" not in sys.modules


def test_the_last_stage_that_changed_blocks_is_drawn(report, tmp_path):
    trained = Stage("heal", {}, report.after, report.after, [], {}, [], {}, None)
    longer = replace(report, stages=[*report.stages, trained])
    assert longer.plot(tmp_path / "a.svg").read_text().count("<path") > 0
    assert longer.plot(tmp_path / "b.png").read_bytes() == longer.plot(tmp_path / "c.png", stage=0).read_bytes()
    assert "stored (MB)" in longer.plot(tmp_path / "d.svg", stage=-1).read_text()
    with pytest.raises(IndexError):
        longer.plot(tmp_path / "d.png", stage=2)
