"""What no draft can do is refused, in words that name it."""

import pytest
import torch

from hf_compress.anatomy.anatomy import Anatomy, Block
from hf_compress.errors import UnsupportedModelError
from hf_compress.modules.bottleneck import Bottleneck
from hf_compress.rewrite.builders import insert_bottleneck, linear_ffn, narrow_experts, narrow_ffn, replace_activation
from tests.helpers.ffns import HIDDEN
from tests.helpers.tiny import tiny_model


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
@pytest.mark.parametrize(
    "draft",
    [
        lambda m, s: narrow_ffn(Block(m, s, 0), [1, 2]),
        lambda m, s: linear_ffn(Block(m, s, 0), [torch.eye(HIDDEN)]),
        lambda m, s: linear_ffn(Block(m, s, 0), [torch.zeros(HIDDEN, 2), torch.zeros(2, HIDDEN)]),
    ],
    ids=["narrow", "linear", "low rank"],
)
def test_a_mixture_is_no_dense_ffn(name, draft):
    model = tiny_model(name)
    with pytest.raises(UnsupportedModelError, match=r"the FFN of model.layers.0 is a mixture of experts"):
        draft(model, Anatomy(model).stack())


def test_a_dense_ffn_is_no_mixture():
    model = tiny_model("llama")
    stack = Anatomy(model).stack()
    with pytest.raises(UnsupportedModelError, match=r"block 2 of model.layers has no experts"):
        narrow_experts(Block(model, stack, 2), torch.zeros(4, 2, dtype=torch.long))


def test_an_activation_that_is_no_module():
    model = tiny_model("gpt_oss")
    with pytest.raises(UnsupportedModelError, match=r"the activation of block 0 of model.layers is no module"):
        replace_activation(Anatomy(model).block(0), "identity")


def test_a_block_without_an_ffn():
    model = tiny_model("mamba")
    with pytest.raises(UnsupportedModelError, match="found no FFN in block 1"):
        narrow_ffn(Anatomy(model).block(1), [0])


@pytest.mark.parametrize("blend", ["identity", "leaky"])
def test_a_constant_where_there_is_none(blend):
    model = tiny_model("llama")
    stack = Anatomy(model).stack()
    with pytest.raises(ValueError, match='width is for the blend "constant"'):
        replace_activation(Block(model, stack, 0), blend, 0.0, torch.zeros(96))


def test_no_constant_where_there_must_be_one():
    model = tiny_model("llama")
    stack = Anatomy(model).stack()
    with pytest.raises(ValueError, match='width is for the blend "constant", and needed there'):
        replace_activation(Block(model, stack, 0), "constant", 0.0)


def test_a_bottleneck_wider_than_the_stream():
    model = tiny_model("llama")
    stack = Anatomy(model).stack()
    with pytest.raises(ValueError, match="must be narrower than the stream, 64; got 65"):
        insert_bottleneck(Block(model, stack, 0), Bottleneck(HIDDEN, 65))


OTHER_UNITS = [
    ([1, 96], r"different numbers of 96 hidden units, counted from 0; got \[1, 96\]"),
    ([-1, 3], r"different numbers of 96 hidden units, counted from 0; got \[-1, 3\]"),
    ([3, 1, 3], r"different numbers of 96 hidden units, counted from 0; got \[3, 1, 3\]"),
    ([], "whole numbers, a list for each FFN"),
    ([1.0], "whole numbers, .* got torch.float32"),
    ([True, False], "whole numbers, .* got torch.bool"),
    ([[1, 2]], r"whole numbers, a list for each FFN; got torch.int64, \(1, 2\)"),
    (3, r"whole numbers, a list for each FFN; got torch.int64, \(\)"),
]


@pytest.mark.parametrize("name", ["llama", "phi3"])
def test_units_that_are_not_there_are_refused(name):
    model = tiny_model(name)
    for units, message in OTHER_UNITS:
        with pytest.raises(ValueError, match=f"^units must be {message}"):
            narrow_ffn(Anatomy(model).block(0), units)


OTHER_UNITS_OF_EXPERTS = [
    (torch.tensor([[0, 1], [0, 1], [0, 1], [0, 96]]), "units must be different numbers of 96 hidden units"),
    (torch.tensor([[0, 1], [0, 1], [0, 1], [0, -1]]), "units must be different numbers of 96 hidden units"),
    (torch.tensor([[0, 1], [0, 1], [0, 1], [2, 2]]), "units must be different numbers of 96 hidden units"),
    (torch.zeros(4, 0, dtype=torch.long), "units must be whole numbers"),
    (torch.zeros(4, 1), "units must be whole numbers"),
    (torch.tensor([0, 1, 2, 3]), "units must be whole numbers, a list for each FFN"),
    (torch.arange(2).expand(1, 4, 2), "units must be whole numbers, a list for each FFN"),
    (torch.arange(8).expand(5, -1), "holds 4 experts; units name 5"),
    (torch.arange(8).expand(3, -1), "holds 4 experts; units name 3"),
]


def test_units_of_experts_that_are_not_there_are_refused():
    model = tiny_model("mixtral")
    for units, message in OTHER_UNITS_OF_EXPERTS:
        with pytest.raises(ValueError, match=message):
            narrow_experts(Anatomy(model).block(0), units)


@pytest.mark.parametrize(
    "draft",
    [
        lambda m, s, i: narrow_ffn(Block(m, s, i), [1]),
        lambda m, s, i: narrow_experts(Block(m, s, i), torch.zeros(4, 1, dtype=torch.long)),
        lambda m, s, i: linear_ffn(Block(m, s, i), [torch.eye(HIDDEN)]),
        lambda m, s, i: insert_bottleneck(Block(m, s, i), Bottleneck(HIDDEN, 2)),
        lambda m, s, i: replace_activation(Block(m, s, i), "leaky"),
    ],
    ids=["narrow", "experts", "linear", "bottleneck", "activation"],
)
def test_a_block_that_is_not_there_is_refused(draft):
    model = tiny_model("llama")
    for index in (4, -1):
        with pytest.raises(ValueError, match=f"^model.layers has the blocks 0 to 3; got {index}"):
            draft(model, Anatomy(model).stack(), index)


@pytest.mark.parametrize("count", [0, 3])
def test_a_map_has_one_factor_or_two(count):
    model = tiny_model("llama")
    stack = Anatomy(model).stack()
    with pytest.raises(ValueError):
        linear_ffn(Block(model, stack, 0), [torch.eye(HIDDEN)] * count)
