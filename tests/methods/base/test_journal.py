"""Results that are kept in a folder, and folders of other runs."""

import pytest
import torch

from hf_compress.errors import WorkdirError
from hf_compress.methods.base.journal import Journal
from hf_compress.plan.plan import Plan

RUN = {"settings": {"ratio": 0.5}, "data": "abc"}


def never():
    raise AssertionError("it is there already")


def test_what_is_there_is_not_made_again(tmp_path):
    one = torch.arange(6.0).view(2, 3)
    plan = Plan((), {"w": one, "w again": one, "part": one[0]}, {"error": 0.1})
    first = Journal(tmp_path / "work", RUN)
    assert not first.has("solve block 1")
    made = first.plan("solve block 1", lambda: plan), first.facts("choice", lambda: [3, {"losses": [1.5]}])
    second = Journal(tmp_path / "work", RUN)
    assert second.has("solve block 1")
    read = second.plan("solve block 1", never), second.facts("choice", never)
    assert made[1] == read[1] == [3, {"losses": [1.5]}]
    for found in (made[0], read[0]):
        assert (found.edits, found.notes) == ((), {"error": 0.1})
        assert all(torch.equal(found.tensors[name], plan.tensors[name]) for name in plan.tensors)


def test_without_a_folder_everything_is_made():
    journal, made = Journal(), Plan()
    assert journal.plan("it", lambda: made) is made
    assert journal.plan("it", lambda: made) is made
    assert not journal.has("it")


def test_two_results_of_one_name_are_a_mistake(tmp_path):
    journal = Journal(tmp_path, RUN)
    journal.facts("it", dict)
    with pytest.raises(AssertionError, match="two results are called 'it'"):
        journal.facts("it", dict)


def test_another_run_is_refused_and_what_differs_is_named(tmp_path):
    Journal(tmp_path, RUN)
    with pytest.raises(WorkdirError, match=r"another run: settings: ratio was 0\.5 and is 0\.25\. Give"):
        Journal(tmp_path, RUN | {"settings": {"ratio": 0.25}})
    with pytest.raises(WorkdirError, match="more was null and is 1"):
        Journal(tmp_path, RUN | {"more": 1})


def test_a_folder_with_results_of_nobody_known_is_refused(tmp_path):
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "mine.csv").write_text("1")
    with pytest.raises(WorkdirError, match="holds results"):
        Journal(tmp_path, RUN)


def test_folders_that_are_none_of_a_run_are_refused(tmp_path):
    (tmp_path / "thesis.txt").write_text("all of it")
    with pytest.raises(WorkdirError, match=r"holds thesis\.txt"):
        Journal(tmp_path, RUN)
    with pytest.raises(WorkdirError, match="cannot be written"):
        Journal(tmp_path / "thesis.txt" / "work", RUN)


def test_a_result_that_was_cut_short_is_told_of(tmp_path):
    Journal(tmp_path, RUN).facts("it", lambda: 1)
    (tmp_path / "results" / "it.safetensors").write_bytes(b"\x08")
    with pytest.raises(WorkdirError, match=r"it\.safetensors cannot be read"):
        Journal(tmp_path, RUN).facts("it", never)


def test_no_room_for_a_result_is_told_of_and_leaves_the_others(tmp_path, monkeypatch):
    journal = Journal(tmp_path, RUN)
    journal.facts("first", lambda: 1)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("hf_compress.numerics.tensor_file.save_file", full)
    with pytest.raises(WorkdirError, match=r"No space left on device.*make room, and start the run again"):
        journal.facts("second", lambda: 2)
    monkeypatch.undo()
    again = Journal(tmp_path, RUN)
    assert (again.facts("first", never), again.facts("second", lambda: 2)) == (1, 2)
