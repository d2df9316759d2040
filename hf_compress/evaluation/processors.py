"""What lies beside a saved model and reads its data: a tokenizer, an image processor, a feature extractor."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import transformers

from hf_compress.calibration.media import IMAGES, KINDS, Kind, Processor
from hf_compress.errors import one_line


def load_processor(name: str, needed: bool = False) -> Processor | None:
    """What lies beside a model and reads its data: a tokenizer, an image processor, a feature extractor, or several.

    None where there is none, unless it is needed for data.

    Raises:
        ValueError: it is needed, and does not load.
    """
    config = _config(name)
    kind = _kind_in(config)
    alone: Any = transformers.AutoTokenizer
    what, data = "tokenizer", "texts"
    if kind is not None:
        alone = transformers.AutoImageProcessor if kind is IMAGES else transformers.AutoFeatureExtractor
        what, data = kind.reader.replace("_", " "), kind.name
    if kind is not None or {"vision_config", "audio_config"} & config.keys():
        with suppress(OSError, ValueError, KeyError, TypeError, ImportError):  # it may want libraries for videos
            return transformers.AutoProcessor.from_pretrained(name)
    try:
        return alone.from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        if needed:
            raise ValueError(
                f"{name} has no {what} that loads, and {data} need one: save the model's there ({one_line(error)})"
            ) from error
        return None


def kind_read_by(name: str) -> Kind | None:
    """What a saved model reads in place of texts, by its class; None for texts, and where that cannot be told."""
    return _kind_in(_config(name))


def _kind_in(config: dict[str, Any]) -> Kind | None:
    names = config.get("architectures")
    cls = getattr(transformers, str(names[0]), None) if isinstance(names, list) and names else None
    main = getattr(cls, "main_input_name", "input_ids")
    return next((kind for kind in KINDS if main in kind.inputs), None)


def _config(name: str) -> dict[str, Any]:
    """A saved model's config; nothing where it does not load, which loading the model tells."""
    try:
        return dict(transformers.PreTrainedConfig.get_config_dict(name)[0])
    except (OSError, ValueError, TypeError, AttributeError):
        return {}
