"""The pages: links lead somewhere, what they name is there, and the README's picture is made as it says."""

import os
import re
import runpy
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
from transformers.utils import logging

import hf_compress

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "hf_compress"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
LINK = re.compile(r"\]\(([^)\s]+)\)")
FILE = re.compile(
    r"(?<![\w/.:-])(?:\w+/)+[\w.-]*\w\.(?:py|md|json|jsonl|png|svg|html)\b"
)  # of the repository, or the package
DOTTED = re.compile(r"\bhf_compress(?:\.\w+)+")
PUBLIC = re.compile(r"\bhfc\.(\w+)")


def words(page):
    """What a page says, without what commands print, and CONTRIBUTING.md's example, a method that is not there."""
    example = r"\S*(?:quiet_attention|QuietAttention)\S*"
    return re.sub(
        rf"^```console.*?^```|{example}", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE
    )


def anchors(page):
    """The names by which GitHub links to the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def missing(name):
    """Whether a dotted name is neither a module nor something in one."""
    home, _, last = name.rpartition(".")
    try:
        return not hasattr(import_module(home), last) and not import_module(name)
    except ModuleNotFoundError:
        return True


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_what_a_page_names_is_there(page):
    text = words(page)
    dead = []
    for link in LINK.findall(text):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if "://" not in link and not (target.exists() and (not anchor or anchor in anchors(target))):
            dead.append(link)
    dead += [name for name in FILE.findall(text) if not any((root / name).exists() for root in (ROOT, PACKAGE))]
    dead += [name for name in DOTTED.findall(text) if missing(name)]
    dead += [f"hfc.{name}" for name in PUBLIC.findall(text) if name not in hf_compress.__all__]
    assert dead == []


def test_the_index_has_every_page():
    listed = {
        link for link in LINK.findall((ROOT / "docs" / "README.md").read_text(encoding="utf-8")) if "/" not in link
    }
    assert listed == {page.name for page in (ROOT / "docs").glob("*.md")} - {"README.md"}


def test_the_reference_names_every_public_name_once():
    named = re.findall(
        r"^::: hf_compress\.(\w+)$", (ROOT / "docs" / "api.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert sorted(named) == sorted(hf_compress._PUBLIC)


@pytest.mark.slow
def test_the_site_is_built_without_a_warning_and_has_what_settings_mean(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")
    page = (tmp_path / "site" / "api.html").read_text(encoding="utf-8")
    assert [name for name in hf_compress._PUBLIC if f'id="hf_compress.{name}"' not in page] == []
    assert "Share of the blocks to merge away; in (0, 1)." in page
    assert (tmp_path / "site" / "repository" / "examples" / "recipe.yaml").exists()  # what a page links to


def test_the_picture_of_the_readme_is_made_by_the_command_beneath_it(tmp_path, monkeypatch):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    picture, script = re.findall(r"\]\((docs/img/\S+)\)[^`]*`python (\S+)`", readme)[0]
    drawn = tmp_path / Path(picture).name
    monkeypatch.setattr(sys, "argv", [script, "--output", str(drawn)])
    monkeypatch.syspath_prepend(ROOT / Path(script).parent)
    level = logging.get_verbosity()
    runpy.run_path(str(ROOT / script), run_name="__main__")
    logging.set_verbosity(level)  # which what the benchmarks share turns down
    del sys.modules["common"]
    assert drawn.stat().st_size == pytest.approx((ROOT / picture).stat().st_size, rel=0.2)
    assert (ROOT / picture).stat().st_size < 100_000
