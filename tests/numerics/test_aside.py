"""Tensors in files without names."""

import gc
import os
import shutil

import pytest
import torch

from hf_compress.errors import WorkdirError
from hf_compress.numerics.aside import Aside, Spare, mapped
from tests.helpers.disk import mapped_bytes

linux = pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="tells what is mapped on Linux alone")


@linux
def test_what_is_put_aside_is_the_same_and_goes_with_its_tensors(tmp_path):
    aside, before = Aside(tmp_path), mapped_bytes()
    made = [torch.randn(700, 3), torch.arange(5, dtype=torch.uint8), torch.zeros(0), torch.randn(900, 900).double().T]
    kept = [aside.put(tensor) for tensor in made for _ in range(3)]
    assert [torch.equal(first, second) for first, second in zip(kept[::3], made, strict=True)] == [True] * 4
    assert [tensor.dtype for tensor in kept[::3]] == [tensor.dtype for tensor in made]
    assert all(tensor.data_ptr() % 64 == 0 for tensor in kept if tensor.numel())
    assert mapped_bytes() >= before + 3 * 900 * 900 * 8
    assert list(tmp_path.iterdir()) == []
    del aside, kept
    gc.collect()
    assert mapped_bytes() <= before


@linux
def test_no_room_is_told_of_before_anything_is_written(tmp_path):
    with pytest.raises(WorkdirError, match=r"has no room for 1,\d+,.* bytes .*make some, or give another folder"):
        mapped(2**60, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_what_only_spares_time_does_without_room(tmp_path, monkeypatch):
    """Beyond its budget, beyond half of what the folder would have left without it, and where others took that."""
    tensor = torch.arange(100, dtype=torch.float64)
    budgeted = Spare(1000, tmp_path)
    assert torch.equal(budgeted.put(tensor), tensor)
    assert budgeted.put(tensor) is None
    usage, spare = shutil.disk_usage(tmp_path), Spare(None, tmp_path)
    with monkeypatch.context() as patched:
        for free, fits in ((1599, False), (1600, True), (2399, False), (2400, True)):  # 800 bytes are taken by then
            patched.setattr(shutil, "disk_usage", lambda _, free=free: usage._replace(free=free))
            assert spare.fits(800) == fits
            assert (spare.put(tensor) is not None) == fits
    assert Spare(None, tmp_path / "gone").put(tensor) is None

    def full(size, folder):
        raise WorkdirError("no room")

    monkeypatch.setattr("hf_compress.numerics.aside.mapped", full)
    assert Spare(None, tmp_path).put(tensor) is None
