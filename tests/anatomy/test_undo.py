"""Every change to a live model can be taken back, on every way out."""

import pytest
import torch
from torch import nn

from hf_compress.anatomy.undo import Undo


class Frozen:
    """Whose attributes cannot be set in the usual way, as those of some configs."""

    def __init__(self):
        vars(self)["depth"] = 4

    def __setattr__(self, name, value):
        raise AttributeError(name)


def change(undo: Undo, blocks: nn.ModuleList, owner: Frozen) -> None:
    undo.set(owner, "depth", 2)
    undo.set(owner, "depth", 1)
    undo.set(owner, "fresh", True)
    undo.write(blocks[0].weight, torch.zeros(2, 2))
    undo.replace_children(blocks, [blocks[2]])


@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
def test_everything_comes_back(error):
    blocks, owner = nn.ModuleList(nn.Linear(2, 2) for _ in range(3)), Frozen()
    children, weight = list(blocks), blocks[0].weight
    values = weight.detach().clone()
    try:
        with Undo() as undo:
            change(undo, blocks, owner)
            assert len(blocks) == 1
            assert vars(owner) == {"depth": 1, "fresh": True}
            assert not weight.any()
            if error:
                raise error
    except (ValueError, KeyboardInterrupt):
        pass
    assert list(blocks) == children
    assert vars(owner) == {"depth": 4}
    assert blocks[0].weight is weight
    assert torch.equal(weight, values)


def test_the_list_of_blocks_stays_the_same_object():
    blocks = nn.ModuleList(nn.Linear(2, 2) for _ in range(3))
    first, last = blocks[0], blocks[2]
    Undo().replace_children(blocks, [first, last])
    assert list(blocks) == [first, last]
    assert blocks[1] is last


def test_without_a_rollback_the_change_stays():
    owner = Frozen()
    Undo().set(owner, "depth", 3)
    assert owner.depth == 3


def test_a_second_rollback_does_nothing():
    owner, undo = Frozen(), Undo()
    undo.set(owner, "depth", 3)
    undo.rollback()
    vars(owner)["depth"] = 9
    undo.rollback()
    assert owner.depth == 9


def test_a_tensor_is_written_in_the_parameter_s_own_dtype():
    weight = nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))
    Undo().write(weight, torch.tensor([1.0, 2.0]))
    assert weight.dtype == torch.bfloat16
    assert weight.tolist() == [1.0, 2.0]
    assert weight.requires_grad


def test_a_tensor_of_another_shape_is_refused_before_anything_is_written():
    weight = nn.Parameter(torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"\(3, 2\) does not fit a parameter \(2, 3\)"):
        Undo().write(weight, torch.zeros(3, 2))
    assert weight.all()
