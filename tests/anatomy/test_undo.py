"""Every change to a live model can be taken back, on every way out."""

import pytest
import torch
from torch import nn

from hf_compress.anatomy.undo import Undo
from hf_compress.numerics.aside import Aside


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


SIDE = 512  # a matrix of float32 with so many rows and columns is large


def elsewhere(tensor: torch.Tensor) -> bool:
    return tensor.untyped_storage().filename is not None


def emptied(layer: nn.Linear, undo: Undo) -> nn.Parameter:
    """The weight that a layer had; it has one of two numbers now."""
    old = layer.weight
    undo.put(layer._parameters, "weight", nn.Parameter(torch.zeros(1, 2)))
    return old


def test_what_only_a_rollback_needs_lies_elsewhere_until_then():
    layer, other, block, undo = (
        nn.Linear(SIDE, SIDE),
        nn.Linear(SIDE, SIDE),
        nn.Sequential(nn.Linear(SIDE, SIDE)),
        Undo(),
    )
    old, part = layer.weight, block[0]
    values, before = old.detach().clone(), other.weight.detach().clone()
    undo.write(other.weight, torch.zeros(SIDE, SIDE))
    undo.put(block._modules, "0", nn.Identity())
    emptied(layer, undo)
    put = []
    undo.set_aside([*layer.parameters(), *other.parameters()], lambda tensor: put.append(tensor) or Aside().put(tensor))
    assert len(put) == 3, "of what was written there is a copy"
    assert elsewhere(old)
    assert elsewhere(part.weight)
    assert not elsewhere(part.bias), "it is small"
    assert torch.equal(old, values)
    undo.rollback()
    assert layer.weight is old
    assert block[0] is part
    assert torch.equal(layer.weight, values)
    assert torch.equal(other.weight, before)
    assert not any(map(elsewhere, (old, other.weight, part.weight)))
    assert old.requires_grad


def test_without_memory_to_come_back_to_it_stays_elsewhere(monkeypatch):
    """With its values, and all else comes back."""

    def none_left(*_, **__):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")

    layer, undo, owner = nn.Linear(SIDE, SIDE), Undo(), Frozen()
    values = layer.weight.detach().clone()
    undo.set(owner, "depth", 3)
    old = emptied(layer, undo)
    undo.set_aside(layer.parameters(), Aside().put)
    monkeypatch.setattr(torch.Tensor, "clone", none_left)
    undo.rollback()
    assert owner.depth == 4
    assert layer.weight is old
    assert torch.equal(old, values)


def test_each_is_set_aside_once():
    layer, undo, calls = nn.Linear(SIDE, SIDE), Undo(), []
    emptied(layer, undo)
    for _ in range(2):
        undo.set_aside(layer.parameters(), lambda tensor: calls.append(tensor) or Aside().put(tensor))
    assert len(calls) == 1


def tied(layer, undo):
    other = nn.Linear(SIDE, SIDE)
    other.weight = layer.weight
    emptied(layer, undo)
    return [*layer.parameters(), *other.parameters()]


def a_view_of_another(layer, undo):
    whole = torch.zeros(2 * SIDE, SIDE)
    layer.weight = nn.Parameter(whole[:SIDE])
    emptied(layer, undo)
    return list(layer.parameters())


def two_that_share(layer, undo):
    other = nn.Linear(SIDE, SIDE)
    other.weight = nn.Parameter(layer.weight.detach())
    emptied(layer, undo)
    emptied(other, undo)
    return list(layer.parameters())


def in_shared_memory(layer, undo):
    layer.share_memory()
    emptied(layer, undo)
    return list(layer.parameters())


def laid_out_otherwise(layer, undo):
    layer.weight = nn.Parameter(torch.zeros(SIDE, SIDE).T)
    emptied(layer, undo)
    return list(layer.parameters())


@pytest.mark.parametrize("case", [tied, a_view_of_another, two_that_share, in_shared_memory, laid_out_otherwise])
def test_what_a_copy_cannot_stand_for_stays_where_it_is(case):
    layer, undo, calls = nn.Linear(SIDE, SIDE), Undo(), []
    undo.set_aside(case(layer, undo), calls.append)
    assert not calls
    undo.rollback()
    assert len(layer.weight) == SIDE


def test_what_was_written_through_a_view_stays_where_it_is():
    """What takes the change back would write to where it was."""
    layer, undo = nn.Linear(SIDE, SIDE), Undo()
    values = layer.weight.detach().clone()
    undo.write(layer.weight.T, torch.zeros(SIDE, SIDE))
    old = emptied(layer, undo)
    undo.set_aside(layer.parameters(), Aside().put)
    assert not elsewhere(old)
    undo.rollback()
    assert torch.equal(layer.weight, values)


def test_without_room_it_stays_where_it_is():
    layer, undo = nn.Linear(SIDE, SIDE), Undo()
    values = layer.weight.detach().clone()
    old = emptied(layer, undo)
    undo.set_aside(layer.parameters(), lambda _: None)
    assert not elsewhere(old)
    undo.rollback()
    assert layer.weight is old
    assert torch.equal(old, values)


def test_what_is_taken_over_is_set_aside_too():
    layer, undo, other = nn.Linear(SIDE, SIDE), Undo(), Undo()
    old = emptied(layer, other)
    undo.take_over(other)
    undo.set_aside(layer.parameters(), Aside().put)
    assert elsewhere(old)
    undo.rollback()
    assert layer.weight is old
    assert not elsewhere(old)
