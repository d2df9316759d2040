"""What tensors are known by."""

import pytest
import torch

from hf_compress.numerics.fingerprint import fingerprint

ONES = torch.ones(2, 3)


@pytest.mark.parametrize(
    "other", [[ONES.view(3, 2)], [ONES, ONES], [], [ONES.bfloat16()], [-ONES], [torch.zeros(2, 3)]]
)
def test_shapes_dtypes_and_values_tell_tensors_apart(other):
    assert fingerprint(other) != fingerprint([ONES]) == fingerprint([ONES.T.contiguous().T])


@pytest.mark.parametrize("tensor", [torch.tensor(True), torch.tensor([]), torch.arange(2**25, dtype=torch.uint8)])
def test_every_value_counts(tensor):
    known = fingerprint([tensor])
    assert known == fingerprint([tensor.clone()])
    if tensor.numel() > 1:
        tensor[-1] += 1
        assert known != fingerprint([tensor])
