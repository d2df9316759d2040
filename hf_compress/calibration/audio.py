"""Sounds into batches, through a model's feature extractor."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import replace
from io import BytesIO
from math import gcd
from typing import Any

import numpy as np

from hf_compress.calibration.media import Medium
from hf_compress.errors import CalibrationError, one_line

SECONDS = 30  # that are kept of a sound


def heard(media: list[Medium], extractor: Any) -> tuple[list[Medium], int]:
    """Sounds as arrays at the rate of the extractor, and how many were longer than `SECONDS` and cut.

    Where the extractor would pad sounds to the longest of a batch, they come in the order of their lengths: `features`
    cuts those of a batch to the shortest, since padding must not enter a statistic.
    """
    rate = extractor.sampling_rate
    sounds = [replace(medium, value=samples_of(medium, rate)) for medium in media]
    cut = [replace(sound, value=sound.value[: SECONDS * rate]) for sound in sounds]
    if not _of_one_length(extractor):
        cut.sort(key=lambda sound: len(sound.value))
    return cut, sum(len(sound.value) > SECONDS * rate for sound in sounds)


def features(sounds: list[Medium], extractor: Any) -> Mapping[str, Any]:
    """A batch of sounds as the extractor gives it to the model."""
    arrays = [sound.value for sound in sounds]
    if not _of_one_length(extractor):
        arrays = [array[: min(map(len, arrays))] for array in arrays]
    try:
        return extractor(arrays, sampling_rate=extractor.sampling_rate, return_tensors="pt")
    except (ValueError, TypeError) as error:
        raise CalibrationError(f"{type(extractor).__name__} does not take the sounds: {one_line(error)}") from error


def _of_one_length(extractor: Any) -> bool:
    """Whether an extractor brings all sounds to one length, which its model is trained on (Whisper, AST)."""
    padding = inspect.signature(extractor.__call__).parameters.get("padding")
    return padding is None or padding.default == "max_length"


def samples_of(medium: Medium, rate: int) -> np.ndarray[Any, Any]:
    """A sound as float32 samples (positions), of one channel, at `rate` samples a second.

    An array that does not say its rate is taken to have this one.

    Raises:
        CalibrationError: it cannot be read, or is empty; it is named.
    """
    value, own = medium.value, rate
    try:
        if isinstance(value, Mapping) and "bytes" in value:
            value, own = _read(medium, value["path"] if value["bytes"] is None else BytesIO(value["bytes"]))
        elif isinstance(value, Mapping) or hasattr(value, "get_all_samples"):
            value, own = value["array"], int(value["sampling_rate"])
        elif not hasattr(value, "ndim"):
            value, own = _read(medium, value)
        samples = np.asarray(value, dtype=np.float32)
        if samples.ndim != 1 or not samples.size:
            raise ValueError(f"a sound must have the shape (samples), and some; it has {samples.shape}")
    except CalibrationError:
        raise
    except (OSError, ValueError, TypeError, EOFError) as error:
        raise CalibrationError(f"{medium} cannot be read as a sound: {one_line(error)}") from error
    if own == rate:
        return samples
    from scipy.signal import resample_poly

    shared = gcd(own, rate)
    return resample_poly(samples, rate // shared, own // shared).astype(np.float32)


def _read(medium: Medium, file: Any) -> tuple[np.ndarray[Any, Any], int]:
    """The samples of a file, its channels averaged, and their rate: WAV by SciPy, other formats by soundfile."""
    if _is_wav(file):
        from scipy.io import wavfile

        rate, samples = wavfile.read(file)
        if samples.dtype == np.uint8:
            samples = (samples.astype(np.float32) - 128) / 128
        elif samples.dtype.kind == "i":
            samples = samples / -float(np.iinfo(samples.dtype).min)
    else:
        try:
            import soundfile
        except ImportError:
            raise CalibrationError(
                f"{medium} is no WAV file, and others are read by soundfile, which is not installed: pip install "
                "soundfile, or pass mappings of `array` and `sampling_rate`"
            ) from None
        try:
            samples, rate = soundfile.read(file, dtype="float32")
        except RuntimeError as error:  # its own
            raise ValueError(one_line(error)) from error
    return samples.mean(axis=1) if samples.ndim == 2 else samples, int(rate)


def _is_wav(file: Any) -> bool:
    """Whether a file, or its bytes, begin as WAV does."""
    if isinstance(file, BytesIO):
        return file.getvalue()[:4] in (b"RIFF", b"RIFX")
    with open(file, "rb") as opened:
        return opened.read(4) in (b"RIFF", b"RIFX")
