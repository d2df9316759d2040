"""Images as calibration data: every container gives the same pixels, and what cannot be read is named."""

import itertools
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from datasets import Dataset, DatasetDict, IterableDataset
from datasets import Image as ImageFeature
from PIL import Image

from hf_compress import DropBlocksConfig, compress, heal, relevance
from hf_compress.calibration import reading, tables
from hf_compress.calibration.data import DataOptions, prepare
from hf_compress.calibration.sampling import indices, reservoir
from hf_compress.errors import CalibrationError
from hf_compress.training.heal import _training_data
from tests.helpers.language import tiny_llama
from tests.helpers.media import LABELS, image_files, image_processor, images, tiny_vit


def dataset(paths):
    columns = {"number": range(len(paths)), "image": [str(path) for path in paths], "label": LABELS}
    return Dataset.from_dict(columns).cast_column("image", ImageFeature())


def saved(paths):
    dataset(paths).save_to_disk(folder := paths[0].parent.parent / "saved")
    return folder


def parquet(paths):
    dataset(paths).to_parquet(file := paths[0].parent.parent / "rows.parquet")
    return file


def encoded(paths):
    return [{"bytes": path.read_bytes(), "path": None} for path in paths]


PLAIN = {
    "list": lambda paths: images(),
    "generator": lambda paths: iter(images()),
    "names": lambda paths: [str(path) for path in paths],
    "paths": lambda paths: paths,
    "bytes": encoded,
    "frame of names": lambda paths: pd.DataFrame({"image": [str(path) for path in paths]}),
    "folder": lambda paths: paths[0].parent.parent,
    "folder by name": lambda paths: str(paths[0].parent.parent),
}
LABELLED = {
    "dataset": dataset,
    "the only split": lambda paths: DatasetDict({"test": dataset(paths)}),
    "stream": lambda paths: dataset(paths).to_iterable_dataset(),
    "stream of unknown columns": lambda paths: IterableDataset.from_generator(
        lambda: ({"image": image, "label": label} for image, label in zip(images(), LABELS, strict=True))
    ),
    "frame": lambda paths: pd.DataFrame({"image": images(), "label": LABELS}),
    "frame of bytes": lambda paths: pd.DataFrame({"image": encoded(paths), "label": LABELS}),
    "rows": lambda paths: [{"image": i, "label": n} for i, n in zip(images(), LABELS, strict=True)],
    "lists by name": lambda paths: {"image": images(), "label": LABELS},
    "saved": saved,
    "parquet": parquet,
}


def pixels(data, **options):
    """All pixel values, as the model is given them."""
    batches = prepare(data, tiny_vit(), image_processor(), DataOptions(batch_size=4, **options)).batches
    return torch.cat([batch.inputs["pixel_values"] for batch in batches])


EXPECTED = image_processor()(images(), return_tensors="pt")["pixel_values"]


@pytest.mark.parametrize("kind", PLAIN | LABELLED)
def test_every_container_gives_the_same_pixels(kind, tmp_path):
    make = (PLAIN | LABELLED)[kind]
    data = prepare(make(image_files(tmp_path)), tiny_vit(), image_processor(), DataOptions(batch_size=4))
    assert torch.equal(torch.cat([batch.inputs["pixel_values"] for batch in data]), EXPECTED)
    assert [batch.samples for batch in data] == [4, 2]
    labels = [None if batch.labels is None else batch.labels.tolist() for batch in data]
    assert labels == ([LABELS[:4], LABELS[4:]] if kind in LABELLED else [None, None])


@pytest.mark.parametrize("kind", [kind for kind in PLAIN | LABELLED if "stream" not in kind and kind != "generator"])
def test_some_are_drawn(kind, tmp_path):
    make = (PLAIN | LABELLED)[kind]
    paths = image_files(tmp_path)
    if kind == "parquet":  # read once
        assert torch.equal(pixels(make(paths), max_samples=3, seed=1), EXPECTED[reservoir(range(6), 3, 1, 6).items])
    else:
        assert torch.equal(pixels(make(paths), max_samples=3, seed=1), EXPECTED[indices(6, 3, 1)])
    assert torch.equal(pixels(make(paths), max_samples=3, seed=None), EXPECTED[:3])


@pytest.mark.parametrize("kind", ["list", "frame", "endless"])
def test_not_all_of_many_are_kept(kind, monkeypatch, caplog, tmp_path):
    monkeypatch.setattr(reading, "BOUND", 4)
    monkeypatch.setattr(tables, "BOUND", 4)
    data = itertools.cycle(images()) if kind == "endless" else (PLAIN | LABELLED)[kind](image_files(tmp_path))
    assert len(pixels(data)) == 4
    assert "read, but 4 of " in caplog.text
    assert len(pixels(data, max_samples=5)) == 5


