"""The distributions: what is in them, and that the command and loading run from an installed wheel.

The wheel is installed in an environment of its own, which borrows the libraries of the one that runs the tests.
"""

import ast
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from email import message_from_bytes
from email.message import Message
from pathlib import Path
from zipfile import ZipFile

import pytest

import hf_compress
from tests.helpers.language import tiny_llama, word_tokenizer, words

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent


def run(*command: str | Path, cwd: Path, code: int = 0, alone: bool = True) -> subprocess.CompletedProcess[str]:
    """Run a command, and hold its exit code to what is expected; `alone` hides the checkout from it."""
    environment = {k: v for k, v in os.environ.items() if not (alone and k in ("PYTHONPATH", "VIRTUAL_ENV"))}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == code, f"{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    return done


def own_files() -> list[str]:
    """The repository's files, without what else lies about in a clone; all files where this is no clone."""
    if not (ROOT / ".git").exists():
        return sorted(name for name in files(ROOT) if "__pycache__" not in name)
    names = run("git", "ls-files", "-z", cwd=ROOT).stdout.split("\0")
    return [name for name in names if (ROOT / name).is_file()]


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def contents(wheel: Path) -> dict[str, bytes]:
    with ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def build(tree: Path, output: Path, *kind: str) -> None:
    """Build with the libraries that are here: nothing is downloaded."""
    run(sys.executable, "-m", "build", "--no-isolation", *kind, "--outdir", output, tree, cwd=output, alone=False)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("package")


@pytest.fixture(scope="module")
def tree(home: Path) -> Path:
    """A copy of the repository, so that building leaves nothing in it."""
    for name in own_files():
        (home / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, home / "tree" / name)
    return home / "tree"


@pytest.fixture(scope="module")
def tracked(tree: Path) -> set[str]:
    return files(tree)


@pytest.fixture(scope="module")
def sdist(tree: Path, tracked: set[str], home: Path) -> Path:
    (home / "sdist").mkdir()
    build(tree, home / "sdist", "--sdist")
    (packed,) = (home / "sdist").iterdir()
    shutil.unpack_archive(packed, home / "unpacked")
    (unpacked,) = (home / "unpacked").iterdir()
    assert unpacked.name == f"hf_compress-{hf_compress.__version__}"
    return unpacked


@pytest.fixture(scope="module")
def wheel(tree: Path, tracked: set[str], home: Path) -> Path:
    (home / "wheel").mkdir()
    build(tree, home / "wheel", "--wheel")
    (packed,) = (home / "wheel").iterdir()
    return packed


@pytest.fixture(scope="module")
def metadata(wheel: Path) -> Message:
    (text,) = (value for name, value in contents(wheel).items() if name.endswith(".dist-info/METADATA"))
    return message_from_bytes(text)


@pytest.fixture(scope="module")
def bin_(wheel: Path, home: Path) -> Path:
    """The folder with the programs of an environment that has the wheel, and the libraries of this one."""
    place = home / "environment"
    venv.create(place)
    python = place / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel, cwd=home)
    own = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=home).stdout.strip())
    # A path in a .pth file is searched after the environment's own, and .pth files in there, such as that of an
    # editable install, are not followed.
    theirs = dict.fromkeys(sysconfig.get_path(name) for name in ("purelib", "platlib"))
    (own / "libraries.pth").write_text("\n".join(theirs))
    return place / "bin"


@pytest.fixture(scope="module")
def model(home: Path) -> Path:
    tiny_llama(4).save_pretrained(home / "model")
    word_tokenizer(add_special=False).save_pretrained(home / "model")
    (home / "texts.jsonl").write_text("".join(json.dumps({"text": words(20, s)}) + "\n" for s in range(24)))
    return home / "model"


# --- what is in them --------------------------------------------------------------------------------------------------


def test_the_wheel_has_the_package_and_nothing_else(wheel, tracked):
    found = {name for name in contents(wheel) if ".dist-info/" not in name}
    assert found == {name for name in tracked if name.startswith("hf_compress/")}
    task = "hf_compress/evaluation/tasks/manuals_cloze/manuals_cloze"
    assert {"hf_compress/py.typed", f"{task}.yaml", f"{task}.jsonl"} <= found
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in contents(wheel))


def test_the_source_distribution_has_all_that_a_clone_has(sdist, tracked):
    assert tracked - files(sdist) == set()


def test_the_source_distribution_builds_the_same_wheel(sdist, wheel, tmp_path):
    build(sdist, tmp_path, "--wheel")
    (again,) = tmp_path.iterdir()
    assert again.name == wheel.name
    assert contents(again) == contents(wheel)


def test_the_metadata_say_what_it_is(metadata):
    assert metadata["Version"] == hf_compress.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert "Typing :: Typed" in metadata.get_all("Classifier")
    assert {"compressed-tensors", "evaluation"} <= set(metadata.get_all("Provides-Extra"))


# --- what runs from there ---------------------------------------------------------------------------------------------


def test_the_package_is_the_wheels(bin_, home):
    place = run(bin_ / "python", "-c", "import hf_compress; print(hf_compress.__file__)", cwd=home).stdout.strip()
    assert Path(place).is_relative_to(home / "environment")
    assert run(bin_ / "hf-compress", "--version", cwd=home).stdout == f"hf-compress {hf_compress.__version__}\n"
    shown = run(bin_ / "hf-compress", "--help", cwd=home).stdout
    assert all(command in shown for command in ("compress", "analyze", "evaluate", "info", "verify", "push", "demo"))


def load(bin_: Path, folder: str, home: Path, first: str = "") -> tuple[int, list[str]]:
    """How many blocks a stored model has, and the classes of one block's linear maps, in a process of the wheel's."""
    code = f"""
{first}
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({folder!r})
assert model(input_ids=torch.tensor([[4, 5, 6]])).logits.isfinite().all()
names = sorted({{type(module).__name__ for module in model.model.layers[0].mlp.children()}})
print((len(model.model.layers), names))
assert ("hf_compress" in sys.modules) == {bool(first)}
"""
    return ast.literal_eval(run(bin_ / "python", "-c", code, cwd=home).stdout.splitlines()[-1])


def test_compressing_and_loading(bin_, model, home):
    command = (bin_ / "hf-compress", "compress", model, "--calibration", "texts.jsonl")
    run(*command, "--method", "drop_blocks", "--num", "1", "--output", "plain", cwd=home)
    run(*command, "--method", "lrp", "--set", "bits=7", "--set", "group_size=8", "--output", "packed", cwd=home)
    assert load(bin_, "plain", home)[0] == 3
    layers, names = load(bin_, "packed", home, "import hf_compress")
    assert layers == 4
    assert "Linear" not in names
    assert "files are as they were written" in run(bin_ / "hf-compress", "verify", "packed", cwd=home).stdout


def test_the_tasks_are_found(bin_, model, home):
    command = (bin_ / "hf-compress", "evaluate", model, "--tasks", "manuals_cloze", "--limit", "2")
    assert "manuals_cloze" in run(*command, cwd=home).stdout


def test_the_demo_says_at_once_what_it_needs(bin_, home):
    (line,) = run(bin_ / "hf-compress", "demo", cwd=home, code=2).stderr.splitlines()
    assert line.startswith("Error: the demo needs")
    assert "`make demo`" in line
    code = (
        "import sys; from hf_compress.cli import app; app(['demo'], standalone_mode=False)\n"
        "print([name for name in ('torch', 'transformers', 'datasets') if name in sys.modules])"
    )
    assert run(bin_ / "python", "-c", code, cwd=home).stdout.strip() == "[]"
