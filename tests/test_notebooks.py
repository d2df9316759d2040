"""The notebooks: each runs from its first cell to its last at small size, and is kept without what it printed."""

import json
import re
import sys
from pathlib import Path

import nbformat
import pytest
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
PLACE = re.compile(r"(?<![\w.])/(?:home|root|Users|tmp|work|opt|usr)\b|[A-Z]:\\\\")
by_name = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


@by_name
def test_a_notebook_has_no_outputs_and_names_no_place_of_a_machine(path):
    text = path.read_text(encoding="utf-8")
    book = nbformat.reads(text, as_version=4)
    nbformat.validate(book)
    assert [cell for cell in book.cells if cell.get("outputs") or cell.get("execution_count")] == []
    assert not PLACE.search(text)
    assert 8 <= len(book.cells) <= 20
    assert text == json.dumps(json.loads(text), indent=1, ensure_ascii=False, sort_keys=True) + "\n"  # one form


def test_the_list_of_notebooks_has_each_once():
    listed = re.findall(r"\]\((\w+\.ipynb)\)", (ROOT / "notebooks" / "README.md").read_text(encoding="utf-8"))
    assert sorted(listed) == [path.name for path in NOTEBOOKS]


@pytest.mark.slow
@by_name
def test_a_notebook_runs(path, tmp_path, monkeypatch):
    kernel = tmp_path / "share" / "kernels" / "here"  # this Python, whatever kernels the user has
    kernel.mkdir(parents=True)
    command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    (kernel / "kernel.json").write_text(json.dumps({"argv": command, "display_name": "here", "language": "python"}))
    for name, value in {
        "HF_COMPRESS_SMALL": "1",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "JUPYTER_RUNTIME_DIR": str(tmp_path / "runtime"),
        "IPYTHONDIR": str(tmp_path / "ipython"),
    }.items():
        monkeypatch.setenv(name, value)
    home = tmp_path / "notebooks"
    home.mkdir()
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    book = nbformat.read(path, as_version=4)
    specs = KernelSpecManager(kernel_dirs=[str(kernel.parent)])
    manager = AsyncKernelManager(kernel_name="here", kernel_spec_manager=specs)
    NotebookClient(book, km=manager, timeout=300, resources={"metadata": {"path": str(home)}}).execute()
    shown = json.dumps([cell.get("outputs") for cell in book.cells])
    assert "Traceback" not in shown
    assert any(cell.outputs for cell in book.cells if cell.cell_type == "code")
