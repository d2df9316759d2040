"""Without its blocks a model is the original with those blocks handing their stream through, or the plan is refused."""

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForImageTextToText,
    CLIPSegConfig,
    CLIPSegForImageSegmentation,
    MixtralConfig,
    MixtralForCausalLM,
)

from hf_compress.anatomy import layout
from hf_compress.anatomy.anatomy import Anatomy
from hf_compress.calibration.data import Batch
from hf_compress.errors import UnsupportedModelError
from hf_compress.plan.edits import RemoveBlocks
from hf_compress.plan.plan import Plan
from hf_compress.rewrite.apply import apply
from hf_compress.rewrite.probe import Probe
from tests.helpers.changes import forward, left_out, merge_plan
from tests.helpers.models import refusing
from tests.helpers.round_trip import TEXT
from tests.helpers.tiny import tiny_inputs, tiny_model, tiny_seq2seq_model
from tests.helpers.variants import Variant


def built(auto, model_type, **settings):
    """A tiny model with these settings of its parts, and its inputs."""
    model = Variant(auto, model_type, settings).build()
    return model, tiny_inputs(model)


def qwen3_vl(places):
    return built(AutoModelForImageTextToText, "qwen3_vl", qwen3_vl_vision={"deepstack_visual_indexes": places})


def qwen2_5_vl(places):
    return built(AutoModelForImageTextToText, "qwen2_5_vl", qwen2_5_vl_vision={"fullatt_block_indexes": places})


def llava(place):
    settings = {"llava": {"vision_feature_layer": place}, "clip_vision_model": {"num_hidden_layers": 5}}
    return built(AutoModelForImageTextToText, "llava", **settings)


def vitdet(windows):
    return built(AutoModel, "vitdet", vitdet={"window_block_indices": windows})


def clipseg(places):
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4}
    decoder = {"reduce_dim": 16, "decoder_num_attention_heads": 2, "decoder_intermediate_size": 16}
    text = {**sizes, "vocab_size": 99, "eos_token_id": 98}
    vision = {**sizes, "image_size": 32, "patch_size": 8}
    config = CLIPSegConfig(text_config=text, vision_config=vision, projection_dim=32, extract_layers=places, **decoder)
    ids = torch.tensor([[5, 6, 7, 98]] * 2)
    return CLIPSegForImageSegmentation(config).eval(), {"input_ids": ids, "pixel_values": torch.randn(2, 3, 32, 32)}


# model, the stack, the setting, where it stands, the blocks to go -> the setting afterwards, None where it is refused
VISUAL, TOWER = "model.visual.blocks", "model.vision_tower.encoder.layers"
SETTINGS = [
    (qwen3_vl, VISUAL, [1, 3], "vision_config.deepstack_visual_indexes", (0,), [0, 2]),
    (qwen3_vl, VISUAL, [1, 3], "vision_config.deepstack_visual_indexes", (1,), [0, 2]),
    (qwen3_vl, VISUAL, [1, 3], "vision_config.deepstack_visual_indexes", (3,), [1, 2]),
    (qwen3_vl, VISUAL, [3, 0], "vision_config.deepstack_visual_indexes", (1,), [2, 0]),
    (qwen3_vl, VISUAL, [1, 2], "vision_config.deepstack_visual_indexes", (2,), None),
    (qwen3_vl, VISUAL, [0, 2], "vision_config.deepstack_visual_indexes", (0,), None),
    (qwen2_5_vl, VISUAL, [1, 3], "vision_config.fullatt_block_indexes", (0,), [0, 2]),
    (qwen2_5_vl, VISUAL, [1, 3], "vision_config.fullatt_block_indexes", (1,), [2]),
    (llava, TOWER, -2, "vision_feature_layer", (1,), -2),
    (llava, TOWER, -2, "vision_feature_layer", (3,), -2),
    (llava, TOWER, -2, "vision_feature_layer", (4,), -1),
    (llava, TOWER, 3, "vision_feature_layer", (2,), 2),
    (llava, TOWER, 1, "vision_feature_layer", (0,), None),
    (llava, TOWER, [-2, -5, 2], "vision_feature_layer", (0, 3), [-2, -4, 1]),
    (vitdet, "encoder.layer", [0, 2], "window_block_indices", (1,), [0, 1]),
    (vitdet, "encoder.layer", [0, 2], "window_block_indices", (2,), [0]),
    (clipseg, "clip.vision_model.encoder.layers", [0, 2], "extract_layers", (1,), [0, 1]),
    (clipseg, "clip.vision_model.encoder.layers", [1, 2], "extract_layers", (2,), [1, 1]),
    (clipseg, "clip.vision_model.encoder.layers", [0, 2], "extract_layers", (0,), None),
]


def removal(model, stack, *blocks, inputs=None):
    """The plan without these blocks, the original without them, and the probe of these inputs."""
    plan = Plan((RemoveBlocks(stack, blocks),))
    return plan, left_out(model, plan), inputs and Probe.of(model, Batch(inputs, None))


def field(config, path):
    *owners, name = path.split(".")
    for owner in owners:
        config = getattr(config, owner)
    return getattr(config, name)


