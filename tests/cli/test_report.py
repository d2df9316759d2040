"""`hf-compress report` writes one page, or says in a line why not; `-v` tells decisions."""

import json
import logging

import pytest

from tests.helpers.command_line import LAST, done, refused, run
from tests.helpers.web_pages import check_self_contained


@pytest.fixture
def small(model_folder, tmp_path):
    done("compress", model_folder, *LAST, "--num", "2", "--output", tmp_path / "small")
    return tmp_path / "small"


def test_it_writes_a_page(small, tmp_path):
    page = tmp_path / "new" / "page.html"
    assert str(page) in done("report", small, "--output", page).replace("\n", "")
    checked = check_self_contained(page.read_text(encoding="utf-8"))
    for told in ("small: what was done to it", "model.layers: left out: 4–5", "criterion", "Reload check: passed"):
        assert told in checked.words
    assert "Evaluation" not in checked.words


def test_without_an_output_it_lies_in_the_current_folder(small, tmp_path, monkeypatch):
    (small / "evaluation.json").write_text(json.dumps({"parameters": 1234, "scores": []}))
    monkeypatch.chdir(tmp_path)
    before = sorted(small.iterdir())
    done("report", small)
    assert "1,234" in check_self_contained((tmp_path / "report.html").read_text(encoding="utf-8")).words
    assert sorted(small.iterdir()) == before


def test_what_cannot_be_shown(small, model_folder, tmp_path):
    page = tmp_path / "page.html"
    for folder in (tmp_path / "nowhere", model_folder):
        assert str(folder) in refused("report", folder, "--output", page)
    assert "has no compression_report.json" in refused("report", model_folder, "--output", page)
    assert "--output must end in .html" in refused("report", small, "--output", tmp_path / "page.pdf")
    (small / "evaluation.json").write_text("[]")
    assert "evaluation.json is not what evaluate() writes: move it away" in refused("report", small, "--output", page)
    (small / "compression_report.json").write_text("{}")
    assert "is no compression report of this version" in refused("report", small, "--output", page)
    assert not page.exists()


def test_decisions_are_told_when_asked_for(model_folder, tmp_path):
    told = "drop_blocks: model.layers: left out: 4–5"
    arguments = ("compress", model_folder, *LAST, "--num", "2", "--plan")
    assert told in run("-v", *arguments).stderr.splitlines()
    assert told in run("--verbose", *arguments).stderr.splitlines()
    assert told not in run(*arguments).stderr
    logger = logging.getLogger("hf_compress")
    assert (logger.handlers, logger.level) == ([], logging.NOTSET)
