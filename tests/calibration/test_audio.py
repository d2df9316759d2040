"""Sounds as calibration data: every container gives the same inputs, and padding never enters a statistic."""

import sys

import numpy as np
import pytest
import torch
from datasets import Audio, Dataset
from scipy.io import wavfile
from scipy.signal import resample_poly
from transformers import Wav2Vec2FeatureExtractor, WhisperFeatureExtractor

from hf_compress import DropBlocksConfig, compress, heal
from hf_compress.calibration.audio import SECONDS
from hf_compress.calibration.data import DataOptions, prepare
from hf_compress.errors import CalibrationError
from tests.helpers.language import tiny_llama
from tests.helpers.media import LABELS, RATE, sound_files, sounds, tiny_wav2vec2
from tests.helpers.tiny import tiny_seq2seq_model

ARRAYS = [(sound / 2**15).astype(np.float32) for sound in sounds()]
BY_LENGTH = sorted(range(6), key=lambda index: len(ARRAYS[index]))


def dataset(paths):
    return Dataset.from_dict({"audio": [str(path) for path in paths], "label": LABELS}).cast_column("audio", Audio())


def parquet(paths):
    data = [{"bytes": path.read_bytes(), "path": None} for path in paths]
    rows = Dataset.from_dict({"audio": data, "label": LABELS}).cast_column("audio", Audio(decode=False))
    rows.to_parquet(file := paths[0].parent / "rows.parquet")
    return file


PLAIN = {
    "arrays": lambda paths: ARRAYS,
    "tensors": lambda paths: [torch.tensor(array) for array in ARRAYS],
    "mappings": lambda paths: [{"array": array.tolist(), "sampling_rate": RATE} for array in ARRAYS],
    "generator": lambda paths: ({"array": array, "sampling_rate": RATE} for array in ARRAYS),
    "names": lambda paths: [str(path) for path in paths],
    "folder": lambda paths: paths[0].parent,
}
LABELLED = {
    "dataset": dataset,
    "stream": lambda paths: dataset(paths).to_iterable_dataset(),
    "rows": lambda paths: [
        {"audio": {"array": array, "sampling_rate": RATE}, "label": label}
        for array, label in zip(ARRAYS, LABELS, strict=True)
    ],
    "parquet": parquet,
}


@pytest.mark.parametrize("kind", PLAIN | LABELLED)
def test_every_container_gives_the_same_inputs(kind, tmp_path):
    """Without torchcodec, which `datasets` would open files with."""
    make, extractor = (PLAIN | LABELLED)[kind], Wav2Vec2FeatureExtractor()
    data = prepare(make(sound_files(tmp_path)), tiny_wav2vec2(), extractor, DataOptions(batch_size=4))
    for batch, part in zip(data, (BY_LENGTH[:4], BY_LENGTH[4:]), strict=True):
        shortest = min(len(ARRAYS[index]) for index in part)
        arrays = [ARRAYS[index][:shortest] for index in part]
        expected = extractor(arrays, sampling_rate=RATE, return_tensors="pt")["input_values"]
        assert torch.equal(batch.inputs["input_values"], expected)
        assert batch.real is None or batch.real.all()
        assert (None if batch.labels is None else batch.labels.tolist()) == (
            [LABELS[index] for index in part] if kind in LABELLED else None
        )


