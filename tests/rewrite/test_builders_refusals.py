"""What no draft can do is refused, in words that name it."""

import pytest
import torch

from hf_compress.anatomy.anatomy import Anatomy, Block
from hf_compress.errors import UnsupportedModelError
from hf_compress.modules.bottleneck import Bottleneck
from hf_compress.rewrite.builders import insert_bottleneck, linear_ffn, narrow_experts, narrow_ffn, replace_activation
from tests.helpers.ffns import HIDDEN
from tests.helpers.tiny import tiny_model

DRAFTS = {
    "narrow": lambda block: narrow_ffn(block, [1, 2]),
    "linear": lambda block: linear_ffn(block, [torch.eye(HIDDEN)]),
    "low rank": lambda block: linear_ffn(block, [torch.zeros(HIDDEN, 2), torch.zeros(2, HIDDEN)]),
    "experts": lambda block: narrow_experts(block, torch.zeros(4, 2, dtype=torch.long)),
    "bottleneck": lambda block: insert_bottleneck(block, Bottleneck(HIDDEN, 2)),
    "activation": lambda block: replace_activation(block, "identity"),
}


@pytest.mark.parametrize(
    ("name", "draft", "message"),
    [
        *(
            (name, draft, "the FFN of model.layers.0 is a mixture of experts")
            for name in ("mixtral", "gpt_oss")
            for draft in ("narrow", "linear", "low rank")
        ),
        ("llama", "experts", "block 0 of model.layers has no experts"),
        ("gpt_oss", "activation", "the activation of block 0 of model.layers is no module"),
        ("mamba", "narrow", "found no FFN in block 0"),
    ],
)
def test_a_block_of_another_kind(name, draft, message):
    with pytest.raises(UnsupportedModelError, match=message):
        DRAFTS[draft](Anatomy(tiny_model(name)).block(0))


@pytest.fixture(scope="module")
def llama():
    """To look at alone."""
    return tiny_model("llama")


@pytest.mark.parametrize(
    ("draft", "message"),
    [
        (lambda block: replace_activation(block, "identity", 0.0, torch.zeros(96)), 'is for the blend "constant"'),
        (lambda block: replace_activation(block, "leaky", 0.0, torch.zeros(96)), 'is for the blend "constant"'),
        (lambda block: replace_activation(block, "constant", 0.0), 'is for the blend "constant", and needed there'),
        (lambda block: insert_bottleneck(block, Bottleneck(HIDDEN, 65)), "narrower than the stream, 64; got 65"),
        (lambda block: linear_ffn(block, []), "maps must be one matrix, or the two factors of one; got 0"),
        (lambda block: linear_ffn(block, [torch.eye(HIDDEN)] * 3), "maps must be one matrix, .*; got 3"),
    ],
)
def test_sizes_and_numbers_that_do_not_go_together(llama, draft, message):
    with pytest.raises(ValueError, match=message):
        draft(Anatomy(llama).block(0))


@pytest.mark.parametrize("draft", DRAFTS)
@pytest.mark.parametrize("index", [4, -1])
def test_a_block_that_is_not_there_is_refused(llama, draft, index):
    with pytest.raises(ValueError, match=f"^model.layers has the blocks 0 to 3; got {index}"):
        DRAFTS[draft](Block(llama, Anatomy(llama).stack(), index))


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
    block = Anatomy(tiny_model(name)).block(0)
    for units, message in OTHER_UNITS:
        with pytest.raises(ValueError, match=f"^units must be {message}"):
            narrow_ffn(block, units)


OTHER_UNITS_OF_EXPERTS = [
    *(
        ([[0, 1], [0, 1], [0, 1], last], "units must be different numbers of 96 hidden")
        for last in ([0, 96], [0, -1], [2, 2])
    ),
    (torch.zeros(4, 0, dtype=torch.long), "units must be whole numbers"),
    (torch.zeros(4, 1), "units must be whole numbers"),
    ([0, 1, 2, 3], "units must be whole numbers, a list for each FFN"),
    (torch.arange(2).expand(1, 4, 2), "units must be whole numbers, a list for each FFN"),
    (torch.arange(8).expand(5, -1), "holds 4 experts; units name 5"),
    (torch.arange(8).expand(3, -1), "holds 4 experts; units name 3"),
]


def test_units_of_experts_that_are_not_there_are_refused():
    block = Anatomy(tiny_model("mixtral")).block(0)
    for units, message in OTHER_UNITS_OF_EXPERTS:
        with pytest.raises(ValueError, match=message):
            narrow_experts(block, torch.as_tensor(units))
