"""Without its blocks a model is the original with those blocks handing their stream through, or the plan is refused."""

import copy

import pytest
import torch
from transformers import (
    AutoModel,
    CLIPSegConfig,
    CLIPSegForImageSegmentation,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    VitDetConfig,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from hf_compress.anatomy import layout
from hf_compress.anatomy.anatomy import Anatomy
from hf_compress.calibration.data import Batch
from hf_compress.errors import UnsupportedModelError
from hf_compress.plan.edits import RemoveBlocks
from hf_compress.plan.plan import Plan
from hf_compress.rewrite.apply import apply
from hf_compress.rewrite.probe import Probe
from tests.helpers.changes import Trace, merge_plan
from tests.helpers.models import refusing
from tests.helpers.tiny import tiny_inputs, tiny_model

TEXT = {
    "vocab_size": 99,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
VISION = {
    "depth": 4,
    "hidden_size": 32,
    "num_heads": 4,
    "intermediate_size": 64,
    "out_hidden_size": 64,
    "patch_size": 4,
    "temporal_patch_size": 1,
}
ROPE = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4}


def qwen3_vl(places):
    vision = {**VISION, "num_position_embeddings": 64, "deepstack_visual_indexes": places}
    text = {**TEXT, "head_dim": 16, "rope_parameters": ROPE}
    config = Qwen3VLConfig(image_token_id=90, text_config=text, vision_config=vision)
    ids = torch.tensor([[5, 92, 90, 90, 93, 7]])
    return Qwen3VLForConditionalGeneration(config).eval(), {
        "input_ids": ids,
        "pixel_values": torch.randn(8, 48),
        "image_grid_thw": torch.tensor([[1, 2, 4]]),
        "mm_token_type_ids": (ids == 90).long(),
    }


def qwen2_5_vl(places):
    vision = {**VISION, "window_size": 16, "fullatt_block_indexes": places}
    text = {**TEXT, "rope_parameters": ROPE}
    config = Qwen2_5_VLConfig(image_token_id=90, text_config=text, vision_config=vision)
    ids = torch.tensor([[5, 92, *[90] * 16, 93, 7]])
    return Qwen2_5_VLForConditionalGeneration(config).eval(), {
        "input_ids": ids,
        "pixel_values": torch.randn(64, 48),
        "image_grid_thw": torch.tensor([[1, 8, 8]]),
    }


def llava(place):
    vision = {"model_type": "clip_vision_model", "image_size": 32, "patch_size": 8, **TEXT, "num_hidden_layers": 5}
    del vision["vocab_size"], vision["num_key_value_heads"]
    text = {"model_type": "llama", **TEXT}
    config = LlavaConfig(image_token_id=90, text_config=text, vision_config=vision, vision_feature_layer=place)
    return LlavaForConditionalGeneration(config).eval(), {
        "input_ids": torch.tensor([[5, 6] + [90] * 16 + [7, 8]] * 2),
        "pixel_values": torch.randn(2, 3, 32, 32),
    }


def vitdet(windows):
    sizes = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "image_size": 32, "patch_size": 4}
    config = VitDetConfig(**sizes, pretrain_image_size=32, window_size=2, window_block_indices=windows)
    return AutoModel.from_config(config).eval(), {"pixel_values": torch.randn(2, 3, 32, 32)}


def clipseg(places):
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4}
    text = {**sizes, "vocab_size": 99, "eos_token_id": 98}
    config = CLIPSegConfig(
        text_config=text,
        vision_config={**sizes, "image_size": 32, "patch_size": 8},
        projection_dim=32,
        extract_layers=places,
        reduce_dim=16,
        decoder_num_attention_heads=2,
        decoder_intermediate_size=16,
    )
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


def field(config, path):
    *owners, name = path.split(".")
    for owner in owners:
        config = getattr(config, owner)
    return getattr(config, name)


def left_out(model, path, blocks):
    """A copy in which blocks return what they are given: by the words of the paper, not by those of the package."""
    twin = copy.deepcopy(model)
    for index in blocks:
        block = twin.get_submodule(path)[index]
        own = block.forward

        def through(hidden, *args, own=own, **kwargs):
            output = own(hidden, *args, **kwargs)
            return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

        block.forward = through
    return twin


def logits(model, inputs):
    torch.manual_seed(0)
    with torch.no_grad():
        return model(**inputs)[0]


@pytest.mark.parametrize(("build", "stack", "setting", "name", "blocks", "expected"), SETTINGS)
def test_places_of_blocks_move_with_the_blocks(build, stack, setting, name, blocks, expected, tmp_path):
    torch.manual_seed(0)
    model, inputs = build(setting)
    assert len(set(model.get_submodule(stack))) > len(blocks)
    twin, plan = left_out(model, stack, blocks), Plan((RemoveBlocks(stack, blocks),))
    probe = Probe.of(model, Batch(inputs, None))
    before = Trace.of(model)
    if expected is None:
        with pytest.raises(UnsupportedModelError, match=name.rpartition(".")[2]):
            apply(plan, model, probe)
        assert before.difference(model) is None
        return
    apply(plan, model, probe)
    assert field(model.config, name) == expected
    torch.testing.assert_close(logits(model, inputs), logits(twin, inputs), rtol=0, atol=0)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(type(model).from_pretrained(tmp_path).eval(), inputs), logits(twin, inputs))


