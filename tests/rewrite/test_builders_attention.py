"""Attention with fewer heads: as the original computes with the others silenced, in memory and from a file."""

import pytest
import torch

from hf_compress.anatomy.anatomy import Anatomy, Block
from hf_compress.anatomy.undo import Undo
from hf_compress.errors import PlanError, UnsupportedModelError
from hf_compress.plan.plan import Plan
from hf_compress.rewrite.apply import apply, carry_out
from hf_compress.rewrite.builders import heads_of, narrow_attention
from hf_compress.rewrite.edits import edit_from_dict
from hf_compress.rewrite.edits.attention import NarrowAttention
from hf_compress.rewrite.record import recorded
from tests.helpers.changes import forward
from tests.helpers.ffns import assert_close, hooked, noise
from tests.helpers.models import refusing, saved_and_loaded
from tests.helpers.tiny import tiny_base_model, tiny_inputs, tiny_model, tiny_seq2seq_model

# grouped queries, norms of queries and keys by head; one key for each query; biases; two modules; parallel blocks
FAMILIES = {
    "llama": (tiny_model, "model.layers"),
    "qwen3": (tiny_model, "model.layers"),
    "gemma2": (tiny_model, "model.layers"),
    "gptj": (tiny_model, "transformer.h"),
    "opt": (tiny_model, "model.decoder.layers"),
    "bert": (tiny_base_model, "encoder.layer"),
    "vit": (tiny_base_model, "layers"),
    "distilbert": (tiny_base_model, "transformer.layer"),
    "bart": (tiny_seq2seq_model, "model.encoder.layers"),
}


def built(name):
    build, path = FAMILIES[name]
    model = build(name)
    return model, Anatomy(model).stack(path), tiny_inputs(model)


def silenced(model, stack, kept, inputs):
    """What the original gives when the outputs of all other heads are put to zero, by block."""
    handles = []
    for index, groups in kept.items():
        heads = heads_of(Block(model, stack, index))
        mask = torch.zeros(heads.groups, heads.per_group * heads.width)
        mask[groups] = 1
        mask = mask.flatten()
        output = stack.blocks[index].get_submodule(heads.output)
        handles.append(output.register_forward_pre_hook(lambda _, args, mask=mask: (args[0] * mask, *args[1:])))
    with hooked(*handles):
        return forward(model, inputs)


@pytest.mark.parametrize("name", FAMILIES)
def test_heads_left_out_are_heads_silenced(name, tmp_path):
    model, stack, inputs = built(name)
    groups = heads_of(Block(model, stack, 1)).groups
    kept = [groups - 1, *range(groups - 2)]
    before, expected = forward(model, inputs), silenced(model, stack, {1: kept}, inputs)
    apply(narrow_attention(Block(model, stack, 1), kept), model)
    assert_close(forward(model, inputs), expected, before)
    assert recorded(model.config)  # one block alone
    saved_and_loaded(model, tmp_path / "saved", inputs)


@pytest.mark.parametrize("name", ["llama", "qwen3", "vit", "bert"])
def test_the_same_number_in_all_blocks_is_plain_where_a_config_can_say_it(name, tmp_path):
    model, stack, inputs = built(name)
    kept = {index: [heads_of(Block(model, stack, index)).groups - 1] for index in range(len(stack))}
    expected = silenced(model, stack, kept, inputs)
    plans = [narrow_attention(Block(model, stack, index), groups) for index, groups in kept.items()]
    apply(sum(plans, start=Plan()), model)
    assert_close(forward(model, inputs), expected)
    assert bool(recorded(model.config)) == (name == "bert")  # whose heads are always as wide as fits
    saved_and_loaded(model, tmp_path / "saved", inputs)


def test_generation_goes_on_with_fewer_heads():
    model, stack, inputs = built("llama")
    apply(narrow_attention(Block(model, stack, 2), [1]), model)
    ids = inputs["input_ids"][:, :4]
    out = model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
    for length in range(4, 8):  # with a cache as without
        assert torch.equal(out[:, length], model(out[:, :length]).logits[:, -1].argmax(-1))


def test_another_output_projection():
    model, stack, _ = built("bert")
    heads = heads_of(Block(model, stack, 0))
    writes = noise(heads.per_group * heads.width, 64), noise(64, seed=9)
    carry_out(narrow_attention(Block(model, stack, 0), [0], writes), model, Undo())
    output = stack.blocks[0].get_submodule(heads.output)
    assert torch.equal(output.weight, writes[0].T)
    assert torch.equal(output.bias, writes[1])
    model, stack, _ = built("llama")
    with pytest.raises(ValueError, match="has no bias, and gets none"):
        narrow_attention(Block(model, stack, 0), [0], (noise(32, 64), noise(64)))


def test_refuses_heads_that_cannot_be_told_apart():
    for name, reason in {"gpt2": "no projections of its own", "olmo2": "q_norm", "phi3": "no projections"}.items():
        model = tiny_model(name)
        with pytest.raises(UnsupportedModelError, match=reason):
            narrow_attention(Anatomy(model).block(0), [0])
    model, stack, _ = built("llama")
    for wrong in ([7], [0, 0], [], [0.5]):
        with pytest.raises(ValueError, match=r"key and value heads|whole numbers"):
            narrow_attention(Block(model, stack, 0), wrong)


def test_edits_that_fit_no_attention():
    model, stack, _ = built("llama")
    edit = narrow_attention(Block(model, stack, 0), [0]).edits[0].to_dict()
    assert isinstance(edit_from_dict(edit), NarrowAttention)
    for change in ({"heads": 3, "groups": 2}, {"width": 0}, {"heads": "2"}, {"output": None}):
        with pytest.raises(PlanError):
            edit_from_dict(edit | change)
    swapped = {"output": edit["key"], "key": edit["output"]}
    for change in ({"width": 5}, {"heads": 8}, {"heads": 400, "groups": 200}, swapped):
        with refusing(model, PlanError, r"the plan asks for|not those of one attention|gives no values"):
            apply(Plan((edit_from_dict(edit | change),)), model)