def test_they_are_opened_a_batch_at_a_time(monkeypatch, tmp_path):
    paths = image_files(tmp_path)
    opened, whole = [], Image.open
    monkeypatch.setattr(Image, "open", lambda file: opened.append(file) or whole(file))
    assert len(pixels(dataset(paths), max_samples=2)) == 2
    assert len(opened) == 2, "what is not drawn is not opened"


def test_other_colours_and_orientations(tmp_path):
    """Grey, with transparency, and turned by what a camera has written, as everywhere in Transformers."""
    upright = images()[0]
    turned = upright.transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned right before it is shown
    turned.save(tmp_path / "turned.png", exif=exif)
    alpha = upright.convert("RGBA")
    assert torch.equal(pixels([upright, tmp_path / "turned.png", alpha]), EXPECTED[:1].expand(3, -1, -1, -1))
    grey = upright.convert("L")
    assert torch.equal(pixels([grey]), pixels([grey.convert("RGB")]))


def test_pixels_are_kept_as_the_model_reads_them():
    model = tiny_vit().to(torch.bfloat16)
    (batch,) = prepare(images(), model, image_processor()).batches
    assert torch.equal(batch.inputs["pixel_values"], EXPECTED.to(torch.bfloat16))


@pytest.mark.parametrize("kind", ["folder", "dataset"])
def test_they_serve_everywhere(kind, tmp_path):
    data = (PLAIN | LABELLED)[kind](image_files(tmp_path))
    model = compress(tiny_vit(), DropBlocksConfig(num_blocks=1, criterion="block_influence"), data, image_processor())
    assert len(model.vit.layers if hasattr(model.vit, "layers") else model.vit.encoder.layer) == 2
    found = relevance(tiny_vit(), data, image_processor())
    assert found.explained.shape == (6,)
    rows, _ = _training_data(data, model, image_processor(), None, bounded=True)
    assert torch.equal(torch.stack([row["pixel_values"] for row in rows]), EXPECTED)
    assert [int(row["labels"]) for row in rows if "labels" in row] == (LABELS if kind == "dataset" else [])
    heal(model, tiny_vit(), data, image_processor())
    assert model.compression_report.stages[-1].notes["steps"] == 1


def broken(folder):
    (folder / "no.png").write_bytes(b"hello")
    return folder / "no.png"


def cut(folder):
    (path := image_files(folder)[0]).write_bytes(path.read_bytes()[:300])
    return path


def of_texts(folder):
    (folder / "texts.txt").write_text("w1 w2\n\nw3")
    return folder


REFUSED = {
    "a folder without images": (lambda folder: folder, r"holds no images: no \.jpg, .* file, and no dataset"),
    "no image": (broken, r"no\.png cannot be read as an image: UnidentifiedImageError"),
    "half an image": (cut, r"0\.png cannot be read as an image: OSError"),
    "bytes of no image": (lambda folder: [{"bytes": b"x", "path": "x.png"}], r"x\.png cannot be read as an image"),
    "a name of nothing": (lambda folder: [folder / "none.png"], r"none\.png cannot be read as an image: FileNotFound"),
    "texts": (lambda folder: ["w1 w2"], "data is texts, and ViTForImageClassification reads pixel_values: pass images"),
    "a folder of texts": (of_texts, "data is texts, and ViTForImageClassification reads"),
    "images and texts": (lambda folder: [*images(2), "w1"], "cannot be read as an image"),
    "sounds": (
        lambda folder: [{"array": np.zeros(9), "sampling_rate": 9}],
        "data is sounds, and ViTForImageClassification reads pixel_values: pass what it reads",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_refused(kind, tmp_path):
    make, message = REFUSED[kind]
    with pytest.raises(CalibrationError, match=message):
        prepare(make(tmp_path), tiny_vit(), image_processor())


@pytest.mark.parametrize("kind", ["list", "dataset", "folder", "rows"])
def test_a_model_of_texts(kind, tmp_path, tokenizer):
    with pytest.raises(CalibrationError, match="data is images, and LlamaForCausalLM reads input_ids"):
        prepare((PLAIN | LABELLED)[kind](image_files(tmp_path)), tiny_llama(2), tokenizer)


def test_a_table_with_texts_and_images_gives_each_model_its_own(tmp_path, model, tokenizer):
    data = dataset(image_files(tmp_path)).add_column("text", ["w1 w2"] * 6)
    assert prepare(data, model, tokenizer).tokens == 12
    assert torch.equal(pixels(data), EXPECTED)
    assert torch.equal(pixels(data.rename_column("image", "picture"), text_column="picture"), EXPECTED)


def test_no_processor_and_no_pillow(monkeypatch, tmp_path):
    paths = image_files(tmp_path)
    with pytest.raises(CalibrationError, match="calibration is images: pass the model's image processor, or processor"):
        prepare(paths, tiny_vit(), None)
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(CalibrationError, match="Pillow, which is not installed: pip install pillow"):
        prepare([Path(path) for path in paths], tiny_vit(), image_processor())
