"""Tensors and facts in one file."""

import torch

from hf_compress.numerics.tensor_file import _apart, read_tensors, write_tensors

WHOLE = torch.arange(24.0).view(4, 6)


def test_tensors_that_overlap_are_written_each_as_it_is(tmp_path):
    tensors = {
        "whole": WHOLE,
        "again": WHOLE,
        "row": WHOLE[1],
        "end": WHOLE[2:],
        "column": WHOLE[:, 1],
        "none": WHOLE[:0],
    }
    write_tensors(tmp_path / "it.safetensors", tensors, {"a": 1})
    facts, found = read_tensors(tmp_path / "it.safetensors")
    assert facts == {"a": 1}
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


def test_parts_of_one_memory_that_do_not_overlap_are_not_copied():
    parts = {"first": WHOLE[:2], "second": WHOLE[2:]}
    assert all(tensor.data_ptr() == parts[name].data_ptr() for name, tensor in _apart(dict(parts)).items())
    assert _apart({"whole": WHOLE, "row": WHOLE[1]})["row"].data_ptr() != WHOLE[1].data_ptr()
