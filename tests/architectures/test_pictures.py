"""The tiny inputs reach every block of every stack: pictures and sounds run the towers, and matter to the text."""

import pytest
import torch

from tests.helpers import tiny
from tests.helpers.changes import forward, generate, runs_of_blocks

# Of the causal language models, those that read more than text.
_READ_MORE = ("gemma3", "gemma4", "git", "got_ocr2", "moss_transcribe_diarize", "phi4_multimodal")
MODELS = [
    *((tiny.tiny_vision_language_model, name) for name in tiny.VISION_LANGUAGE_TYPES),
    *((tiny.tiny_model, name) for name in _READ_MORE),
    *((tiny.tiny_seq2seq_model, name) for name in ("bart", "t5", "whisper")),
]


@pytest.mark.parametrize(("build", "model_type"), MODELS)
def test_every_block_runs_and_every_picture_matters(build, model_type):
    model = build(model_type)
    for path, runs in runs_of_blocks(model).items():
        assert all(runs), f"{path}: {runs}"
    inputs = tiny.tiny_inputs(model)
    before = forward(model, inputs)
    assert torch.isfinite(before).all()
    for name in ("pixel_values", "image_pixel_values", "input_features", "audio_input_features"):
        if name in inputs:
            others = inputs | {name: inputs[name].flip(0)}
            assert not torch.allclose(forward(model, others), before, atol=1e-4), name


@pytest.mark.parametrize(("build", "model_type"), MODELS)
def test_texts_with_pictures_are_continued(build, model_type):
    model = build(model_type)
    inputs = tiny.tiny_inputs(model)
    assert len(generate(model, inputs)) == tiny.BATCH


def test_a_model_of_text_alone_gets_text_alone():
    assert set(tiny.tiny_inputs(tiny.tiny_model("llama"))) == {"input_ids", "attention_mask"}
