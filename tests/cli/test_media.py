"""The command line on models of images and sounds: a folder is their calibration data."""

import json
import shutil

import pytest
import torch
from datasets import Dataset
from datasets import Image as ImageFeature
from transformers import AutoFeatureExtractor, AutoImageProcessor, AutoModelForImageClassification
from transformers import Wav2Vec2FeatureExtractor as Extractor

from tests.helpers.command_line import done, refused
from tests.helpers.language import tiny_llama, word_tokenizer
from tests.helpers.media import image_files, image_processor, images, sound_files, tiny_vit, tiny_wav2vec2

DROP = ("--method", "drop_blocks", "--num", "1", "--set", "criterion=block_influence")


@pytest.fixture(scope="module")
def gallery(tmp_path_factory):
    """A folder with models, and data for them."""
    home = tmp_path_factory.mktemp("gallery")
    for part in (tiny_vit(), image_processor()):
        part.save_pretrained(home / "vit")
    for part in (tiny_wav2vec2(), Extractor()):
        part.save_pretrained(home / "wav2vec2")
    for part in (tiny_llama(3), word_tokenizer(add_special=False)):
        part.save_pretrained(home / "llama")
    paths = image_files(home / "images", 24)
    sound_files(home / "sounds")
    data = Dataset.from_dict({"picture": [str(path) for path in paths]}).cast_column("picture", ImageFeature())
    data.to_parquet(home / "images.parquet")
    (home / "texts.jsonl").write_text("".join(json.dumps({"text": f"w{n} w{n}"}) + "\n" for n in range(9)))
    (home / "broken").mkdir()
    (home / "broken" / "no.png").write_bytes(b"hello")
    (home / "empty").mkdir()
    return home


@pytest.mark.parametrize("data", ["images", "images.parquet"])
def test_compress_with_images(data, gallery, tmp_path):
    output = tmp_path / "small"
    arguments = ("--calibration", gallery / data, "--samples", "16", "--seed", "3", "--output", output)
    done("compress", gallery / "vit", *DROP, *arguments)
    model = AutoModelForImageClassification.from_pretrained(output)
    assert model.config.num_hidden_layers == 2
    told = json.loads((output / "compression_report.json").read_text())["stages"][0]["calibration"]
    drawn = {"source": str(gallery / data), "asked": 16, "drawn_with": 3, "of": 24, "seed": 3, "batch_size": 8}
    assert told == drawn | {"samples": 16, "tokens": 0, "truncated": 0}
    assert f"16 samples of 24, drawn with seed 3; from {data}." in (output / "README.md").read_text()
    assert f"16 samples of 24, drawn with seed 3; from {gallery / data}" in done("info", output).replace("\n", "")
    found = AutoImageProcessor.from_pretrained(output)(images(), return_tensors="pt")["pixel_values"]
    assert torch.equal(found, image_processor()(images(), return_tensors="pt")["pixel_values"])


def test_analyze_and_sounds(gallery, tmp_path):
    assert "what would be taken out" in done("analyze", gallery / "vit", "--calibration", gallery / "images")
    output = tmp_path / "small"
    done("compress", gallery / "wav2vec2", *DROP, "--calibration", gallery / "sounds", "--output", output)
    assert AutoFeatureExtractor.from_pretrained(output).sampling_rate == 16_000


def test_the_seed_decides_which_are_drawn(gallery, tmp_path):
    found = []
    for seed in ("0", "0", "1"):
        arguments = ("--samples", "12", "--seed", seed, "--output", tmp_path / f"{len(found)}")
        done("analyze", gallery / "vit", "--calibration", gallery / "images", *arguments)
        found.append(json.loads((tmp_path / f"{len(found)}" / "analysis.json").read_text())["similarity"])
    assert found[0] == found[1] != found[2]


REFUSED = {
    "a folder without images": ("vit", "empty", "holds no images: no .jpg"),
    "a broken image": ("vit", "broken", "no.png cannot be read as an image"),
    "one that is broken": ("vit", "broken/no.png", "no.png cannot be read as an image"),
    "images for a model of texts": ("llama", "images", "the data is images, and LlamaForCausalLM reads input_ids"),
    "texts for a model of images": (
        "vit",
        "texts.jsonl",
        "the data is texts, and ViTForImageClassification reads",
    ),
    "sounds for a model of images": ("vit", "sounds", "holds no images"),
    "images for a model of sounds": ("wav2vec2", "images", "holds no sounds"),
    "nothing": ("vit", "nowhere", "no such file or folder"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_refused(kind, gallery):
    model, data, message = REFUSED[kind]
    assert message in refused("compress", gallery / model, *DROP, "--calibration", gallery / data, "--plan")


def test_no_image_processor(gallery, tmp_path):
    folder = shutil.copytree(gallery / "vit", tmp_path / "vit")
    (folder / "preprocessor_config.json").unlink()
    line = refused("compress", folder, *DROP, "--calibration", gallery / "images", "--plan")
    assert "has no image processor that loads, and images need one: save the model's there" in line
    assert "The smaller model was made" in done("compress", folder, *DROP[:4], "--set", "criterion=last", "--plan")
