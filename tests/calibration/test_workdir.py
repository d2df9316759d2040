"""The folder of a run."""

from socket import gethostname

import pytest

from hf_compress.calibration.workdir import check_own, check_room, empty, own_name, worked_in
from hf_compress.errors import WorkdirError


def test_two_runs_do_not_work_in_one_folder(tmp_path):
    with worked_in(tmp_path), pytest.raises(WorkdirError, match="another run works in"), worked_in(tmp_path):
        pass
    with worked_in(tmp_path):
        pass


def test_what_killed_runs_have_left_goes_and_their_results_stay(tmp_path):
    left = ["results/it.partial", "results/.tmpAb12", ".tmpCd34", "run.partial", "streams/hf_compress-1"]
    kept = ["run.safetensors", "results/it.safetensors", "notes.txt", f"changed/{own_name()}/1", "changed/far-1/1"]
    gone = f"changed/{gethostname()}-999999999/1"
    for name in [*left, *kept, gone]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("1")
    with worked_in(tmp_path):
        there = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert there == {*kept, "lock"}
    empty(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    (tmp_path / "notes.txt").unlink()
    empty(tmp_path)
    empty(tmp_path)
    assert not tmp_path.exists()


def test_an_error_inside_is_no_error_of_the_folder(tmp_path):
    with pytest.raises(OSError, match="other disk"), worked_in(tmp_path):
        raise OSError("other disk")
    with pytest.raises(WorkdirError, match="cannot be written"), worked_in(tmp_path / "lock" / "below"):
        pass


def test_room_counts_what_is_there(tmp_path):
    (tmp_path / "results").write_bytes(b"1" * 1000)
    check_room(tmp_path, 1000)
    with pytest.raises(WorkdirError, match=r"may take 1000000000\.00 GB: make room"):
        check_room(tmp_path, 10**18)


def test_the_folder_of_a_stage_is_told_from_others_of_such_a_name(tmp_path):
    for folder, file in (("1-mka", "results/a.safetensors"), ("2-heal", "run.safetensors"), ("1-baseline", "mine.csv")):
        path = tmp_path / "work" / folder / file
        path.parent.mkdir(parents=True)
        path.touch()
    with pytest.raises(WorkdirError, match="holds 1-baseline, and is no folder of a run"):
        check_own(tmp_path / "work")
    empty(tmp_path / "work")
    assert [path.name for path in (tmp_path / "work").rglob("*")] == ["1-baseline", "mine.csv"]
