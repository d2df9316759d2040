"""What saves leave when they are killed: found by the next one, and deleted only where nobody can still need it."""

import socket
from pathlib import Path

import pytest

import hf_compress.storage.save as save_module
import hf_compress.storage.staging as staging
from hf_compress.storage.save import save


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def abandoned(target: Path, *, host: str | None = None, old: bool = False) -> Path:
    """What a save to `target` leaves that was killed while it wrote; or, with `old`, between its two renamings."""
    folder = target.parent / f".{target.name}.hf_compress-abcd_123"
    (folder / "new").mkdir(parents=True)
    (folder / "new" / "config.json").write_text("{}")
    (folder / "owner").write_text(socket.gethostname() if host is None else host)
    if old:
        (folder / "old").mkdir()
        (folder / "old" / "config.json").write_text("the only copy")
    return folder


@pytest.fixture
def failing(monkeypatch):
    """Saves fail once they have written; gives what they then found beside their target."""
    found: list[list[str]] = []

    def fail(model, folder, probe):
        found.append([path.name for path in folder.parents[1].iterdir() if path != folder.parent])
        raise KeyboardInterrupt

    monkeypatch.setattr(save_module, "verify", fail)
    return found


def test_what_a_killed_save_left_makes_room_before_the_next_one_writes(model, tmp_path, failing):
    abandoned(tmp_path / "out")
    with pytest.raises(KeyboardInterrupt):
        save(model, tmp_path / "out")
    assert failing == [[]]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "host"),
    [("out", "another-computer"), ("out", ""), ("output", None), ("out.hf_compress-x", None)],
    ids=["of another computer", "of a save that had no lock", "of a longer name", "of a name that looks like one"],
)
def test_what_may_be_somebody_elses_stays(model, tmp_path, name, host):
    folder = abandoned(tmp_path / name, host=host)
    before = files(folder)
    save(model, tmp_path / "out")
    assert files(folder) == before


def test_a_copy_that_somebody_made_of_a_stage_stays(model, tmp_path):
    copy = abandoned(tmp_path / "out").rename(tmp_path / ".out.hf_compress-abcd_123.bak")
    save(model, tmp_path / "out")
    assert (copy / "new" / "config.json").exists()


def test_a_running_save_to_the_same_place_is_left_alone(model, tmp_path):
    target = tmp_path / "out"
    with staging.stage(target) as theirs:
        (theirs / "half").write_text("a")
        save(model, target)
        assert (theirs / "half").read_text() == "a"
        staging.put_in_place(theirs, target, overwrite=True)  # the last one wins, whole
    assert files(tmp_path) == {"out/half": b"a"}


def test_the_only_copy_stays_until_a_save_succeeds(model, tmp_path, failing, monkeypatch):
    folder = abandoned(tmp_path / "out", old=True)
    with pytest.raises(KeyboardInterrupt):
        save(model, tmp_path / "out")
    assert (folder / "old" / "config.json").read_text() == "the only copy"
    monkeypatch.undo()
    save(model, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_cannot_be_put_back_is_kept(tmp_path, monkeypatch):
    target, own = tmp_path / "out", Path.rename
    target.mkdir()
    (target / "config.json").write_text("the only copy")

    def rename(self: Path, to: Path) -> Path:
        if self != target:
            raise OSError(f"{self} -> {to}")
        return own(self, to)

    monkeypatch.setattr(staging, "_exchange", lambda *_: False)
    monkeypatch.setattr(Path, "rename", rename)
    with staging.stage(target) as new, pytest.raises(OSError, match=r"old -> .*out"):
        staging.put_in_place(new, target, overwrite=True)
    assert (new.parent / "old" / "config.json").read_text() == "the only copy"