@pytest.mark.parametrize(("build", "stack", "setting", "name", "blocks", "expected"), SETTINGS)
def test_places_of_blocks_move_with_the_blocks(build, stack, setting, name, blocks, expected, tmp_path):
    torch.manual_seed(0)
    model, inputs = build(setting)
    plan, twin, probe = removal(model, stack, *blocks, inputs=inputs)
    if expected is None:
        with refusing(model, UnsupportedModelError, name.rpartition(".")[2]):
            apply(plan, model, probe)
        return
    apply(plan, model, probe)
    assert field(model.config, name) == expected
    assert torch.equal(forward(model, inputs), forward(twin, inputs))
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(forward(type(model).from_pretrained(tmp_path), inputs), forward(twin, inputs))


@pytest.mark.parametrize(
    ("build", "stack", "setting", "name"),
    [
        (qwen3_vl, VISUAL, [1, 3], r"deepstack_visual_indexes=\[1, 3\]"),
        (llava, TOWER, [3, 4], r"vision_feature_layer=\[3, 4\]"),
    ],
)
def test_a_field_that_nobody_renumbers_is_refused_by_name(build, stack, setting, name, monkeypatch):
    """As with a field that is not known here: config and module stay alike, and only the original tells."""
    monkeypatch.setattr(layout, "_TAPS", {})
    model, inputs = build(setting)
    plan, _, probe = removal(model, stack, 0, inputs=inputs)
    with refusing(model, UnsupportedModelError, rf"goes by a block's place; .*{name}"):
        apply(plan, model, probe)


def test_text_blocks_that_pictures_enter_behind_have_to_stay():
    model, inputs = qwen3_vl([1, 3])
    text = "model.language_model.layers"
    for blocks in ((0,), (1, 3)):
        with pytest.raises(UnsupportedModelError, match="deepstack_visual_indexes"):
            apply(Plan((RemoveBlocks(text, blocks),)), model)  # on a text alone, which does not show it
    plan, twin, _ = removal(model, text, 2)
    apply(plan, model)
    assert torch.equal(forward(model, inputs), forward(twin, inputs))


def test_blocks_that_the_inputs_do_not_reach_stay():
    model, inputs = llava(-2)
    plan, _, probe = removal(model, TOWER, 1, inputs=inputs)
    with refusing(model, UnsupportedModelError, "do not reach the block"):
        apply(plan, model)
    apply(plan, model, probe)


def test_after_a_merge_it_is_the_original_with_the_new_weights():
    model = tiny_model("llama")
    inputs, anatomy = tiny_inputs(model), Anatomy(model)
    plan = merge_plan(anatomy, anatomy.stack())
    twin = left_out(model, plan)
    apply(plan, model, Probe.of(model, Batch(inputs, None)))
    assert torch.equal(forward(model, inputs), forward(twin, inputs))


def test_a_block_goes_with_the_hooks_that_change_its_stream():
    """On a block that stays they would be no part of what is saved."""
    model = tiny_model("llama")
    block = model.model.layers[1]
    block.register_forward_pre_hook(lambda _, args: (1.5 * args[0], *args[1:]))
    block.register_forward_hook(lambda _, args, output: 1.5 * output)
    apply(Plan((RemoveBlocks("model.layers", (1,)),)), model)
    assert block not in list(model.model.layers)
    model.model.layers[1].register_forward_hook(lambda _, args, output: 1.5 * output)
    with refusing(model, UnsupportedModelError, "gives other outputs"):
        apply(Plan((RemoveBlocks("model.layers", (2,)),)), model)


@pytest.mark.parametrize("flag", ["output_router_logits", "output_hidden_states", "output_attentions"])
def test_outputs_with_an_entry_a_block_are_no_difference(flag):
    config = MixtralConfig(
        **TEXT, num_key_value_heads=2, num_local_experts=4, attn_implementation="eager", **{flag: True}
    )
    apply(Plan((RemoveBlocks("model.layers", (1,)),)), MixtralForCausalLM(config).eval())


@pytest.fixture
def whisper():
    """A tiny Whisper whose generation config names blocks of the decoder."""
    model = tiny_seq2seq_model("whisper")
    own = model.generation_config
    own.alignment_heads, own.dola_layers, own.assistant_early_exit = [[0, 1], [1, 0], [3, 1]], [0, 2, 4], 2
    return model


def remove(model, side, block):
    plan, _, probe = removal(model, f"model.{side}.layers", block, inputs=tiny_inputs(model))
    apply(plan, model, probe)


def test_a_generation_config_is_renumbered_too(whisper):
    remove(whisper, "encoder", 0)
    assert whisper.generation_config.alignment_heads == [[0, 1], [1, 0], [3, 1]]  # the decoder's
    remove(whisper, "decoder", 1)
    assert whisper.generation_config.alignment_heads == [[0, 1], [2, 1]]
    assert whisper.generation_config.dola_layers == [0, 1, 3]
    assert whisper.generation_config.assistant_early_exit == 1


def test_without_any_of_its_heads_left_a_model_has_no_alignment(whisper):
    whisper.generation_config.alignment_heads = [[1, 0]]
    remove(whisper, "decoder", 1)
    assert not hasattr(whisper.generation_config, "alignment_heads")  # Whisper then says so itself


def test_a_refusal_gives_a_generation_config_back(whisper):
    probe = Probe.of(whisper, Batch(tiny_inputs(whisper), None))
    whisper.model.decoder.layers[3].forward = None
    with pytest.raises(UnsupportedModelError):
        apply(Plan((RemoveBlocks("model.decoder.layers", (1,)),)), whisper, probe)
    assert whisper.generation_config.alignment_heads == [[0, 1], [1, 0], [3, 1]]