@pytest.mark.parametrize(
    ("build", "stack", "setting", "name"),
    [
        (qwen3_vl, VISUAL, [1, 3], "deepstack_visual_indexes=[1, 3]"),
        (llava, TOWER, [3, 4], "vision_feature_layer=[3, 4]"),
    ],
)
def test_a_field_that_nobody_renumbers_is_refused_by_name(build, stack, setting, name, monkeypatch):
    """As with a field that is not known here: config and module stay alike, and only the original tells."""
    monkeypatch.setattr(layout, "_TAPS", {})
    torch.manual_seed(0)
    model, inputs = build(setting)
    probe = Probe.of(model, Batch(inputs, None))
    before = Trace.of(model)
    with pytest.raises(UnsupportedModelError, match="goes by a block's place") as error:
        apply(Plan((RemoveBlocks(stack, (0,)),)), model, probe)
    assert name in str(error.value)
    assert before.difference(model) is None


def test_text_blocks_that_pictures_enter_behind_have_to_stay():
    model, inputs = qwen3_vl([1, 3])
    text = "model.language_model.layers"
    for blocks in ((0,), (1, 3)):
        with pytest.raises(UnsupportedModelError, match="deepstack_visual_indexes"):
            apply(Plan((RemoveBlocks(text, blocks),)), model)  # on a text alone, which does not show it
    twin = left_out(model, text, (2,))
    apply(Plan((RemoveBlocks(text, (2,)),)), model)
    assert torch.equal(logits(model, inputs), logits(twin, inputs))


def test_blocks_that_the_inputs_do_not_reach_stay():
    model, inputs = llava(-2)
    with refusing(model, UnsupportedModelError, "do not reach the block"):
        apply(Plan((RemoveBlocks(TOWER, (1,)),)), model)
    apply(Plan((RemoveBlocks(TOWER, (1,)),)), model, Probe.of(model, Batch(inputs, None)))


def test_after_a_merge_it_is_the_original_with_the_new_weights():
    model = tiny_model("llama")
    inputs, anatomy = tiny_inputs(model), Anatomy(model)
    plan = merge_plan(anatomy, anatomy.stack())
    twin = left_out(model, plan.stacks[0], plan.removed(plan.stacks[0]))
    twin.load_state_dict(plan.tensors, strict=False)
    apply(plan, model, Probe.of(model, Batch(inputs, None)))
    assert torch.equal(logits(model, inputs), logits(twin, inputs))


@pytest.mark.parametrize("flag", ["output_router_logits", "output_hidden_states", "output_attentions"])
def test_outputs_with_an_entry_a_block_are_no_difference(flag):
    config = MixtralConfig(**TEXT, num_local_experts=4, attn_implementation="eager", **{flag: True})
    apply(Plan((RemoveBlocks("model.layers", (1,)),)), MixtralForCausalLM(config).eval())


def whisper(heads):
    sizes = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 4, "num_mel_bins": 8, "max_source_positions": 20}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 3}
    heads_of = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    config = WhisperConfig(vocab_size=200, suppress_tokens=None, begin_suppress_tokens=None, **sizes, **ids, **heads_of)
    model = WhisperForConditionalGeneration(config).eval()
    model.generation_config.alignment_heads = heads
    model.generation_config.dola_layers = [0, 2, 4]
    model.generation_config.assistant_early_exit = 2
    return model, Probe.of(model, Batch({"input_features": torch.randn(2, 8, 40)}, None))


def test_a_generation_config_is_renumbered_too():
    model, probe = whisper([[0, 1], [1, 0], [3, 1]])
    apply(Plan((RemoveBlocks("model.encoder.layers", (0,)),)), model, probe)
    assert model.generation_config.alignment_heads == [[0, 1], [1, 0], [3, 1]]  # the decoder's
    apply(Plan((RemoveBlocks("model.decoder.layers", (1,)),)), model, probe)
    assert model.generation_config.alignment_heads == [[0, 1], [2, 1]]
    assert model.generation_config.dola_layers == [0, 1, 3]
    assert model.generation_config.assistant_early_exit == 1


def test_without_any_of_its_heads_left_a_model_has_no_alignment():
    model, probe = whisper([[1, 0]])
    apply(Plan((RemoveBlocks("model.decoder.layers", (1,)),)), model, probe)
    assert not hasattr(model.generation_config, "alignment_heads")  # Whisper then says so itself


def test_a_refusal_gives_a_generation_config_back():
    model, probe = whisper([[1, 0], [3, 1]])
    model.model.decoder.layers[3].forward = None
    with pytest.raises(UnsupportedModelError):
        apply(Plan((RemoveBlocks("model.decoder.layers", (1,)),)), model, probe)
    assert model.generation_config.alignment_heads == [[1, 0], [3, 1]]