def test_other_rates_channels_and_widths(tmp_path):
    sound = sounds(1)[0]
    stereo = np.stack([sound, np.zeros_like(sound)], axis=1)
    wavfile.write(tmp_path / "a.wav", RATE, stereo)
    wavfile.write(tmp_path / "b.wav", 2 * RATE, sound)
    wavfile.write(tmp_path / "c.wav", RATE, (sound // 256 + 128).astype(np.uint8))
    wavfile.write(tmp_path / "d.wav", RATE, sound.astype(np.int32) * 2**16)
    extractor = Wav2Vec2FeatureExtractor(do_normalize=False)
    found = {}
    for name in "abcd":
        (batch,) = prepare(tmp_path / f"{name}.wav", tiny_wav2vec2(), extractor).batches
        found[name] = batch.inputs["input_values"][0].numpy()
    np.testing.assert_allclose(found["a"], ARRAYS[0] / 2, atol=1e-6)
    np.testing.assert_allclose(found["b"], resample_poly(ARRAYS[0], 1, 2), atol=1e-6)
    np.testing.assert_allclose(found["c"], ARRAYS[0], atol=1 / 128)
    np.testing.assert_allclose(found["d"], ARRAYS[0], atol=1e-6)


def test_long_ones_are_cut_and_that_is_told(caplog):
    data = [np.zeros(SECONDS * 100 + 1, dtype=np.float32), np.zeros(500, dtype=np.float32)]
    found = prepare(data, tiny_wav2vec2(), Wav2Vec2FeatureExtractor(sampling_rate=100), DataOptions(batch_size=1))
    assert [batch.inputs["input_values"].shape[1] for batch in found] == [500, SECONDS * 100]
    assert found.truncated == 1
    assert "1 calibration samples are longer than 30 seconds" in caplog.text


def test_spectra_of_one_length():
    """Whisper's extractor pads to what its model is trained on; sounds stay in their order."""
    model = tiny_seq2seq_model("whisper")
    seconds = 2 * model.config.max_source_positions * 160 / RATE
    extractor = WhisperFeatureExtractor(model.config.num_mel_bins, chunk_length=1, n_samples=int(seconds * RATE))
    extractor.n_samples = int(seconds * RATE)
    (batch,) = prepare(ARRAYS, model, extractor).batches
    expected = extractor(ARRAYS, sampling_rate=RATE, return_tensors="pt")["input_features"]
    assert torch.equal(batch.inputs["input_features"], expected)


def test_they_serve_everywhere(tmp_path):
    data, extractor = dataset(sound_files(tmp_path)), Wav2Vec2FeatureExtractor()
    model = compress(tiny_wav2vec2(), DropBlocksConfig(num_blocks=1, criterion="block_influence"), data, extractor)
    assert len(model.wav2vec2.encoder.layers) == 2
    heal(model, tiny_wav2vec2(), data, extractor, options=DataOptions(batch_size=1))
    assert model.compression_report.stages[-1].method == "heal"


REFUSED = {
    "no sound": (
        lambda folder: (folder / "no.wav").write_bytes(b"RIFFxxxx") and folder,
        r"no\.wav cannot be read",
    ),
    "none at all": (lambda folder: folder, r"holds no sounds: no \.wav, .* file, and no dataset"),
    "another format": (
        lambda folder: (folder / "a.flac").write_bytes(b"fLaC") and folder,
        r"a\.flac is no WAV file, and others are read by soundfile, which is not installed: pip install soundfile",
    ),
    "nothing to hear": (lambda folder: [np.zeros(0, dtype=np.float32)], r"must have the shape \(samples\), and some"),
    "texts": (lambda folder: ["w1"], "data is texts, and Wav2Vec2ForSequenceClassification reads input_values"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_refused(kind, tmp_path, monkeypatch):
    make, message = REFUSED[kind]
    monkeypatch.setitem(sys.modules, "soundfile", None)
    with pytest.raises(CalibrationError, match=message):
        prepare(make(tmp_path), tiny_wav2vec2(), Wav2Vec2FeatureExtractor())


def test_no_extractor_and_a_model_of_texts(tokenizer):
    data = [{"array": ARRAYS[0], "sampling_rate": RATE}]
    with pytest.raises(CalibrationError, match="calibration is sounds: pass the model's feature extractor"):
        prepare(data, tiny_wav2vec2(), None)
    with pytest.raises(CalibrationError, match="data is sounds, and LlamaForCausalLM reads input_ids"):
        prepare(data, tiny_llama(2), tokenizer)
