"""Conversations as calibration data, in every container, written out by the tokenizer's template."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from datasets import Dataset
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from hf_compress import DropBlocksConfig, compress
from hf_compress.calibration.data import DataOptions, prepare
from hf_compress.calibration.files import load_texts
from hf_compress.calibration.reading import read_texts
from hf_compress.errors import CalibrationError
from tests.helpers.language import word_tokenizer
from tests.helpers.media import images

CHATS = [
    [{"role": "user", "content": "w1 w2"}, {"role": "assistant", "content": "w3"}],
    [{"role": "user", "content": "w4"}],
]
TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'system' %}{{ raise_exception('no system, please') }}"
    "{% endif %}<s> {{ message['content'] }} </s> {% endfor %}"
)
WRITTEN = ["<s> w1 w2 </s> <s> w3 </s>", "<s> w4 </s>"]


@pytest.fixture
def chatting(framing_tokenizer):
    framing_tokenizer.chat_template = TEMPLATE
    return framing_tokenizer


def file_of(folder):
    path = folder / "chats.jsonl"
    path.write_text("".join(json.dumps({"prompt": "w1", "id": "x", "messages": chat}) + "\n" for chat in CHATS))
    return path


KINDS = {
    "list": lambda folder: CHATS,
    "rows": lambda folder: [{"messages": chat} for chat in CHATS],
    "dataset": lambda folder: Dataset.from_list([{"prompt": "w1", "messages": chat} for chat in CHATS]),
    "stream": lambda folder: Dataset.from_list([{"messages": chat} for chat in CHATS]).to_iterable_dataset(),
    "arrays": lambda folder: pd.DataFrame({"messages": [np.array(chat, dtype=object) for chat in CHATS]}),
    "frame": lambda folder: pd.DataFrame({"messages": CHATS, "prompt": ["w1", "w2"]}),
    "generator": lambda folder: iter(CHATS),
    "file": file_of,
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_container(kind, model, chatting, tmp_path):
    (batch,) = prepare(KINDS[kind](tmp_path), model, chatting).batches
    expected = chatting(WRITTEN, add_special_tokens=False)["input_ids"]
    rows = zip(batch.inputs["input_ids"], batch.inputs["attention_mask"].bool(), strict=True)
    assert [ids[mask].tolist() for ids, mask in rows] == expected
    assert batch.real.sum() == 4, "special tokens of the template do not count"


def test_a_column_of_another_name_and_a_length(model, chatting):
    data = Dataset.from_list([{"turns": chat, "text": "w9"} for chat in CHATS])
    options = DataOptions(text_column="turns", max_length=3, max_samples=1, seed=None)
    (batch,) = prepare(data, model, chatting, options).batches
    assert batch.inputs["input_ids"].tolist() == [chatting(WRITTEN[0], add_special_tokens=False)["input_ids"][:3]]
    texts = prepare(data, model, chatting).batches[0].inputs["input_ids"]
    assert torch.equal(texts, prepare(["w9", "w9"], model, chatting).batches[0].inputs["input_ids"])


def test_no_tokenizer_and_no_template(model, tokenizer):
    with pytest.raises(CalibrationError, match="calibration is conversations: pass tokenizer="):
        prepare(CHATS, model, None)
    with pytest.raises(CalibrationError, match=r"has no chat template: pass texts, or set tokenizer\.chat_template"):
        prepare(CHATS, model, tokenizer)


def test_a_single_one(model, chatting):
    with pytest.raises(CalibrationError, match=r"a single conversation: pass a list of them, \[conversation\]"):
        prepare(CHATS[0], model, chatting)


def test_messages_of_another_kind_are_no_conversations(model, chatting):
    texts = prepare({"messages": [3, 4], "body": ["w1 w2", "w3"]}, model, chatting).batches[0]
    assert torch.equal(
        texts.inputs["input_ids"], prepare(["w1 w2", "w3"], model, chatting).batches[0].inputs["input_ids"]
    )


def test_an_empty_one_in_a_file_is_left_out_and_none_can_be_scored(tmp_path):
    path = file_of(tmp_path)
    path.write_text(path.read_text() + json.dumps({"prompt": "w1", "id": "y", "messages": []}) + "\n")
    assert load_texts(path) == CHATS
    with pytest.raises(TypeError, match=r"texts\[0\] is a conversation; expected a string"):
        read_texts(path)


def test_something_else_among_them(model, chatting):
    with pytest.raises(CalibrationError, match="all conversations or none; entry 1 is a list"):
        prepare([CHATS[0], [{"said": "w1"}]], model, chatting)
    with pytest.raises(CalibrationError, match=r"does not take conversation 1: .*no system, please"):
        prepare([CHATS[0], [{"role": "system", "content": "w1"}]], model, chatting)


# --- with images ------------------------------------------------------------------------------------------------------

SEEING = (
    "{% for message in messages %}<s> {% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{{ '<image>' if part['type'] == 'image' else part['text'] }} {% endfor %}"
    "{% endif %} </s>{% endfor %}"
)


def seen(image, text):
    return [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": text}]}]


PICTURES = [seen(image, text) for image, text in zip(images(5), ["w1", "w1 w2", "w3", "w4 w5", "w6"], strict=True)]


@pytest.fixture
def seeing():
    """A model of texts and images, and its processor."""
    tokenizer = word_tokenizer(add_special=False)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    side = {"height": 16, "width": 16}
    processor = LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size=side),
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        chat_template=SEEING,
        num_additional_image_tokens=1,
    )
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    vision = CLIPVisionConfig(num_hidden_layers=2, image_size=16, patch_size=8, **sizes)
    text = LlamaConfig(vocab_size=len(tokenizer), num_hidden_layers=4, max_position_embeddings=64, **sizes)
    image = tokenizer.convert_tokens_to_ids("<image>")
    torch.manual_seed(0)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=image, vision_feature_layer=-1)
    return LlavaForConditionalGeneration(config).eval(), processor


def test_conversations_with_images(seeing):
    model, processor = seeing
    data = prepare(PICTURES, model, processor, DataOptions(batch_size=3))
    assert [batch.samples for batch in data] == [3, 2]
    assert data.tokens == 7, "neither padding, nor special tokens, nor what stands for an image"
    pixels = torch.cat([batch.inputs["pixel_values"] for batch in data])
    assert torch.equal(pixels, processor.image_processor(images(5), return_tensors="pt")["pixel_values"])
    small = compress(model, DropBlocksConfig(num_blocks=1, criterion="block_influence"), PICTURES, processor)
    assert len(small.model.language_model.layers) == 3
    written = prepare([[{"role": "user", "content": "w1 w2"}]], model, processor).batches[0]
    assert written.inputs["input_ids"].tolist() == [processor.tokenizer("<s> w1 w2 </s>")["input_ids"]]


def test_what_of_conversations_with_images_is_refused(seeing):
    model, processor = seeing
    with pytest.raises(CalibrationError, match="conversations with images or sounds: pass the model's processor"):
        prepare(PICTURES, model, processor.tokenizer)
    with pytest.raises(CalibrationError, match="has 8 tokens with its images, and at most 6 fit: leave it out"):
        prepare(PICTURES, model, processor, DataOptions(max_length=6))
    with pytest.raises(CalibrationError, match="processor does not take conversations 0 to 0"):
        prepare([seen("no such file.png", "w1")], model, processor)
    with pytest.raises(CalibrationError, match=r"data is images, and Llava.* reads input_ids: pass conversations with"):
        prepare(images(2), model, processor)
