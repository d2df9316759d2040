"""verify_files(): what was written is what is there, and a manifest from elsewhere is not trusted."""

import hashlib
import json
import os
import shutil
import tracemalloc
from pathlib import Path

import pytest

from hf_compress.storage.manifest import MANIFEST_FILE, ManifestError, verify_files, write_manifest
from hf_compress.storage.save import save
from tests.helpers.language import tiny_llama, word_tokenizer


@pytest.fixture(scope="session")
def saved(tmp_path_factory) -> Path:
    return save(tiny_llama(), tmp_path_factory.mktemp("saved") / "out", word_tokenizer(add_special=False))


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    """A saved model's folder, to be spoiled."""
    return shutil.copytree(saved, tmp_path / "out")


def test_every_file_is_listed_as_it_is(folder):
    listed = json.loads((folder / MANIFEST_FILE).read_text())
    assert listed["version"] == 1
    assert listed["files"].keys() == {path.name for path in folder.iterdir()} - {MANIFEST_FILE}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= listed["files"].keys()
    for name, entry in listed["files"].items():
        content = (folder / name).read_bytes()
        assert entry == {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    assert sorted(verify_files(str(folder))) == sorted(listed["files"])


def test_the_manifest_is_written_last(saved):
    times = {path.name: path.stat().st_mtime_ns for path in saved.iterdir()}
    assert max(times, key=lambda name: times[name]) == MANIFEST_FILE


def append(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b" ")


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def link(path: Path) -> None:
    path.rename(path.with_suffix(".moved"))
    path.symlink_to(path.with_suffix(".moved"))


def into_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


SPOILT = [
    (Path.unlink, "is missing"),
    (append, r"has \d+ bytes instead of \d+"),
    (cut, r"has \d+ bytes instead of \d+"),
    (flip, r"its SHA-256 is \w{64} instead of \w{64}"),
    (link, "is a link"),
    (into_folder, "is not a file"),
]


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
@pytest.mark.parametrize(("spoil", "message"), SPOILT, ids=[spoil.__name__ for spoil, _ in SPOILT])
def test_a_file_that_is_not_as_it_was_is_named(folder, name, spoil, message):
    spoil(folder / name)
    with pytest.raises(ManifestError, match=rf"{name} .*{message}.*get it anew, or.*write_manifest"):
        verify_files(folder)


@pytest.mark.parametrize("name", ["model-00001-of-00002.safetensors", "pytorch_model.bin", "x.PT", "modeling_x.py"])
def test_what_could_be_loaded_instead_may_not_be_added(folder, name):
    (folder / name).write_bytes(b"")
    with pytest.raises(ManifestError, match=f"{name} is not in {MANIFEST_FILE}.*remove it"):
        verify_files(folder)


def test_the_card_and_notes_may_be_edited(folder):
    for name in ("README.md", "notes.txt", ".gitattributes", "evaluation.json"):
        (folder / name).write_text("mine")
    verify_files(folder)
    write_manifest(folder)
    (folder / "README.md").write_text("mine, once more")
    verify_files(folder)
    (folder / "notes.txt").write_text("once listed, it counts")
    with pytest.raises(ManifestError, match=r"notes\.txt was changed"):
        verify_files(folder)


def test_a_change_of_ones_own_is_sealed_again(folder):
    append(folder / "config.json")
    write_manifest(folder)
    assert "config.json" in verify_files(folder)


BAD_NAMES = [
    *("../secret", "inner/config.json", "/etc/passwd", "..", ".", "", "a/", "..\\secret", "C:\\secret", "C:secret"),
    *("a\0b", MANIFEST_FILE, "README.md"),
]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_names_that_lead_elsewhere_are_refused_and_not_opened(folder, name, monkeypatch):
    (folder.parent / "secret").write_text("s")
    (folder / "inner").mkdir()
    (folder / "inner" / "config.json").write_text("s")
    entry = {"sha256": hashlib.sha256(b"s").hexdigest(), "bytes": 1}
    (folder / MANIFEST_FILE).write_text(json.dumps({"version": 1, "files": {name: entry}}))
    opened, own = [], Path.open
    monkeypatch.setattr(Path, "open", lambda self, *a, **k: (opened.append(self.name), own(self, *a, **k))[1])
    with pytest.raises(ManifestError, match="which is not the name of a model's file: do not trust it"):
        verify_files(folder)
    assert set(opened) <= {MANIFEST_FILE}


BAD_MANIFESTS = {
    "not JSON": b"{",
    "not text": b"\xff\xfe",
    "nested without end": b"[" * 100_000,
    "a list": b"[]",
    "of a newer version": b'{"version": 2, "files": {}}',
    "of no version": b'{"files": {}}',
    "without files": b'{"version": 1}',
    "with a list of files": b'{"version": 1, "files": ["config.json"]}',
    "with a bare hash": b'{"version": 1, "files": {"config.json": "0"}}',
    "without a size": b'{"version": 1, "files": {"config.json": {"sha256": "0"}}}',
}


@pytest.mark.parametrize("content", BAD_MANIFESTS.values(), ids=BAD_MANIFESTS)
def test_a_manifest_that_is_none_is_refused(folder, content):
    (folder / MANIFEST_FILE).write_bytes(content)
    with pytest.raises(ManifestError, match=f"{MANIFEST_FILE} (is not JSON|has version|has no sha256).*get it anew"):
        verify_files(folder)


def test_a_folder_without_a_manifest_is_refused(folder, tmp_path):
    (folder / MANIFEST_FILE).rename(folder / "elsewhere")
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / MANIFEST_FILE).symlink_to(folder / "elsewhere")
    for name in ("out", "linked", "nowhere"):
        with pytest.raises(ManifestError, match=f"{name} has no file {MANIFEST_FILE}"):
            verify_files(tmp_path / name)


def test_hashing_takes_no_memory(tmp_path):
    with (tmp_path / "model.safetensors").open("wb") as file:
        os.truncate(file.fileno(), 64 << 20)
    tracemalloc.start()
    write_manifest(tmp_path)
    assert verify_files(tmp_path) == ["model.safetensors"]
    assert tracemalloc.get_traced_memory()[1] < 8 << 20
    tracemalloc.stop()
