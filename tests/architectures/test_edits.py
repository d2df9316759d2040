"""Edits of modules on every architecture that can be built tiny: they save and load, or are refused with a reason.

Reversing the order of an FFN's hidden units changes every tensor of it and nothing that is computed, so it shows that
the right tensors were found; the order of an attention's heads alike. A bottleneck changes no shape, so it shows that
a seal can be set.
"""

from collections.abc import Callable

import pytest
import torch

from hf_compress.anatomy.anatomy import Anatomy, Block
from hf_compress.anatomy.parts import expert_axes, hidden_size
from hf_compress.errors import PlanError, UnsupportedModelError
from hf_compress.plan.plan import Plan
from hf_compress.rewrite import builders
from hf_compress.rewrite.apply import apply
from hf_compress.rewrite.probe import quiet
from hf_compress.storage.save import save
from tests.helpers.changes import forward
from tests.helpers.matrix import FAMILIES
from tests.helpers.plans import linear_bottleneck
from tests.helpers.tiny import CannotBuild, tiny_inputs

SIDES = {"causal": (None,), "encoder": (None,), "seq2seq": ("encoder", "decoder"), "vlm": (None,)}
TYPES = [(key, kind, side) for key, sides in SIDES.items() for kind in FAMILIES[key].types for side in sides]
# What may be refused, by a word of the reason; all else has to be changed.
REFUSED = {
    "reversed_units": {
        "bitnet": "it, too, has an entry for each hidden unit",  # a norm
        "swin": "it, too, has an entry for each hidden unit",  # a block is itself a list of blocks
        "zamba": "is shared",
        "zamba2": "is shared",
        "longcat_flash": "experts",
    },
    "reversed_heads": {"zamba": "is shared", "zamba2": "is shared"},
    "bottleneck": {
        "qwen4_exp": "does not run",  # four streams side by side
        "qwen4_exp_text": "does not run",
        "reformer": "does not run",  # two streams
        "rwkv": "layers_are_rescaled",
        "swin": "shift_size",  # its config cannot say it even unchanged
    },
}
NOTHING = "no part to change was found"
SPEECH = ("takes input_values", "takes input_features", "does not run on the inputs it would be checked with")


def reversed_units(block: Block) -> Plan | None:
    ffn = block.parts.ffn
    if ffn is None:
        return None
    if ffn.experts is None:
        return builders.narrow_ffn(block, range(ffn.width)[::-1])
    experts = block.module.get_submodule(ffn.experts)
    count = len(experts.get_parameter(next(iter(expert_axes(experts).of))))
    return builders.narrow_experts(block, torch.arange(ffn.width).flip(0).expand(count, -1))


def reversed_heads(block: Block) -> Plan | None:
    try:
        groups = builders.heads_of(block).groups
    except UnsupportedModelError:
        return None
    return builders.narrow_attention(block, range(groups)[::-1])


def bottleneck(block: Block) -> Plan:
    d = hidden_size(block.stack.configs[0][0])
    directions = torch.linalg.qr(torch.randn(d, d // 2, generator=torch.Generator().manual_seed(0))).Q
    return builders.insert_bottleneck(block, linear_bottleneck(directions, 0.9 * directions.T))


def change(key: str, kind: str, side: str | None, draft: Callable[..., Plan | None], folder) -> float | None:
    """Change the last block, save, and how far the outputs moved, relative to the largest; None where it cannot be."""
    try:
        model = FAMILIES[key].build(kind)
        stack = Anatomy(model).stack(side)
    except (CannotBuild, UnsupportedModelError):
        return None
    inputs = tiny_inputs(model)
    before = forward(model, inputs)
    refusal = try_out(model, lambda: draft(Block(model, stack, len(stack) - 1)), folder)
    if refusal:
        expected = (NOTHING, *SPEECH, REFUSED[draft.__name__].get(kind, "nothing else"))
        assert any(words in refusal for words in expected), refusal
        return None
    return float((forward(model, inputs) - before).abs().max() / before.abs().max())


def try_out(model, draft: Callable[[], Plan | None], folder) -> str:
    """Change and save a model; why it was refused, or nothing."""
    try:
        with quiet():
            plan = draft()
            if plan is None:
                return NOTHING
            apply(plan, model)
            save(model, folder / "out")
    except (UnsupportedModelError, PlanError) as error:
        return str(error)
    return ""


@pytest.mark.slow
@pytest.mark.parametrize(("key", "kind", "side"), TYPES)
@pytest.mark.parametrize("draft", [reversed_units, reversed_heads])
def test_another_order_moves_nothing(draft, key, kind, side, tmp_path):
    moved = change(key, kind, side, draft, tmp_path)
    assert moved is None or moved < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize(("key", "kind", "side"), TYPES)
def test_bottleneck(key, kind, side, tmp_path):
    assert change(key, kind, side, bottleneck, tmp_path) != 0
